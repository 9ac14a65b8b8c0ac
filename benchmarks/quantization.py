"""What quantised frozen weights cost in quality, and what they take: SmolLM2-135M on held-out texts.

    python benchmarks/quantization.py                                          # 34 minutes on two busy cores
    python benchmarks/quantization.py --table --write-page benchmarks/README.md         # the table of the last run

For each way to keep and compute the weights: the loss, in nats a token, of every token behind the first of the test
texts of packaged sets (movie reviews' sentences, then TREC's questions), each cut at 128 tokens, as many of each as
hold `--tokens` tokens; the seconds of a forward pass over a batch of 8 x 128 of these tokens, logits of all positions
included, layers scanned, the median of `--rounds` in which all ways take turns; the bytes of the weights.

The loss needs no label and no template, so it is the model's own. In two more rows a quantised copy of the tied
embedding table is the head, to see what quantising a head costs; the copy is among their bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.command import Benchmark, save, say  # noqa: E402
from benchmarks.worker import OtherWork  # noqa: E402
from deptjax.data.tasks import get_task  # noqa: E402
from deptjax.errors import UserError  # noqa: E402
from deptjax.interop.load import load_backbone  # noqa: E402
from deptjax.models.backbone import Backbone  # noqa: E402
from deptjax.quantization import SCHEMES, quantize_kernel  # noqa: E402
from deptjax.typing import Array, Tree  # noqa: E402

Record = dict[str, Any]
MODEL = "packaged:smollm2-135m-instruct"
SETS = {"movie_sentiment": "text", "trec6": "question"}  # the column of the text
BATCH, LENGTH = 8, 128
WIDTHS = (16, 32, LENGTH)  # that texts are padded to


@dataclasses.dataclass(frozen=True)
class Way:
    """How the weights are kept and computed; `head` is the scheme of a copy of the table that is the head."""

    dtype: str
    quantize: str | None = None
    head: str | None = None

    @property
    def title(self) -> str:
        """Returns the row's name."""
        return f"{self.quantize or 'not quantised'}{f', a head in {self.head}' if self.head else ''}"


WAYS = (
    Way("float32"),
    Way("bfloat16"),
    *(Way(dtype, scheme) for dtype in ("float32", "bfloat16") for scheme in SCHEMES),
    *(Way("float32", "nf4", head) for head in ("int8", "nf4")),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = QUANTIZATION.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=5000, help="of each set, at least (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed forward passes (default %(default)s)")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> Record:
    """Measures all ways, writes the results and returns them."""
    tokenizer = load_backbone(MODEL, dtype="bfloat16").tokenizer
    texts = {name: first_texts(name, tokenizer, options.tokens) for name in SETS}
    everything = np.concatenate([np.concatenate(rows) for rows in texts.values()])
    batch = jnp.asarray(np.resize(everything, (BATCH, LENGTH)))
    rows: list[Record] = []
    passes: list[Callable[[], Any]] = []
    with OtherWork() as others:
        for way in WAYS:
            backbone = make_backbone(way)
            losses = {name: loss(backbone, rows_of) for name, rows_of in texts.items()}
            rows.append({**dataclasses.asdict(way), "losses": losses, "nbytes": backbone.nbytes})
            passes.append(forward_pass(backbone, batch))
            say(f"{way} {losses} {backbone.nbytes}")
        for way, seconds in zip(rows, in_turn(passes, options.rounds), strict=True):
            way["seconds"] = seconds
    results = {
        "model": MODEL,
        "texts": {name: len(own) for name, own in texts.items()},
        "tokens": {name: sum(len(row) - 1 for row in own) for name, own in texts.items()},
        "batch": [BATCH, LENGTH],
        "rounds": options.rounds,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].platform}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "qwix")},
        "others": others.share,
        "rows": rows,
    }
    save(options.output, results)
    return results


def first_texts(name: str, tokenizer: Any, tokens: int) -> list[np.ndarray]:
    """Returns the first test texts of a packaged set, as at most `LENGTH` token ids each, that hold so many in all."""
    chosen: list[np.ndarray] = []
    for row in get_task(name).load().test:
        ids = np.asarray(tokenizer(str(row.values[SETS[name]]), add_special_tokens=False).input_ids, np.int32)[:LENGTH]
        if len(ids) > 1:
            chosen.append(ids)
        if sum(map(len, chosen)) >= tokens:
            return chosen
    raise UserError(f"--tokens is {tokens}, but the test texts of '{name}' have {sum(map(len, chosen))}; ask for less")


