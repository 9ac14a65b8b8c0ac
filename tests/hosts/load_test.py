"""A model that is split over two hosts is never whole on one of them, not even while it is read."""

from __future__ import annotations

import json
import pathlib

from safetensors.numpy import load_file, save_file

from deptjax.testing import save_hf_folder, tiny_llama
from tests.hosts.launcher import run_hosts
from tests.hosts.work import backbone_of

FILES = 4


def large_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns a folder of about 170 MB of random weights in several files."""
    sizes = {"vocab_size": 8000, "width": 512, "num_layers": 12, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    save_hf_folder(tiny_llama(mlp_dim=1408, **sizes), folder)
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    of = {name: f"model-{i * FILES // len(tensors) + 1:05}-of-{FILES:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(of.values()):
        save_file({name: tensors[name] for name in tensors if of[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": of}))
    return folder


def test_each_host_reads_its_half(tmp_path: pathlib.Path) -> None:
    small = save_hf_folder(backbone_of("llama"), tmp_path / "small")
    ends = run_hosts("load", str(small), str(large_folder(tmp_path / "large")))
    for end in ends:
        assert end.status == 0, end.err
        measured = json.loads(end.out)
        assert measured["tree"] > 165e6
        assert measured["held"] < 0.51 * measured["tree"]
        assert 0.95 * measured["held"] < measured["peak"] < measured["held"] + 20e6, measured
