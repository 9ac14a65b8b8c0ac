"""Tasks whose rows come from other libraries are named in gin files; a run's kept gin file means the same task."""

from __future__ import annotations

import pathlib

import datasets
import pytest

from deptjax.cli import flags, settings
from deptjax.data.huggingface import HFSource
from deptjax.data.seqio import SeqioSource
from deptjax.data.sources import FileSource, Source
from deptjax.data.tasks import Task, get_task
from deptjax.data.tfds import TFDSSource
from deptjax.errors import UserError
from deptjax.methods import DePT

SOURCES = {
    "sst2": HFSource("nyu-mll/glue", "sst2", test=None),
    "yelp_polarity": HFSource("yelp_polarity", dev=None, revision="abc"),
    "mrpc": TFDSSource("glue/mrpc:2.0.0", "data", dev="train[90%:]"),
    "cola_v2": SeqioSource("cola_v2", "my_project.tasks", examples=100),
    "rows": FileSource("folder/rows.jsonl", dev_size=7),
}


def given(*words: str, gin: pathlib.Path | None = None) -> settings.Settings:
    parser = flags.Parser("deptjax train", "", "", "")
    flags.add_task(parser)
    options, bindings = parser.parse(words)
    return settings.merged([] if gin is None else [str(gin)], bindings, flags.given_by_flags(options, parser))


@pytest.mark.parametrize(("name", "source"), SOURCES.items())
def test_the_kept_gin_file_means_the_same_task(name: str, source: Source, tmp_path: pathlib.Path) -> None:
    task = Task(name, source, input="{text}", labels=("0", "1"))
    method, file = DePT(), tmp_path / "config.gin"
    file.write_text(settings.as_gin({}, method, task, settings.make_config({}, method)))
    assert settings.make_task(given(gin=file)) == task
    unnamed = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("Task.name"))
    file.write_text(unnamed)
    assert settings.make_task(given(gin=file)) == task  # the name comes from where the rows are


def test_rows_of_another_library_are_read(tmp_path: pathlib.Path) -> None:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    words = [f"--gin.HFSource.path={str(tmp_path / 'saved')!r}", "--gin.HFSource.dev=None", "--gin.HFSource.test=None"]
    data = settings.make_task(given(*words, "--input", "{text}")).load()
    assert (data.task.name, data.task.labels) == ("saved", ("0", "1"))
    assert [len(part) for part in (data.train, data.dev, data.test)] == [16, 2, 2]


def test_what_names_a_task_twice_or_not_at_all() -> None:
    hub = "--gin.HFSource.path='a'"
    assert settings.make_task(given(hub, "--task", "sms_spam")) == get_task("sms_spam")  # a flag goes before gin
    assert settings.make_task(given(hub, "--task-file", "b.csv", "--input", "{x}")).source == FileSource("b.csv")
    for words, message in [
        ((hub, "--gin.TFDSSource.name='b'"), r"HFSource\.path and --gin\.TFDSSource\.name both name a task's rows; ke"),
        ((hub, "--gin.train.task='trec6'"), r"train\.task and --gin\.HFSource\.path both name a task; keep one"),
        ((hub,), r"--gin\.HFSource\.path: no --input; give the template"),
        (("--gin.HFSource.name='b'",), r"HFSource\.name is of no use without HFSource\.path; bind it"),
        (("--gin.HFSource.pth='b'",), r"HFSource has no field 'pth'.* Did you mean 'path'"),
        (("--gin.SeqioSource.name='b'", "--gin.SeqioSource.examples='x'"), r"examples 'x' is not a whole number or"),
    ]:
        with pytest.raises(UserError, match=message):
            settings.make_task(given(*words))