def make_backbone(way: Way) -> Backbone:
    """Returns the model as a way has it."""
    backbone = load_backbone(MODEL, dtype=way.dtype, quantize=way.quantize, scan_layers=True)
    if way.head is None:
        return backbone
    head = {"kernel": quantize_kernel(backbone.embedding.T, way.head)}
    config = dataclasses.replace(backbone.config, tied=False)
    return dataclasses.replace(backbone, config=config, params={**backbone.params, "logits_dense": head})


def all_logits(backbone: Backbone) -> Callable[[Tree, Array], Array]:
    """Returns the jitted function from tokens (B, T) to float32 logits (B, T - 1, V) of those behind the first."""
    module = backbone.module()

    def run(params: Tree, tokens: Array) -> Array:
        def body(model: Any) -> Array:
            source, mask = model.embed(tokens[:, :1]), jnp.ones((len(tokens), 1), bool)
            return model.head(model.target_states(source, mask, None, tokens[:, 1:]))

        return module.apply({"params": params}, method=body)

    return jax.jit(run)


def loss(backbone: Backbone, rows: list[np.ndarray]) -> float:
    """Returns the mean negative log likelihood, in nats, of the tokens behind the first one of each row."""
    logits = all_logits(backbone)

    @jax.jit
    def nats(params: Tree, tokens: Array, real: Array) -> Array:
        chances = jax.nn.log_softmax(logits(params, tokens))
        chosen = jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(real[:, 1:], chosen, 0.0))

    by_length, total = sorted(rows, key=len), 0.0
    for start in range(0, len(rows), BATCH):
        group = by_length[start : start + BATCH]
        width = min(width for width in WIDTHS if width >= max(map(len, group)))
        tokens, real = np.zeros((BATCH, width), np.int32), np.zeros((BATCH, width), bool)
        for at, row in enumerate(group):
            tokens[at, : len(row)], real[at, : len(row)] = row, True
        total += float(nats(backbone.params, tokens, real))
    return total / sum(len(row) - 1 for row in rows)


def forward_pass(backbone: Backbone, batch: Array) -> Callable[[], Any]:
    """Returns a forward pass over a batch that has been compiled and run once."""
    logits = all_logits(backbone)

    def run() -> Any:
        return jax.block_until_ready(logits(backbone.params, batch))

    run()
    return run


def in_turn(passes: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Returns the median seconds of each pass; all take one in every round, so that other work falls on all alike."""
    seconds: list[list[float]] = [[] for _ in passes]
    for _ in range(rounds):
        for own, run in zip(seconds, passes, strict=True):
            began = time.perf_counter()
            run()
            own.append(time.perf_counter() - began)
    return [statistics.median(own) for own in seconds]


def markdown(results: Record) -> str:
    """Returns the table, losses beside their difference from those of the first row."""
    first, sets = results["rows"][0], list(results["tokens"])
    told = ", ".join(f"{results['tokens'][name]:,} tokens of {results['texts'][name]} `{name}` texts" for name in sets)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"{results['model']}; {told}; forward {results['batch'][0]} x {results['batch'][1]}, median of "
        f"{results['rounds']}; {results['machine']}; {versions}; {results['date']}; other work "
        f"{results['others']:.0%} of the machine.",
        "",
        f"| weights | computed in | {' | '.join(f'{name}, nats a token' for name in sets)} | weights, MB | forward |",
        f"| --- | --- | {' | '.join('---' for _ in sets)} | --- | --- |",
    ]
    for row in results["rows"]:
        way = Way(row["dtype"], row["quantize"], row["head"])
        cells = [f"{row['losses'][n]:.4f} ({row['losses'][n] - first['losses'][n]:+.4f})" for n in sets]
        lines.append(
            f"| {way.title} | {way.dtype} | {' | '.join(cells)} | {row['nbytes'] / 1e6:.0f} | {row['seconds']:.2f} s |"
        )
    return "\n".join(lines)


QUANTIZATION = Benchmark("quantization", measure, markdown)

if __name__ == "__main__":
    sys.exit(QUANTIZATION.run(parse(None)))
