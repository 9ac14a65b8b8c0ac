"""The kernels against `xla`: the TPU kernel interpreted, cuDNN as far as a machine without a GPU can tell."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from benchmarks.attention import Case, cases, check_attention
from deptjax.errors import UserError
from deptjax.models.attention import attend
from deptjax.models.fused_attention import MAPPED, PAYS, Problem, check_runs_here, choose, fused
from deptjax.sharding import Placement
from deptjax.testing import tiny_gpt2, tiny_llama, tiny_t5
from deptjax.typing import Array
from tests.sharding.process import cpu_devices

ROOT = pathlib.Path(__file__).resolve().parents[2]
INTERPRETED = (  # between them all that the kernel is given, in as few compilations as can be
    "cross",
    "grouped behind a prompt",
    "position bias behind keys of a method",
    "position bias, causal",
    "many blocks",
)
# Blocks of 128 in both directions: several, of which causality leaves out some.
LONG = Case(batch=1, queries=270, keys=270, heads=2, kv_heads=1, causal=True)
CASES = {**cases(), "many blocks": LONG}
TINY = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": tiny_t5}


@functools.cache
def on_xla(name: str) -> dict[str, Array]:
    """Returns the results of a case by `xla` in float32."""
    return CASES[name].results("xla", jnp.float32)


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_tpu_kernel_computes_values_and_gradients(name: str) -> None:
    with pltpu.force_tpu_interpret_mode(True):  # the whole grid, also what vmap adds to it
        ours = CASES[name].results("flash", jnp.float32)
    expected = on_xla(name)
    assert ours.keys() == expected.keys()
    for part, array in expected.items():
        assert float(jnp.abs(array).max()) > 0.1, part
        np.testing.assert_allclose(ours[part], array, atol=1e-5, err_msg=part)


@pytest.mark.parametrize("family", ["llama", "t5"])  # GPT-2 has LLaMA's attention
def test_a_backbone_computes_the_same_by_the_tpu_kernel(family: str) -> None:
    layers = {"llama": {"num_layers": 1}, "t5": {"num_encoder_layers": 1, "num_decoder_layers": 1}}
    backbone = TINY[family](**layers[family])
    random = np.random.default_rng(0)
    source = jnp.asarray(random.integers(2, 30, (2, 9)), jnp.int32)
    mask = jnp.arange(9)[None] < jnp.asarray([[9], [6]])
    targets = jnp.asarray(random.integers(2, 30, (2, 3)), jnp.int32)
    prompt = jnp.asarray(random.standard_normal((4, backbone.width)), jnp.float32)

    def logits(implementation: str, prompt: Array) -> Array:
        module = dataclasses.replace(backbone.config, attention=implementation).make()
        variables = {"params": backbone.params}
        embedded = module.apply(variables, source, method="embed")
        states = module.apply(variables, embedded, mask, prompt, targets, method="target_states")
        return module.apply(variables, states, method="head")

    def both(implementation: str) -> Any:
        def values_and_gradient(prompt: Array) -> Any:
            result, backward = jax.vjp(functools.partial(logits, implementation), prompt)
            return result, backward(jnp.cos(jnp.arange(result.size, dtype=jnp.float32)).reshape(result.shape))

        return jax.jit(values_and_gradient)(prompt)

    expected = both("xla")
    with pltpu.force_tpu_interpret_mode(True):
        ours = both("flash")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours, expected)


def test_members_are_mapped_over_the_tpu_kernel() -> None:
    case = CASES["position bias, padded"]
    given = case.arrays()
    bias = given.pop("bias")
    members = jax.tree.map(lambda a: jnp.stack([a, a[:, ::-1]]), given)

    def mixed(arrays: dict[str, Array], implementation: str) -> Array:
        return attend(arrays["query"], case.segments({**arrays, "bias": bias}), 0.3, implementation=implementation)

    expected = jax.vmap(functools.partial(mixed, implementation="xla"))(members)
    with pltpu.force_tpu_interpret_mode(True):
        ours = jax.vmap(functools.partial(mixed, implementation="flash"))(members)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


MESHES = {
    "grouped behind a prompt": ("data:2,model:4", {"heads": 8, "kv_heads": 4}),
    "grouped": ("data:2,model:4", {"heads": 8, "kv_heads": 2}),  # fewer key/value heads than devices: spread to all
    "position bias, padded": ("data:2,fsdp:2,model:2", {"heads": 4, "kv_heads": 4, "batch": 4}),
}


def errors_on_meshes() -> dict[str, float]:
    """Returns how far eight devices are from one, in values and gradients."""
    found = {}
    for name, (mesh, sizes) in MESHES.items():
        case, placement = dataclasses.replace(CASES[name], **sizes), Placement.over(mesh=mesh)
        expected = case.results("xla", jnp.float32)
        with pltpu.force_tpu_interpret_mode(True), placement.activations():
            ours = case.results("flash", jnp.float32)
        found[name] = max(float(jnp.abs(ours[k] - a).max()) for k, a in expected.items())
    return found


def test_rows_and_heads_are_split_over_a_mesh() -> None:
    code = "import json; from tests.models import fused_attention_test as t; print(json.dumps(t.errors_on_meshes()))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": cpu_devices(8), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert errors.keys() == MESHES.keys()
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", cases())
def test_the_program_with_cudnn_lowers_for_nvidia_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # jax asks the installed cuDNN for its version while tracing; here is none.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    case = cases()[name]
    given = {k: a if k == "bias" else a.astype(jnp.bfloat16) for k, a in case.arrays().items()}
    toward = given.pop("toward")

    def both(arrays: dict[str, Array]) -> Any:
        def mixed(arrays: dict[str, Array]) -> Array:
            return attend(arrays["query"], case.segments(arrays), 0.25, implementation="cudnn")

        result, backward = jax.vjp(mixed, arrays)
        return result, backward(toward)

    lowered = jax.jit(both).trace(given).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in lowered
    assert "SoftmaxBackward" in lowered
    mapped = jax.vmap(both, axis_name=MAPPED)
    lowered = jax.jit(mapped).trace(jax.tree.map(lambda a: jnp.stack([a, a]), given)).lower().as_text()
    assert "__cudnn$fmha" not in lowered


def test_the_check_for_machines_with_kernels_runs_here() -> None:
    found = check_attention(scale=1, width=8)
    assert found.keys() == {"xla"}  # a CPU has no kernel
    assert found["xla"].keys() == cases().keys()
    assert all(0 < error < 0.02 for error in found["xla"].values())


@pytest.mark.parametrize(("length", "keys"), [(1, 7), (256, 356), (1690, 1790), (2048, 2148), (4096, 4096)])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_the_tpu_kernel_divide_what_lengths_are_padded_to(length: int, keys: int, causal: bool) -> None:
    query, kv = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, length, 4, 64), (2, 2, keys, 64)))

    def loss(query: Array, keys: Array, values: Array) -> Array:  # the kernel refuses blocks while it is traced
        return fused("flash", Problem(query, keys, values, None, None, causal)).sum(dtype=jnp.float32)

    gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2)), query, kv, kv)
    assert [g.shape for g in gradients] == [query.shape, kv.shape, kv.shape]


def problem(length: int, keys: int, width: int = 64, dtype: Any = jnp.bfloat16) -> Problem:
    """Returns a problem of zeros."""
    query, kv = jnp.zeros((2, length, 4, width), dtype), jnp.zeros((2, 4, keys, width), dtype)
    return Problem(query, kv, kv, None, None, causal=True)


def test_what_was_asked_for_is_used_where_it_can_compute() -> None:
    long = problem(600, 600)
    assert PAYS <= 600 * 600
    assert choose("auto", long) == "xla"  # on a CPU
    assert choose("flash", long) == "flash"
    assert choose("cudnn", long) == "cudnn"
    assert choose("cudnn", long, bias_rows=1) == "cudnn"
    assert choose("cudnn", long, bias_rows=2) == "xla"
    assert choose("cudnn", problem(600, 600, dtype=jnp.float32)) == "xla"
    assert choose("cudnn", problem(600, 600, width=60)) == "xla"
    assert choose("flash", problem(600, 600, width=160)) == "xla"


@pytest.mark.parametrize(("name", "machine"), [("cudnn", "an NVIDIA GPU"), ("flash", "a TPU")])
def test_a_kernel_that_this_machine_cannot_run_is_refused_in_one_line(name: str, machine: str) -> None:
    with pytest.raises(UserError, match=f"attention '{name}' needs {machine}.* use --attention auto"):
        check_runs_here(name, "bfloat16", 64)
    check_runs_here("auto", "float32", 64)
    check_runs_here("xla", "float32", 64)


@pytest.mark.parametrize("family", TINY)
def test_an_unknown_name_is_answered_with_the_nearest(family: str) -> None:
    with pytest.raises(UserError, match=r"attention 'flush' is not known.*Did you mean 'flash'"):
        TINY[family](attention="flush")


def test_the_kernel_is_no_part_of_which_function_a_backbone_is() -> None:
    assert tiny_llama(attention="flash").fingerprint == tiny_llama().fingerprint
