"""Rows of data sets that the test itself saves with the library `datasets`, and of ones that are not to be had."""

from __future__ import annotations

import datasets
import pytest

from deptjax.data.huggingface import HFSource
from deptjax.data.sources import normalized, source_from_config
from deptjax.data.tasks import Task
from deptjax.errors import UserError

FEATURES = datasets.Features(
    {
        "sentence": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["negative", "positive"]),
        "score": datasets.Value("float32"),
        "answers": {"text": datasets.List(datasets.Value("string"))},
    }
)


def made(count: int, word: str) -> datasets.Dataset:
    rows = [
        {"sentence": f"{word} {i}", "label": i % 2, "score": i + 0.8, "answers": {"text": ["a", "b"][: i % 3]}}
        for i in range(count)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": made(40, "train"), "validation": made(5, "dev")}).save_to_disk(folder)
    return folder


def test_a_saved_data_set_is_a_task(saved):
    task = Task(
        "reviews",
        HFSource(saved, test=None, test_size=8),
        input="{sentence}",
        labels=("0", "1"),
        verbalizers={"0": "negative", "1": "positive"},
    )
    data = task.load()
    assert (len(data.train), len(data.dev), len(data.test)) == (32, 5, 8)
    assert data.task.target_text(data.dev[1]) == "positive"
    assert data.dev[2].values == {"sentence": "dev 2", "label": 0, "score": 2.8, "answers": {"text": ["a", "b"]}}
    assert data.dev[2].origin == f"{saved} validation, row 3"
    texts = [{normalized(task.source_text(row)) for row in part} for part in (data.train, data.test)]
    assert not texts[0] & texts[1]
    assert data == task.load()
    assert Task.from_config(task.to_config()) == task


def test_labels_are_inferred(saved):
    task = Task("reviews", HFSource(saved, test="validation"), input="{sentence}").load().task
    assert task.labels == ("0", "1")


def test_a_lone_saved_split_is_the_training_split(tmp_path):
    made(7, "row").save_to_disk(tmp_path / "one")
    assert len(HFSource(tmp_path / "one").rows("train")) == 7
    with pytest.raises(UserError, match=r"no split 'validation'; set dev= to one of train, or to None to draw its"):
        HFSource(tmp_path / "one").splits(lambda row: str(row.values["sentence"]))


def test_a_folder_of_files(tmp_path):
    for split, count in {"train": 10, "test": 4}.items():
        made(count, split).to_parquet(tmp_path / "files" / f"{split}.parquet")
    source = HFSource(tmp_path / "files", train="train[:50%]", dev="train[50%:]")
    splits = source.splits(lambda row: str(row.values["sentence"]))
    assert [row.values["sentence"] for row in splits.dev] == [f"train {i}" for i in range(5, 10)]
    assert [len(part) for part in splits] == [5, 5, 4]
    with pytest.raises(UserError, match=r'Unknown split "tset". Should be one of'):
        source.rows("tset")


def test_what_is_not_there_is_told_in_one_line(saved, tmp_path):
    # conftest.py sets the offline mode, so that nothing is asked of a network
    message = (
        r"^nyu-mll/glue/sst2 is not in the cache .*cache and cannot be downloaded \(.*\); where there is a network run "
        r"datasets\.load_dataset\('nyu-mll/glue', 'sst2', revision='main'\) into that cache, or save_to_disk\(FOLDER\)"
    )
    with pytest.raises(UserError, match=message) as caught:
        HFSource("nyu-mll/glue", "sst2", revision="main").rows("train")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no split 'tets'; set test= to one of train, validation, or to None"):
        HFSource(saved, test="tets").rows("tets")
    with pytest.raises(UserError, match="no such folder"):
        HFSource(tmp_path / "none").rows("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="doesn't contain any data files; name a folder of"):
        HFSource(tmp_path / "empty").rows("train")
    with pytest.raises(UserError, match="path is empty; name a folder, or a data set of the hub"):
        HFSource("")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
@pytest.mark.parametrize("file", ["train/state.json", "dataset_dict.json"])
def test_a_damaged_saved_data_set_is_told(saved, file, text):
    (saved / file).write_text(text)
    with pytest.raises(UserError, match=r"cannot be read as a saved data set \(\w+: .*\); save it again$"):
        HFSource(saved).rows("train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": "a,b\n1,2\n1,2,3\n"}, r"the files cannot be read as rows \(.*Expected 2 fields .*\); mend them"),
        ({"train.jsonl": '{"x": 1}\n', "test.jsonl": '{"y": 1}\n'}, r"cannot be read as rows \(.*\); mend them"),
        ({"train.jsonl": ""}, "split 'train' has an empty file; fill it or remove it"),
    ],
    ids=["fields", "columns", "empty"],
)
def test_damaged_files_are_told(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        HFSource(tmp_path).rows("train")
    assert "\n" not in str(caught.value)


def test_config_round_trip():
    source = HFSource("nyu-mll/glue", "sst2", test=None, seed=3)
    assert source_from_config(source.to_config()) == source
    with pytest.raises(UserError, match="source of kind 'huggingface'"):
        source_from_config({"kind": "huggingface", "pth": "a"})
