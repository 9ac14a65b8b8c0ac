"""The counter of compiled programs: against XLA's own where nothing is in a loop, against formulas where much is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from deptjax.methods import DePT
from deptjax.models.prompted import PromptedModel
from deptjax.models.sizes import SIZES
from deptjax.planning.count import Collective, Cost, count
from deptjax.planning.plan import Rows, _batch, abstract_trees
from deptjax.training.step import make_loss

ONE = {"data": 1}


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def both(function: Callable[..., Any], *arguments: Any) -> tuple[Cost, dict[str, float]]:
    """Returns what is counted in a program, and XLA's own analysis of it."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return count(compiled.as_text(), ONE), compiled.cost_analysis()


@pytest.mark.parametrize(
    ("function", "arguments", "flops"),
    [
        (lambda a, b: a @ b, (f32(128, 64), f32(64, 32)), 2 * 128 * 64 * 32),
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (f32(5, 128, 64), f32(5, 32, 64)), 2 * 5 * 128 * 32 * 64),
        (lambda a, b: jnp.einsum("abij,kij->abk", a, b), (f32(3, 5, 16, 8), f32(32, 16, 8)), 2 * 15 * 32 * 128),
    ],
    ids=["matrices", "batched", "two axes contracted"],
)
def test_products_are_those_of_the_formula_and_of_xla(function: Any, arguments: Any, flops: int) -> None:
    counted, own = both(function, *arguments)
    assert counted.flops == {"f32": flops}
    assert own["flops"] == flops
    assert counted.memory_bytes == own["bytes accessed"]


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
        {"window_strides": (2, 2), "padding": [(1, 1), (1, 1)], "lhs_dilation": (1, 2), "rhs_dilation": (2, 1)},
        {"window_strides": (1, 3), "padding": [(2, 0), (0, 2)], "lhs_dilation": (3, 1)},
        {"window_strides": (1, 1), "padding": "VALID", "batch_group_count": 2},
    ],
    ids=["groups", "dilated and strided", "padded", "batch groups"],
)
def test_convolutions_count_what_is_inside_the_window(options: dict[str, Any]) -> None:
    kernel = f32(6, 4 // options.get("feature_group_count", 1), 3, 3)
    counted, own = both(lambda a, k: lax.conv_general_dilated(a, k, **options), f32(2, 4, 9, 8), kernel)
    assert counted.total_flops == own["flops"] > 0


def test_a_loops_body_counts_as_often_as_it_turns() -> None:
    def scanned(a: Any, kernels: Any) -> Any:
        return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), a, kernels)[0]

    def nested(a: Any, kernels: Any) -> Any:
        def body(x: Any, kernel: Any) -> Any:
            return lax.fori_loop(2, 5, lambda _, y: jnp.tanh(y @ kernel), x), None

        return lax.scan(body, a, kernels)[0]

    one = 2 * 128 * 64 * 64
    counted, own = both(scanned, f32(128, 64), f32(7, 64, 64))
    assert counted.total_flops == 7 * one
    assert own["flops"] < 2 * one  # which is why it is counted here
    assert both(nested, f32(128, 64), f32(7, 64, 64))[0].total_flops == 3 * 7 * one
    assert counted.unknown_loops == 0


def test_a_loop_that_does_not_say_how_often_it_turns_is_told_of() -> None:
    def until(a: Any, kernel: Any) -> Any:
        return lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ kernel, a)

    counted, _ = both(until, f32(128, 64), f32(64, 64))
    assert (counted.unknown_loops, counted.total_flops) == (1, 2 * 128 * 64 * 64)


def test_of_two_branches_the_costlier_one_counts() -> None:
    def either(which: Any, a: Any, kernel: Any) -> Any:
        return lax.cond(which, lambda x: jnp.tanh(x @ kernel) @ kernel, lambda x: x @ kernel, a)

    counted, _ = both(either, jax.ShapeDtypeStruct((), bool), f32(128, 64), f32(64, 64))
    assert counted.total_flops == 2 * 2 * 128 * 64 * 64


def test_what_is_only_sliced_is_not_read_whole() -> None:
    def rows(table: Any, start: Any) -> Any:
        return lax.dynamic_slice(table, (start, 0), (2, 64)) + 1.0

    counted, own = both(rows, f32(4096, 64), jax.ShapeDtypeStruct((), jnp.int32))
    assert counted.memory_bytes == pytest.approx(own["bytes accessed"], rel=0.02)
    assert counted.memory_bytes < 4096 * 64 * 4 / 100


def step_cost(layers: int, scan: bool) -> tuple[Cost, dict[str, float]]:
    """Returns what loss and gradient of DePT cost on a narrow LLaMA."""
    config = dataclasses.replace(SIZES["smollm2-135m"], num_layers=layers, vocab_size=2048, scan_layers=scan)
    method = DePT(prompt_length=8, rank=4, max_length=48)
    model = PromptedModel(config.make(method.sites()), method)
    frozen, trainable = abstract_trees(config, model)
    return both(jax.value_and_grad(make_loss(model)), trainable, frozen, _batch(Rows(4, 48, 4), method), None)


