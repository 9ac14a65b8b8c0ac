"""What `gpu.py` measures on one GPU: the models, the methods, the shapes, and who takes turns with whom.

Nothing here imports jax or torch: the process that leads holds neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.cases import MAX_LENGTH, SIZES, Contest, Entrant

TOKENS = 16384  # source tokens of a step
METHODS = ("dept20", "dept40", "pt100", "lora8")
# Rows by source tokens, in order of size. Full fine-tuning of the 7B size needs 16 bytes a parameter, 108 GB, before
# there is any activation: it is not planned.
PLAN: dict[str, tuple[tuple[tuple[int, int], ...], tuple[str, ...]]] = {
    "t5-base": (((64, 256),), (*METHODS, "full")),
    "t5-large": (((64, 256),), (*METHODS, "full")),
    "t5-3b": (((64, 256),), (*METHODS, "full")),
    "llama2-7b": (((64, 256), (8, 2048)), METHODS),
}
QUICK: dict[str, tuple[tuple[tuple[int, int], ...], tuple[str, ...]]] = {
    "t5-tiny": (((2, 8),), ("dept20", "full")),
    "llama-tiny": (((2, 8),), ("lora8",)),
}
# Steps of a turn, so that a turn takes a few tenths of a second and what a turn costs itself is lost in it.
STEPS_A_TURN = {"t5-base": 16, "t5-large": 6, "t5-3b": 2}
SCANNED = ("t5-large", "t5-3b", "llama2-7b")  # 24 layers and more compile as one
APART = ("t5-3b", "llama2-7b")  # a side fills the card: the sides run one behind the other


@dataclasses.dataclass(frozen=True)
class Sides:
    """Who takes part: deptjax once for each implementation of attention and each policy, torch when it is there.

    `attentions` names those of deptjax, `None` for the library's default.
    """

    device: str
    attentions: tuple[str | None, ...] = (None,)
    remats: tuple[str, ...] = ("none",)
    torch: bool = True


def contests(sides: Sides, *, quick: bool = False, rounds: int | None = None) -> list[Contest]:
    """Returns what is to be measured, the smaller models first: one contest for each model, shape and method.

    Args:
      sides: who takes part.
      quick: tiny models, to see that everything works; the numbers mean nothing.
      rounds: turns of each entrant; `None` for the number of the model.
    """
    return [
        Contest("gpu", f"{model} {batch}x{source} {method}", _entrants(model, batch, source, method, sides), turns)
        for model, (shapes, methods) in (QUICK if quick else PLAN).items()
        for turns in [SIZES[model].pairs if rounds is None else rounds]
        for batch, source in shapes
        for method in methods
    ]


def waves(contest: Contest) -> list[tuple[Entrant, ...]]:
    """Returns the entrants in the groups in which they are on the card together."""
    if contest.entrants[0].model in APART:
        return [(entrant,) for entrant in contest.entrants]
    return [contest.entrants]


def _entrants(model: str, batch: int, source: int, method: str, sides: Sides) -> tuple[Entrant, ...]:
    base = Entrant(
        "deptjax",
        model,
        method,
        batch,
        source,
        8 if SIZES[model].family == "t5" else 1,
        scan=model in SCANNED,
        batches=STEPS_A_TURN.get(model, 1),
        device=sides.device,
        dtype="bfloat16",
        max_length=max(source, MAX_LENGTH),
    )
    ours: Sequence[Entrant] = [
        dataclasses.replace(base, attention=attention, remat=remat)
        for attention in sides.attentions
        for remat in sides.remats
    ]
    eager = dataclasses.replace(base, side="torch", scan=False, attention="sdpa")
    theirs = (eager, dataclasses.replace(eager, compiled=True)) if sides.torch else ()
    return (*ours, *theirs)
