"""What `decode.py` measures: models, sources, and the ways of decoding that take their turns. Imports no framework."""

from __future__ import annotations

import dataclasses

from benchmarks.cases import SIZES

BATCH, NEW_TOKENS, TASKS = 8, 20, 8
TITLES = {
    "none": "no prompt",
    "pt100": "prompt tuning, 100 vectors",
    "dept20": "DePT m=20",
    "dept20 mixed": f"DePT m=20, {TASKS} tasks in the batch",
    "pt100 mixed": f"prompt tuning, 100 vectors, {TASKS} tasks in the batch",
}
MIXED = " mixed"


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One side decoding with one method, in a process of its own.

    Attributes:
      side: `deptjax` or `torch`.
      model: a key of `SIZES`.
      method: a key of `TITLES`; one that is mixed gives each row a task of its own, which torch's libraries cannot.
      source: source tokens.
      batch, new_tokens: rows, and tokens that each gets, no end token counting as one.
    """

    side: str
    model: str
    method: str
    source: int
    batch: int = BATCH
    new_tokens: int = NEW_TOKENS

    @property
    def name(self) -> str:
        """What tells it from the others of its contest."""
        return f"{self.side} {self.method}"


@dataclasses.dataclass(frozen=True)
class Contest:
    """Decoders that take turns."""

    model: str
    source: int
    rounds: int
    decoders: tuple[Decoder, ...]

    @property
    def key(self) -> str:
        """The name under which its result is kept."""
        return f"{self.model} source {self.source}"


def contests(*, quick: bool = False, rounds: int | None = None) -> list[Contest]:
    """Returns what is to be measured; with `quick` tiny models, to see that everything works."""
    found = []
    for model in ("t5-tiny", "llama-tiny") if quick else ("t5-small", "smollm2-135m"):
        for source in (8,) if quick else (64, 256):
            both = [(side, m) for m in ("none", "pt100", "dept20") for side in ("deptjax", "torch")]
            ours = [("deptjax", "dept20 mixed"), ("deptjax", "pt100 mixed")]
            sizes = {"batch": 4, "new_tokens": 3} if quick else {}
            decoders = tuple(Decoder(side, model, method, source, **sizes) for side, method in [*both, *ours])
            found.append(Contest(model, source, rounds or SIZES[model].pairs, decoders))
    return found
