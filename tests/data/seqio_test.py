"""Tasks and mixtures registered with the real seqio, where it is installed; what is told where it is not.

seqio brings TensorFlow and so is in no ordinary environment: `make test-seqio` makes one and runs this file in it.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap

import pytest

from deptjax.data.seqio import SeqioSource, seqio_task
from deptjax.data.sources import source_from_config
from deptjax.data.tasks import Task
from deptjax.errors import UserError


def test_settings():
    source = SeqioSource("glue_cola", "t5.data.tasks", examples=100, test=None)
    assert source_from_config(source.to_config()) == source
    task = seqio_task("glue_cola", labels=("acceptable", "unacceptable"), metrics=("matthews",), dev=None, seed=3)
    assert task.source == SeqioSource("glue_cola", dev=None, seed=3)
    assert (task.name, task.input, task.target) == ("glue_cola", "{inputs}", "{targets}")
    assert Task.from_config(task.to_config()) == task
    with pytest.raises(UserError, match="examples=0 must be at least 1"):
        SeqioSource("a", examples=0)


if importlib.util.find_spec("seqio") is None:

    def test_what_to_install_is_told():
        message = r"^seqio 'glue_cola' is read with the library seqio, which .*: pip install 'deptjax\[seqio\]'$"
        with pytest.raises(UserError, match=message):
            SeqioSource("glue_cola").rows("train")

else:
    pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow's and seqio's own, on import and on use

    MODULE = """
        import functools
        import seqio
        import tensorflow as tf

        def examples(split, shuffle_files=False, seed=None, word="text"):
            count = {"train": 20, "validation": 5}[split]
            return tf.data.Dataset.from_tensor_slices({
                "inputs": [f"{word} {i}: " + chr(233) for i in range(count)],
                "targets": [("no", "yes")[i % 2] for i in range(count)],
                "idx": list(range(count)),
            })

        def broken(dataset):
            raise RuntimeError("this data lies\\nelsewhere")

        BYTES = seqio.ByteVocabulary()
        FEATURES = {name: seqio.Feature(BYTES, add_eos=True) for name in ("inputs", "targets")}
        PLAIN = {name: seqio.Feature(seqio.PassThroughVocabulary(1), dtype=tf.string, rank=0)
                 for name in ("inputs", "targets")}

        def add(name, steps, features=FEATURES, word="text"):
            seqio.TaskRegistry.add(
                name,
                source=seqio.FunctionDataSource(functools.partial(examples, word=word), splits=("train", "validation")),
                preprocessors=steps,
                output_features=features,
            )

        add("kept", [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos])
        add("decoded", [functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
                        seqio.preprocessors.append_eos])
        add("untokenized", [], PLAIN)
        add("other", [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos], word="other")
        add("broken", [broken])
        add("targets_only", [seqio.preprocessors.tokenize], {"targets": seqio.Feature(BYTES)})
        seqio.MixtureRegistry.add("mixed", [("kept", 3), ("other", 1)])
    """

    @pytest.fixture
    def registered(tmp_path, monkeypatch):
        """Names a module that registers tasks, of which seqio has none before and after."""
        import seqio

        name = "tasks_of_a_project"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
        monkeypatch.syspath_prepend(tmp_path)
        yield name
        sys.modules.pop(name, None)
        seqio.TaskRegistry.reset()
        seqio.MixtureRegistry.reset()

    @pytest.mark.parametrize("name", ["kept", "decoded", "untokenized"])
    def test_a_registered_task_is_a_task(registered, name):
        task = seqio_task(name, registered, test=None, test_size=4)
        data = task.load()
        assert [len(part) for part in (data.train, data.dev, data.test)] == [16, 5, 4]
        assert data.task.labels == ("no", "yes")
        row = data.dev[3]
        assert {key: row.values[key] for key in ("inputs", "targets")} == {"inputs": "text 3: é", "targets": "yes"}
        assert row.values["idx"] == 3
        assert row.origin == f"seqio '{name}' validation, row 4"
        assert (task.source_text(row), data.task.label_index(row)) == ("text 3: é", 1)

    def test_a_mixture(registered):
        whole = SeqioSource("mixed", registered)
        texts = [row.values["inputs"] for row in whole.rows("train")]
        assert sorted(texts) == sorted(f"{word} {i}: é" for word in ("text", "other") for i in range(20))
        assert len(whole.rows("validation")) == 10
        drawn = SeqioSource("mixed", registered, examples=400)
        words = [str(row.values["inputs"]).split()[0] for row in drawn.rows("train")]
        assert len(words) == 400
        assert 0.68 < words.count("text") / 400 < 0.82  # 3 to 1: the standard error is 0.022
        assert drawn.rows("train") == drawn.rows("train")
        assert len(drawn.rows("validation")) == 10

    def test_a_task_of_fewer_rows_is_taken_anew(registered):
        rows = SeqioSource("kept", registered, examples=50).rows("train")
        assert [row.values["idx"] for row in rows] == [i % 20 for i in range(50)]

    @pytest.mark.parametrize(
        ("name", "split", "message"),
        [
            ("kept", "test", r"no split 'test'; set test= to one of train, validation, or to None"),
            ("kpet", "train", r"no seqio task or mixture is registered as 'kpet'\.* Did you mean 'kept'\?"),
            ("targets_only", "train", r"has no feature 'inputs' \(it has targets\)"),
            ("broken", "train", r"^seqio 'broken', split 'train' cannot be read: RuntimeError: this data lies elsewh"),
        ],
    )
    def test_what_is_not_there_is_told_in_one_line(registered, name, split, message):
        with pytest.raises(UserError, match=message) as caught:
            SeqioSource(name, registered).rows(split)
        assert "\n" not in str(caught.value)

    def test_modules_are_asked_for():
        with pytest.raises(UserError, match=r"module='no_such_module' cannot be imported .* put its folder on PYTHON"):
            SeqioSource("kept", "no_such_module").rows("train")
        with pytest.raises(UserError, match=r"registered as 'kept'; name the module that registers it, module='my_pro"):
            SeqioSource("kept").rows("train")