def test_a_model_layer_by_layer_costs_what_xla_says() -> None:
    counted, own = step_cost(2, scan=False)
    assert counted.total_flops == pytest.approx(own["flops"], rel=0.02)  # XLA counts elementwise work as well
    assert counted.total_flops <= own["flops"]
    assert counted.memory_bytes == pytest.approx(own["bytes accessed"], rel=0.05)


def test_scanned_layers_cost_what_they_cost_one_by_one() -> None:
    """The difference of two depths is that of two layers, whichever way they run; XLA's own sees none at all."""
    flops = {(layers, scan): step_cost(layers, scan) for layers in (2, 4) for scan in (False, True)}
    one_by_one = flops[4, False][0].total_flops - flops[2, False][0].total_flops
    scanned = flops[4, True][0].total_flops - flops[2, True][0].total_flops
    assert scanned == pytest.approx(one_by_one, rel=1e-6)
    assert flops[4, True][0].memory_bytes > flops[2, True][0].memory_bytes * 1.5
    assert flops[4, True][1]["flops"] == flops[2, True][1]["flops"]


HEAD = "ENTRY %main (a: f32[8,64]) -> f32[8,64] {\n  %a = f32[8,64]{1,0} parameter(0)\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%r = f32[32,64]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}",
            Collective("all-gather", ("fsdp",), 4, 1, 4 * 2048, 3 * 2048),
        ),
        (
            "%r = f32[8,64]{1,0} all-reduce(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add",
            Collective("all-reduce", ("data",), 2, 1, 2048, 2048),
        ),
        (
            "%r = f32[1,64]{1,0} reduce-scatter(%a), replica_groups={}, dimensions={0}, to_apply=%add",
            Collective("reduce-scatter", ("data", "fsdp"), 8, 1, 2048, 2048 * 7 / 8),
        ),
        (
            "%r = f32[8,64]{1,0} all-to-all(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}",
            Collective("all-to-all", ("fsdp",), 4, 1, 2048, 1536),
        ),
        (
            "%r = (f32[8,64]{1,0}, f32[8,64]{1,0}, u32[], u32[]) collective-permute-start(%a), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
            Collective("collective-permute", ("fsdp",), 4, 1, 2048, 2048),
        ),
    ],
    ids=["gather", "reduce", "reduce-scatter", "exchange", "permute"],
)
def test_collectives_and_what_they_send(line: str, expected: Collective) -> None:
    text = f"{HEAD}  {line}\n  ROOT %b = f32[8,64]{{1,0}} copy(%a)\n}}\n"
    assert count(text, {"data": 2, "fsdp": 4}).collectives == (expected,)


def test_a_collective_of_one_device_is_none() -> None:
    text = f"{HEAD}  ROOT %r = f32[8,64]{{1,0}} all-reduce(%a), replica_groups={{{{0}},{{1}}}}, to_apply=%add\n}}\n"
    assert count(text, {"data": 2}).collectives == ()


# The forms in which a TPU's compiler writes things, cut out of its programs.
SPREAD = """
%begin (p: bf16[64,1024]) -> (bf16[64,1024], bf16[64,4096], u32[]) {
  %p = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g1 = bf16[64,4096]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=mesh['a'=4] {'a'}, \
dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[64,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
custom-call(%p, %g1), custom_call_target="AsyncCollectiveStart"
}

%go_on (p: bf16[64,1024], g: bf16[64,4096], x: f32[40,8], k: f32[8,16]) -> (f32[40,16], bf16[64,4096]) {
  %p = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g = bf16[64,4096]{1,0:T(8,128)(2,1)} parameter(1)
  %x = f32[40,8]{1,0:T(8,128)S(1)} parameter(2)
  %k = f32[8,16]{1,0:T(8,128)S(1)} parameter(3)
  %y = f32[40,16]{1,0:T(8,128)S(1)} convolution(%x, %k), dim_labels=bf_io->bf
  %g2 = bf16[64,4096]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=mesh['a'=4] {'a'}, \
dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %t = (f32[40,16]{1,0:T(8,128)S(1)}, bf16[64,4096]{1,0:T(8,128)(2,1)}) tuple(%y, %g2)
}

ENTRY %main (p: bf16[64,1024], x: f32[40,8], k: f32[8,16]) -> f32[40,16] {
  %p = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %x = f32[40,8]{1,0:T(8,128)S(1)} parameter(1)
  %k = f32[8,16]{1,0:T(8,128)S(1)} parameter(2)
  %s = (bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[64,4096]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%p), \
kind=kCustom, calls=%begin
  %own = bf16[64,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=0
  %all = bf16[64,4096]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %w = (f32[40,16]{1,0:T(8,128)S(1)}, bf16[64,4096]{1,0:T(8,128)(2,1)}) fusion(%own, %all, %x, %k), \
kind=kCustom, calls=%go_on
  ROOT %r = f32[40,16]{1,0:T(8,128)S(1)} get-tuple-element(%w), index=0
}
"""


