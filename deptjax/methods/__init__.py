"""The methods, one file each: DePT, prompt and prefix tuning, LoRA, full fine-tuning. `base.py` says what one is."""

from deptjax.methods.base import (
    AttentionSite,
    LinearSite,
    Method,
    ResidualSite,
    Sites,
    Vocabulary,
    method_class,
    method_from_config,
    method_names,
    method_to_config,
    register_method,
)
from deptjax.methods.dept import DePT, dept_offset, rank_for_budget
from deptjax.methods.full import FullFineTuning
from deptjax.methods.lora import LoRA
from deptjax.methods.prefix_tuning import PrefixTuning
from deptjax.methods.prompt_tuning import PromptTuning
from deptjax.methods.zero_shot import ZeroShot

__all__ = [
    "AttentionSite",
    "DePT",
    "FullFineTuning",
    "LinearSite",
    "LoRA",
    "Method",
    "PrefixTuning",
    "PromptTuning",
    "ResidualSite",
    "Sites",
    "Vocabulary",
    "ZeroShot",
    "dept_offset",
    "method_class",
    "method_from_config",
    "method_names",
    "method_to_config",
    "rank_for_budget",
    "register_method",
]
