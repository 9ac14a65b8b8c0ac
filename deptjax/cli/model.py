"""The backbone of a saved prompt: the one that the flags name, or the one that the prompt names itself."""

from __future__ import annotations

from deptjax.cli.settings import Settings, model_settings
from deptjax.errors import UserError
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt


def backbone_of(prompt: Prompt, place: str, settings: Settings) -> Backbone:
    """Returns the backbone to use a prompt with.

    Raises `UserError`, naming the prompt's `place`, where its backbone cannot be loaded, or another one is named.
    """
    from deptjax.interop.load import load_backbone

    model = model_settings(settings)
    try:
        backbone = load_backbone(**{"name_or_path": prompt.backbone, **model})
    except UserError as error:
        if "name_or_path" in model:
            raise
        raise UserError(f"{place} was tuned on '{prompt.backbone}'; name its place with --model ({error})") from error
    prompt.check_backbone(backbone, place)
    return backbone
