"""What is measured: the models, the methods, the shapes, and which of them take their steps in turn.

Nothing here imports jax or torch: the process that leads the comparison holds neither.
"""

from __future__ import annotations

import dataclasses

MAX_LENGTH = 256  # rows of DePT's A, and what the authors' code pads every text to
BUDGET = 100  # prompt vectors whose parameters a method may spend
SECTIONS = ("train", "short", "shared", "buckets")


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape of a model; `layers` is that of each stack, `pairs` how many rounds of steps its rows get.

    `tied` says whether the head is the embedding; `tests/benchmarks_test.py` holds the shapes to the published ones.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    pairs: int
    tied: bool = True


SIZES = {
    "t5-small": Size("t5", 32128, 512, 6, 8, 8, 64, 2048, 7),
    "t5-base": Size("t5", 32128, 768, 12, 12, 12, 64, 3072, 5),
    "t5-large": Size("t5", 32128, 1024, 24, 16, 16, 64, 4096, 5),
    "t5-3b": Size("t5", 32128, 1024, 24, 32, 32, 128, 16384, 5),
    "smollm2-135m": Size("llama", 49152, 576, 30, 9, 3, 64, 1536, 5),
    "llama2-7b": Size("llama", 32000, 4096, 32, 32, 32, 128, 11008, 5, tied=False),
    "t5-tiny": Size("t5", 512, 32, 2, 2, 2, 16, 64, 2),
    "llama-tiny": Size("llama", 512, 32, 2, 2, 1, 16, 64, 2),
}
TITLES = {
    "full": "full fine-tuning",
    "pt100": "prompt tuning, 100 vectors",
    "lora8": "LoRA r=8 (query, value)",
    "dept20": "DePT m=20",
    "dept40": "DePT m=40",
    "dept60": "DePT m=60",
}


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One side with one method, in a process of its own.

    Attributes:
      side: `deptjax` or `torch`.
      model, method: keys of `SIZES` and `TITLES`.
      batch, source, target: rows, source tokens, target tokens.
      share_prompt: deptjax on causal models: one prompt stream a batch, or a copy in every row.
      scan: deptjax: layers scanned rather than unrolled.
      text: a real data set to take batches from instead of random tokens (`synthetic` needs no download).
      padding: of `text`: `buckets`, or `max` for everything to `MAX_LENGTH`.
      batches: batches a timed turn goes through, one behind the other; without `text` all are the same one.
      device: `cpu` or `gpu`.
      dtype: of frozen weights and of the computation; what is trained is float32.
      compiled: torch: with `torch.compile`.
      attention: the implementation of attention by the side's own name for it, or its default.
      remat: deptjax: what layers keep for the gradient (`deptjax.models.remat`).
      max_length: rows of DePT's A.
    """

    side: str
    model: str
    method: str
    batch: int
    source: int
    target: int
    share_prompt: bool = True
    scan: bool = False
    text: str | None = None
    padding: str = "max"
    batches: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    attention: str | None = None
    remat: str = "none"
    max_length: int = MAX_LENGTH

    @property
    def name(self) -> str:
        """What tells it from the others of its contest."""
        kinds = (
            self.padding if self.text else "",
            "" if self.share_prompt else "copied",
            "compiled" if self.compiled else "",
            f"attention={self.attention}" if self.attention else "",
            "" if self.remat == "none" else f"remat={self.remat}",
        )
        return " ".join(filter(None, (self.side, self.method, *kinds)))


@dataclasses.dataclass(frozen=True)
class Contest:
    """Entrants that take their steps in turn, so that what else the machine does falls on all of them alike."""

    section: str
    title: str
    entrants: tuple[Entrant, ...]
    rounds: int

    @property
    def key(self) -> str:
        """The name under which its result is kept."""
        return f"{self.section} {self.title}"

    @property
    def weight(self) -> float:
        """A guess of how long it takes beside the others, for the time left: multiplications, and the start."""
        total = 0.0
        for entrant in self.entrants:
            size = SIZES[entrant.model]
            tokens = entrant.batch * (entrant.source + vectors(entrant.method))
            parameters = size.layers * size.width * (4 * size.width + 3 * size.mlp)
            total += (self.rounds + 3) * tokens * parameters * 4 + 1e12
        return total


def vectors(method: str) -> int:
    """Returns M, the prompt vectors of a method: 0 for those that have none.

    >>> vectors("dept20"), vectors("lora8")
    (20, 0)
    """
    return int("".join(c for c in method if c.isdigit())) if method.startswith(("pt", "dept")) else 0


def dept_rank(method: str, width: int, max_length: int = MAX_LENGTH) -> int:
    """Returns R, the largest rank whose parameters fit the budget, s being `max_length`: m D + R (s + D) <= 100 D.

    Shi and Lipani 2024 (arXiv 2309.05173), section 2.2.

    >>> dept_rank("dept40", 768)
    45
    """
    return (BUDGET - vectors(method)) * width // (max_length + width)


def contests(sections: tuple[str, ...], *, quick: bool = False, steps: int | None = None) -> list[Contest]:
    """Returns what is to be measured in these sections, in order.

    Args:
      sections: some of `SECTIONS`.
      quick: tiny models, to see that everything works; the numbers mean nothing.
      steps: rounds of every contest of `train`, `short` and `shared`; `None` for the number of its model.
    """
    makers = {"train": _train, "short": _short, "shared": _shared, "buckets": _buckets}
    found = [contest for section in SECTIONS if section in sections for contest in makers[section](quick)]
    if steps is None:
        return found
    return [
        contest if contest.section == "buckets" else dataclasses.replace(contest, rounds=steps) for contest in found
    ]


def with_scan(contest: Contest) -> Contest:
    """Returns the contest with deptjax's layers scanned."""
    entrants = tuple(dataclasses.replace(entrant, scan=entrant.side == "deptjax") for entrant in contest.entrants)
    return dataclasses.replace(contest, entrants=entrants)


