"""No tuning at all: the frozen model as it is. The baseline of every method."""

from __future__ import annotations

import dataclasses

from deptjax.errors import UserError
from deptjax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class ZeroShot(Method):
    """Fills no site and has no parameters: its `trainable` is `{}`. It can be evaluated, not trained or saved."""

    kind = "zero_shot"
    paper = "none: nothing is trained"
    formula = "0"

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        raise UserError("zero_shot has no parameters to train; choose another method, or evaluate without training")
