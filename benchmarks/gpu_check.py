"""Are the numbers right on this device? Each check prints its figure, the bound, and what was compared with what.

    python benchmarks/gpu.py --check            # on the GPU
    python benchmarks/gpu.py --check --quick    # tiny models, on the CPU: only the ways are compared, not the devices

- **float32** logits and gradients of what is trained, products at the highest precision: the device against the CPU.
- **bfloat16** ones: the device against the CPU in float32, on the same rounded weights.
- **attention**: every implementation that this machine has against the formula (`benchmarks.attention`).
- **population**: a step of three members at once against each one's own.
- **decoding**: greedy tokens of the device against those of the CPU, in float32.

An error is the greatest difference in an array, as a share of the array's greatest number; that of a tree is its worst.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import check_attention
from benchmarks.cases import SIZES, Entrant, Size
from benchmarks.jax_side import cheap_params, make_config, make_method, random_batch
from benchmarks.matmul import check_device
from deptjax.inference.decoding import Decoding
from deptjax.inference.generate import generate
from deptjax.inference.rows import Rows
from deptjax.methods import Vocabulary
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.training.optim import make_optimizer
from deptjax.training.population_loop import member_of, stack_states
from deptjax.training.state import TrainState
from deptjax.training.step import Traits, make_loss, make_population_step, make_update
from deptjax.typing import Tree

TINY, SMALL = ("t5-tiny", "llama-tiny"), ("t5-small", "smollm2-135m")
METHODS = ("dept20", "lora8")
EXACT = 1e-4  # of float32: rounding, and sums in another order
# Of bfloat16, whose numbers have 8 bits: each is off by up to 0.4 %, and layers add up, forward and then backward. The
# CPU's own bfloat16 is off by up to 2 % in logits and 14 % in the worst of LoRA's factors.
ROUNDED = {"logits": 0.05, "gradients": 0.2}
NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found: an error that may be at most `bound`; `compared` says of what with what."""

    name: str
    error: float
    bound: float
    compared: str

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound; one that is not a number is not."""
        return self.error <= self.bound

    def __str__(self) -> str:
        verdict = "ok   " if self.holds else "WRONG"
        return f"{verdict} {self.name}: {self.error:.1e}, at most {self.bound:.0e}; {self.compared}"


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each check. Returns 1 when one does not hold or could not be made, 2 without the device."""
    parser = argparse.ArgumentParser("gpu_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny models alone")
    options = parser.parse_args(argv)
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    try:
        check_device(options.device)
    except RuntimeError as error:
        print(f"gpu: error: --device {options.device}: {error}; add --device {device.platform}", file=sys.stderr)
        return 2
    same = " (the same device: parity says nothing)" if device == host else ""
    print(f"device: {device.device_kind}, jax {jax.__version__}; reference: {host.device_kind}{same}", flush=True)
    wrong = 0
    for check in checks(TINY if options.quick else (*TINY, *SMALL), device, host):
        try:
            findings = check()
        except Exception as error:  # the other checks still say something
            wrong += 1
            print(f"WRONG {check}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        for finding in findings:
            wrong += not finding.holds
            print(finding, flush=True)
    print("all checks hold" if not wrong else f"{wrong} checks do not hold")
    return 1 if wrong else 0


class Check:
    """A check that can be named before it is made."""

    def __init__(self, function: Callable[..., list[Finding]], *args: Any):
        self._name, self._call = function.__name__, functools.partial(function, *args)
        self._args = [str(arg) for arg in args if isinstance(arg, (str, Case))]

    def __call__(self) -> list[Finding]:
        return self._call()

    def __str__(self) -> str:
        return " ".join([self._name, *self._args])


def checks(models: tuple[str, ...], device: Any, host: Any) -> Iterator[Check]:
    """Yields all checks, the cheap ones first."""
    for name in models:
        for method in METHODS:
            yield Check(parity, Case(name, method), device, host)
    yield Check(attention)
    for name in TINY:
        yield Check(population, Case(name, "dept20"), device)
    for name in models:
        yield Check(decoding, Case(name, "dept20"), device, host)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a method, every number of them random, drawn on the host alike for all devices."""

    name: str
    method: str

    def __str__(self) -> str:
        return f"{self.name} {self.method}"

    @property
    def size(self) -> Size:
        """The shape of the model."""
        return SIZES[self.name]

    def model(self, **computed: Any) -> PromptedModel:
        """Returns the model, computed as these fields of the config say."""
        config = make_config(self.size, scan=True, **computed)
        return PromptedModel.build(Backbone(self.name, config, {}, None), make_method(self.method))

    @functools.cached_property
    def frozen(self) -> Tree:
        """The weights, float32, rounded to bfloat16.

        T5 does not divide scores by the root of the head width, its trained queries are smaller by as much. Without
        that every softmax would be a maximum, and rounding would decide which.
        """

        def leaf(path: tuple[Any, ...], array: jax.Array) -> np.ndarray:
            small = self.size.family == "t5" and any(part.key == "query" for part in path)
            array = array * self.size.head_dim**-0.5 if small else array
            return jax.device_get(array.astype(jnp.bfloat16).astype(jnp.float32))

        return jax.tree_util.tree_map_with_path(leaf, cheap_params(make_config(self.size, scan=True)))

    @functools.cached_property
    def trainable(self) -> Tree:
        """What is trained, no part of it zero: a pair that begins with a zero would hide the gradient of the other."""
        vocabulary = Vocabulary(jnp.asarray(self.frozen["token_embedder"]["embedding"]), None)
        trainable, _ = self.model().init(jax.random.key(0), self.frozen, vocabulary)
        random = np.random.default_rng(2)
        return jax.tree.map(lambda a: np.asarray(a) + 0.05 * random.standard_normal(a.shape, np.float32), trainable)

    def batch(self, rows: int = 3, seed: int = 1) -> Tree:
        """Returns a batch whose last row has padding."""
        entrant = Entrant("deptjax", self.name, self.method, rows, 24, 4)
        batch = random_batch(entrant, self.size, seed)
        batch["source_mask"][-1, 15:] = False
        return batch


def parity(case: Case, device: Any, host: Any) -> list[Finding]:
    """Compares logits and gradients of the device with float32 ones of the host."""
    exact = _numbers(case, host, "float32", attention="xla")
    found = []
    for dtype, bounds in (("float32", dict.fromkeys(ROUNDED, EXACT)), ("bfloat16", ROUNDED)):
        ours = _numbers(case, device, dtype)
        compared = f"{device.platform} in {dtype} against {host.platform} in float32"
        for (name, bound), own, wanted in zip(bounds.items(), ours, exact, strict=True):
            found.append(Finding(f"{dtype} {name}, {case}", error_of(own, wanted), bound, compared))
    return found


def _numbers(case: Case, device: Any, dtype: str, **computed: Any) -> tuple[Tree, Tree]:
    """Returns the logits and the gradients of what is trained."""
    model = case.model(dtype=dtype, **computed)
    loss = make_loss(model)

    @jax.jit
    def both(trainable: Tree, frozen: Tree, batch: Tree) -> tuple[Tree, Tree]:
        logits = model.target_logits(trainable, frozen, batch)
        return logits, jax.grad(loss)(trainable, frozen, batch, None)

    frozen = jax.tree.map(lambda a: a.astype(dtype), case.frozen)
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        result: tuple[Tree, Tree] = jax.device_get(
            both(*jax.device_put((case.trainable, frozen, case.batch()), device))
        )
    return result


def attention() -> list[Finding]:
    """Compares all implementations of attention that this machine has with the formula in float32."""
    return [
        Finding(f"attention {implementation}, {name}", error, 0.02, "bfloat16 against the formula in float32")
        for implementation, errors in check_attention().items()
        for name, error in errors.items()
    ]


def population(case: Case, device: Any) -> list[Finding]:
    """Compares two steps of three members at once with the two steps of each alone, in float32 on the device."""
    members, steps = 3, 2
    model = case.model()
    groups = model.method.groups(case.trainable)
    peaks = [dict.fromkeys(set(jax.tree.leaves(groups)), rate) for rate in (1e-3, 3e-4, 2e-3)]

    def optimizer(rates: dict[str, Any]) -> Any:
        return make_optimizer({name: lambda step, rate=rate: rate for name, rate in rates.items()}, groups)

    with jax.default_device(device), jax.default_matmul_precision("highest"):
        frozen = jax.device_put(case.frozen, device)
        trainable = jax.tree.map(jnp.asarray, case.trainable)
        batches = [jax.tree.map(jnp.asarray, case.batch(seed=seed)) for seed in range(members)]
        keys = jax.random.split(jax.random.key(3), members)
        states = [TrainState.create(trainable, optimizer(own), key) for own, key in zip(peaks, keys, strict=True)]
        rates = {name: jnp.asarray([own[name] for own in peaks], jnp.float32) for name in peaks[0]}
        traits = Traits(rates, None, None, jnp.ones(members, bool))
        stacked, step = stack_states(states), make_population_step(model, optimizer)
        together = jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches)
        for _ in range(steps):
            stacked, _ = step(stacked, frozen, together, traits)

        @jax.jit
        def one(state: TrainState, batch: Tree, rates: dict[str, Any]) -> TrainState:
            return make_update(make_loss(model), optimizer(rates))(state, frozen, batch)[0]

        alone = []
        for state, batch, own in zip(states, batches, peaks, strict=True):
            for _ in range(steps):
                state = one(state, batch, jax.tree.map(jnp.float32, own))
            alone.append(state.trainable)
        worst = error_of([member_of(stacked.trainable, number) for number in range(members)], alone)
    name = f"population of {members}, {steps} steps, {case}"
    return [Finding(name, worst, EXACT, f"all at once against each alone, both on {device.platform}, float32")]


def decoding(case: Case, device: Any, host: Any) -> list[Finding]:
    """Compares the tokens of greedy decoding on the device with the host's; the error is the share that differs."""
    ours, wanted = (_decoded(case, where) for where in (device, host))
    compared = f"{wanted.size} tokens of {device.platform} against those of {host.platform}, float32"
    return [Finding(f"greedy decoding, {case}", float(np.mean(ours != wanted)), 0.0, compared)]


class _NoTokenizer:
    """What `generate` asks of a tokenizer, where no token is an end token."""

    eos_token_id = None
    pad_token_id = 0


def _decoded(case: Case, device: Any) -> np.ndarray:
    model, batch = case.model(), case.batch()
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        trainable, frozen = jax.device_put((case.trainable, case.frozen), device)
        rows = Rows.shared(model, trainable, frozen)
        source, mask = jax.device_put((batch["source"], batch["source_mask"]), device)
        decoding = Decoding(max_new_tokens=NEW_TOKENS)
        decoded = generate(model, frozen, rows, source, mask, decoding, _NoTokenizer(), eos_ids=())
        return np.asarray(jax.device_get(decoded).tokens)


def error_of(ours: Tree, wanted: Tree) -> float:
    """Returns the greatest difference in any array of a tree, as a share of that array's greatest number.

    >>> error_of({"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 4.0])})
    0.5
    """
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
    errors = [np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b)) for a, b in pairs]
    return float(np.max(errors))  # which a number that is none does not leave


if __name__ == "__main__":
    sys.exit(main())