def _both(model: str, methods: tuple[str, ...], batch: int, source: int) -> tuple[Entrant, ...]:
    target = 8 if SIZES[model].family == "t5" else 1
    return tuple(
        Entrant(side, model, method, batch, source, target) for method in methods for side in ("deptjax", "torch")
    )


def _train(quick: bool) -> list[Contest]:
    if quick:
        plan: dict[str, list[tuple[str, ...]]] = {"t5-tiny": [("pt100", "dept20")], "llama-tiny": [("full",)]}
    else:
        # Prompt tuning and DePT in turn: their ratio is one of the aims. The rest in pairs, to need less memory.
        methods: list[tuple[str, ...]] = [("pt100", "dept20"), ("dept40",), ("dept60",), ("lora8",), ("full",)]
        plan = dict.fromkeys(("t5-small", "t5-base"), methods)
        plan["smollm2-135m"] = [("pt100",), ("dept20",), *methods[1:]]
    batch, source = (2, 16) if quick else (4, MAX_LENGTH)
    return [
        Contest("train", f"{model} {'+'.join(group)}", _both(model, group, batch, source), SIZES[model].pairs)
        for model, groups in plan.items()
        for group in groups
    ]


def _short(quick: bool) -> list[Contest]:
    batch, source = (2, 8) if quick else (4, 64)
    models = ("t5-tiny",) if quick else ("t5-small", "t5-base")
    groups: list[tuple[str, ...]] = [("pt100", "dept20")] if quick else [("pt100", "dept20"), ("lora8",)]
    return [
        Contest("short", f"{model} {'+'.join(group)}", _both(model, group, batch, source), SIZES[model].pairs + 2)
        for model in models
        for group in groups
    ]


def _shared(quick: bool) -> list[Contest]:
    model, batch, source = ("llama-tiny", 2, 8) if quick else ("smollm2-135m", 16, 24)
    found = []
    for method in ("pt100",) if quick else ("pt100", "dept20", "dept40"):
        shared, torch = _both(model, (method,), batch, source)
        copied = dataclasses.replace(shared, share_prompt=False)
        found.append(Contest("shared", f"{model} {method}", (shared, copied, torch), SIZES[model].pairs))
    if not quick:
        found.append(Contest("shared", f"{model} lora8", _both(model, ("lora8",), batch, source), SIZES[model].pairs))
    return found


def _buckets(quick: bool) -> list[Contest]:
    # The bucketed side goes through one whole window of the pipeline, 32 batches: texts are sorted by length within it,
    # so a part of it would not be a fair sample. A batch padded to 256 always costs the same: one in four is enough.
    rounds, batch = (2, 4) if quick else (8, 16)
    model = "t5-tiny" if quick else "t5-small"
    found = []
    for text in ("synthetic",) if quick else ("trec6", "sms_spam"):
        padded = Entrant("deptjax", model, "dept40", batch, MAX_LENGTH, 0, text=text)
        bucketed = dataclasses.replace(padded, padding="buckets", batches=32 // rounds)
        found.append(Contest("buckets", text, (bucketed, padded), rounds))
    return found
