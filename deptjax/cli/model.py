"""The backbone of a saved prompt: the one that the flags name, or the one that the prompt names itself."""

from __future__ import annotations

from deptjax.cli.settings import Settings, model_settings
from deptjax.errors import UserError
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt


def backbone_of(prompt: Prompt, settings: Settings) -> Backbone:
    """Returns the backbone to use a prompt with. Raises `UserError` where the prompt's own cannot be loaded."""
    from deptjax.interop.load import load_backbone

    model = model_settings(settings)
    if "name_or_path" in model:
        return load_backbone(**model)
    try:
        return load_backbone(**{**model, "name_or_path": prompt.backbone})
    except UserError as error:
        raise UserError(
            f"the prompt was tuned on '{prompt.backbone}'; name its place with --model ({error})"
        ) from error
