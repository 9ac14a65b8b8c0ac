"""Full fine-tuning: every parameter of the backbone is trained. The yardstick of the other methods."""

from __future__ import annotations

import dataclasses

from deptjax.methods.base import Method, register_method


@register_method
@dataclasses.dataclass(frozen=True)
class FullFineTuning(Method):
    """Trains the whole backbone; it fills no site."""

    kind = "full"
    paper = "none: every weight is trained"
    formula = "all of the backbone"
    tunes_backbone = True

    def group(self, path: tuple[str, ...]) -> str:
        return "backbone"

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"backbone": 5e-5}
