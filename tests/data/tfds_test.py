"""Rows of data sets that the test itself prepares with `tensorflow_datasets`, as array_record files and as TFRecord."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from deptjax.data.sources import source_from_config
from deptjax.data.tasks import Task
from deptjax.data.tfds import TFDSSource, plain
from deptjax.errors import UserError

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None


FEATURES = tfds.features.FeaturesDict(
    {
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["negative", "positive"]),
        "score": np.float32,
        "seen": np.bool_,
        "answers": tfds.features.Sequence(tfds.features.Text()),
        "spans": tfds.features.Sequence({"text": tfds.features.Text(), "start": np.int32}),
        "idx": {"question": np.int32},
    }
)


SIZES = {"train": 40, "validation": 5}


def examples(config: str, count: int) -> list[dict[str, object]]:
    return [
        {
            "text": f"café {config} {i} of {count}",
            "label": i % 2,
            "score": i + 0.8,
            "seen": i == 3,
            "answers": ["ä", "b"][: i % 3],
            "spans": [{"text": "c", "start": i}] * (i % 2),
            "idx": {"question": i},
        }
        for i in range(count)
    ]


class Reviews(tfds.core.GeneratorBasedBuilder):
    """A data set of two configurations, prepared as any other."""

    VERSION = tfds.core.Version("1.10.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name, version="1.10.0") for name in ("films", "books")]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=FEATURES)

    def _split_generators(self, dl_manager):
        return {split: enumerate(examples(self.builder_config.name, n)) for split, n in SIZES.items()}

    def _generate_examples(self):
        raise AssertionError("the splits above are given as they are")


def prepare(folder: pathlib.Path, config: str, file_format: str) -> None:
    Reviews(data_dir=folder, config=config, file_format=file_format).download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tfds")
    for config in ("films", "books"):
        prepare(folder, config, "array_record")
    return folder


def test_a_prepared_data_set_is_a_task(prepared):
    task = Task(
        "reviews",
        TFDSSource("reviews/films", prepared, test=None, test_size=8),
        input="{text}",
        labels=("0", "1"),
        verbalizers={"0": "negative", "1": "positive"},
    )
    data = task.load()
    assert (len(data.train), len(data.dev), len(data.test)) == (32, 5, 8)
    by_text = {row.values["text"]: row for row in data.dev}
    assert set(by_text) == {f"café films {i} of 5" for i in range(5)}
    assert by_text["café films 3 of 5"].values == {
        "text": "café films 3 of 5",
        "label": 1,
        "score": 3.8,
        "seen": True,
        "answers": [],
        "spans": {"text": ["c"], "start": [3]},
        "idx": {"question": 3},
    }
    assert by_text["café films 2 of 5"].values["answers"] == ["ä", "b"]
    assert [row.origin for row in data.dev[:2]] == [
        "reviews/films validation, row 1",
        "reviews/films validation, row 2",
    ]
    assert data == task.load()
    assert Task.from_config(task.to_config()) == task


def test_parts_of_splits_and_versions(prepared, tmp_path):
    source = TFDSSource("reviews/books:1.10.0", prepared, train="train[:30%]", dev="train[90%:]", test="validation")
    splits = source.splits(lambda row: str(row.values["text"]))
    assert [len(part) for part in splits] == [12, 4, 5]
    rows = TFDSSource("reviews/books", prepared).rows("train")
    assert [row.values for row in splits.train] == [row.values for row in rows[:12]]
    shutil.copytree(prepared / "reviews" / "books", tmp_path / "reviews" / "books")
    shutil.copytree(tmp_path / "reviews" / "books" / "1.10.0", tmp_path / "reviews" / "books" / "1.9.0")
    assert TFDSSource("reviews/books", tmp_path)._folder().name == "1.10.0"  # by number: 1.10 is later than 1.9


def test_the_folder_may_come_from_the_environment(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(TFDSSource("reviews/films").rows("validation")) == 5


def test_what_is_not_there_is_told_in_one_line(prepared, tmp_path):
    text = (
        rf"^glue/sst2 is not in {tmp_path}; prepare it: python -c \"import tensorflow_datasets as tfds; "
        rf"tfds\.builder\('glue/sst2', data_dir='{tmp_path}', file_format='array_record'\)\.download_and_prepare\(\)\""
    )
    with pytest.raises(UserError, match=text) as caught:
        TFDSSource("glue/sst2", tmp_path).rows("train")
    assert "\n" not in str(caught.value)
    for name, split, message in [
        ("reviews/film", "train", r"reviews/film is not in .*Did you mean 'reviews/films'\?"),
        ("reviews", "train", r"reviews has several configurations in .*: reviews/books, reviews/films; name one"),
        ("reviews/films:2.0.0", "train", r"reviews/films is in .* in version 1\.10\.0, not 2\.0\.0"),
        ("reviews/films", "test", r"no split 'test'; set test= to one of train, validation, or to None"),
        ("reviews/films", "train[:1x]", r"reviews/films, split 'train\[:1x\]': "),
    ]:
        with pytest.raises(UserError, match=message):
            TFDSSource(name, prepared).rows(split)
    with pytest.raises(UserError, match=r"name='a b' is no name of a data set"):
        TFDSSource("a b")
    assert source_from_config(TFDSSource("mnist", test=None).to_config()) == TFDSSource("mnist", test=None)


@pytest.mark.parametrize("damage", ["info", "cut", "gone"])
def test_damaged_files_are_told(prepared, tmp_path, damage):
    folder = shutil.copytree(prepared, tmp_path / "copy") / "reviews" / "films" / "1.10.0"
    if damage == "info":
        (folder / "dataset_info.json").write_text("{cut off")
    for file in folder.glob("*train.array_record*"):
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:100])
        elif damage == "gone":
            file.unlink()
    with pytest.raises(UserError, match=r"films/1\.10\.0 cannot be read \(.*\); prepare .* again$") as caught:
        TFDSSource("reviews/films", tmp_path / "copy").rows("train")
    assert "\n" not in str(caught.value)


def tfrecord_claimed(prepared: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Returns a copy whose description says TFRecord: enough for what is told before a file is opened."""
    shutil.copytree(prepared, folder)
    info = folder / "reviews" / "films" / "1.10.0" / "dataset_info.json"
    described = json.loads(info.read_text())
    described["fileFormat"] = "tfrecord"
    for split in described["splits"]:
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info.write_text(json.dumps(described))
    return folder


if HAS_TENSORFLOW:  # where TensorFlow is, its files are read; where it is not, it is asked for

    def test_tfrecord_files_are_read_in_their_order(prepared, tmp_path):
        prepare(tmp_path, "films", "tfrecord")
        rows = [TFDSSource("reviews/films", place).rows("train") for place in (tmp_path, prepared)]
        by_text = [sorted((row.values for row in part), key=lambda values: str(values["text"])) for part in rows]
        assert by_text[0] == by_text[1]
        assert rows[0] == TFDSSource("reviews/films", tmp_path).rows("train")

else:

    def test_tfrecord_files_without_tensorflow_are_told(prepared, tmp_path):
        folder = tfrecord_claimed(prepared, tmp_path / "copy")
        message = r"holds tfrecord files, which only TensorFlow reads \(No module named 'tensorflow'\); install tensor"
        with pytest.raises(UserError, match=message):
            TFDSSource("reviews/films", folder).rows("train")


def test_plain_values():
    assert plain({"a": [np.int64(3), np.float32(0.5), b"\xff"], "b": np.array([b"x", b"y"], object)}) == {
        "a": [3, 0.5, b"\xff"],
        "b": ["x", "y"],
    }
