"""The methods, one file each: DePT and its kin, prompt and prefix tuning, LoRA, full fine-tuning. See `base.py`."""

from deptjax.methods.accept import ACCEPT, mixed_codewords
from deptjax.methods.adept import ADePT, adept_offset
from deptjax.methods.attempt import ATTEMPT
from deptjax.methods.base import (
    AttentionSite,
    LinearSite,
    Method,
    ResidualSite,
    Sites,
    StreamSite,
    Vocabulary,
    method_class,
    method_from_config,
    method_names,
    method_to_config,
    register_method,
)
from deptjax.methods.deep_prompt_tuning import DeepPromptTuning
from deptjax.methods.dept import DePT, dept_offset, rank_for_budget
from deptjax.methods.dpt import DPT, dpt_prompt
from deptjax.methods.full import FullFineTuning
from deptjax.methods.idpg import IDPG
from deptjax.methods.lopa import LoPA
from deptjax.methods.lora import LoRA
from deptjax.methods.mpt import MPT
from deptjax.methods.p_tuning import PTuning
from deptjax.methods.prefix_tuning import PrefixTuning
from deptjax.methods.prompt_tuning import PromptTuning
from deptjax.methods.residual_prompt_tuning import ResidualPromptTuning, residual_mlp
from deptjax.methods.zero_shot import ZeroShot

__all__ = [
    "ACCEPT",
    "ATTEMPT",
    "DPT",
    "IDPG",
    "MPT",
    "ADePT",
    "AttentionSite",
    "DePT",
    "DeepPromptTuning",
    "FullFineTuning",
    "LinearSite",
    "LoPA",
    "LoRA",
    "Method",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "ResidualPromptTuning",
    "ResidualSite",
    "Sites",
    "StreamSite",
    "Vocabulary",
    "ZeroShot",
    "adept_offset",
    "dept_offset",
    "dpt_prompt",
    "method_class",
    "method_from_config",
    "method_names",
    "method_to_config",
    "mixed_codewords",
    "rank_for_budget",
    "register_method",
    "residual_mlp",
]