def test_a_collective_spread_over_several_fusions_is_one() -> None:
    counted = count(SPREAD, {"fsdp": 4})
    assert counted.collectives == (Collective("all-gather", ("fsdp",), 4, 1, 64 * 4096 * 2, 64 * 3072 * 2),)
    assert counted.total_flops == 2 * 40 * 8 * 16


SCATTERED = """
%scatter (input: f32[64,4096]) -> f32[64,1024] {
  %input = f32[64,4096]{1,0} parameter(0)
  %reduced = f32[64,4096]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %own = f32[64,1024]{1,0} dynamic-slice(%reduced, %zero, %zero), dynamic_slice_sizes={64,1024}
}

ENTRY %main (a: f32[64,4096]) -> f32[64,1024] {
  %a = f32[64,4096]{1,0} parameter(0)
  ROOT %f = f32[64,1024]{1,0} fusion(%a), kind=kCustom, calls=%scatter
}
"""


def test_a_reduction_that_is_only_sliced_is_a_reduce_scatter() -> None:
    nbytes = 64 * 4096 * 4
    (found,) = count(SCATTERED, {"fsdp": 4}).collectives
    assert found == Collective("reduce-scatter", ("fsdp",), 4, 1, nbytes, nbytes * 3 / 4)


COUNTED = """
%fused_add (p: s32[], q: s32[]) -> s32[] {
  %p = s32[]{:T(128)} parameter(0)
  %q = s32[]{:T(128)} parameter(1)
  ROOT %sum = s32[]{:T(128)} add(%p, %q)
}

%condition (t: (s32[], f32[8,8])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(32)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} fusion(%i, %two), kind=kLoop, calls=%fused_add
  %y = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), dim_labels=bf_io->bf
  ROOT %out = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%next, %y)
}

ENTRY %main (x: f32[8,8]) -> (s32[], f32[8,8]) {
  %x = f32[8,8]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(4)
  %copied = s32[]{:T(128)} copy(%start)
  %init = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%copied, %x)
  ROOT %loop = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
}
"""


def test_the_turns_of_a_loop_are_read_from_its_counter() -> None:
    """From 4 by 2 up to 32: 14 turns."""
    counted = count(COUNTED, ONE)
    assert (counted.total_flops, counted.unknown_loops) == (14 * 2 * 8**3, 0)


def test_a_batched_product_as_a_tpu_writes_it() -> None:
    """Eight products of (40, 128) and (128, 40), as one convolution in which most of the window is padding."""
    text = """
ENTRY %main (q: bf16[8,40,128], k: bf16[8,40,128]) -> f32[8,40,40] {
  %q = bf16[8,40,128]{2,1,0} parameter(0)
  %k = bf16[8,40,128]{2,1,0} parameter(1)
  ROOT %s = f32[8,40,40]{1,2,0} convolution(%q, %k), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf
}
"""
    assert count(text, ONE).flops == {"bf16": 2 * 8 * 40 * 40 * 128}


def test_on_chip_memory_is_not_main_memory() -> None:
    text = """
%add (p: f32[64,128], q: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %q = f32[64,128]{1,0} parameter(1)
  ROOT %sum = f32[64,128]{1,0} add(%p, %q)
}

ENTRY %main (a: f32[64,128]) -> f32[64,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %near = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %f = f32[64,128]{1,0:T(8,128)} fusion(%near, %near), kind=kLoop, calls=%add
}
"""
    assert count(text, ONE).memory_bytes == 2 * 64 * 128 * 4  # read once by the copy, written once by the sum


def test_products_that_a_library_computes() -> None:
    text = """
ENTRY %main (a: bf16[64,128], b: bf16[128,32]) -> bf16[64,32] {
  %a = bf16[64,128]{1,0} parameter(0)
  %b = bf16[128,32]{1,0} parameter(1)
  %g = (bf16[64,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %r = bf16[64,32]{1,0} get-tuple-element(%g), index=0
}
"""
    assert count(text, ONE).flops == {"bf16": 2 * 64 * 128 * 32}


def test_kernels_that_tell_what_they_compute_and_others() -> None:
    call = 'custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv"'
    told = f'{call},"cost_estimate":{{"flops":"270008320","transcendentals":"524288","bytes_accessed":"8388608"}}}}}}'
    text = f"{HEAD}  %k = f32[8,64]{{1,0}} {told}\n  ROOT %b = f32[8,64]{{1,0}} {call}}}}}\n}}\n"
    counted = count(text, ONE)
    assert (counted.total_flops, counted.unknown_kernels) == (270008320, 1)


def test_a_text_that_is_no_program() -> None:
    with pytest.raises(ValueError, match=r"no ENTRY computation; give compiled\.as_text\(\)"):
        count("HloModule nothing", ONE)
