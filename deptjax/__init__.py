"""deptjax tunes prompts for frozen T5, LLaMA, GPT-2 and BERT-family models in JAX, and uses them.

```python
backbone = deptjax.load_backbone("t5-base")
run = deptjax.train(backbone, deptjax.DePT(prompt_length=40), task="sms_spam", workdir="runs/sms_spam")
predict = deptjax.Predictor(backbone, run.prompt)
predict(["You have won a prize ! Call now"])
```
"""

# Backbones
from deptjax.interop.load import load_backbone
from deptjax.models.backbone import Backbone

# Methods
from deptjax.methods import ACCEPT, ATTEMPT, DPT, IDPG, MPT, ADePT, DeepPromptTuning, DePT, FullFineTuning, LoPA, LoRA
from deptjax.methods import PrefixTuning, PromptTuning, PTuning, ResidualPromptTuning, ZeroShot

# Tasks
from deptjax.data.huggingface import HFSource
from deptjax.data.seqio import SeqioSource, seqio_task
from deptjax.data.sources import FileSource, MemorySource
from deptjax.data.tasks import Task, get_task, register_task, task_names
from deptjax.data.tfds import TFDSSource

# Runs
from deptjax.training.config import TrainConfig
from deptjax.training.members import grid
from deptjax.training.population import Population, train_population
from deptjax.training.run import Run, train
from deptjax.training.shared import train_shared
from deptjax.training.transfer import similar_prompts

# Prompts in other formats
from deptjax.interop.prompts import export_prompt, load_prompt

# Use
from deptjax.inference.answers import Answer, Generation
from deptjax.inference.decoding import Decoding
from deptjax.inference.embeddings import input_embeddings
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.inference.prompt_bank import PromptBank
from deptjax.prompt import Prompt

# Several hosts
from deptjax.distributed import start_hosts

# Errors and version
from deptjax.errors import UserError
from deptjax.version import __version__

__all__ = [
    "ACCEPT",
    "ATTEMPT",
    "DPT",
    "IDPG",
    "MPT",
    "ADePT",
    "Answer",
    "Backbone",
    "DePT",
    "Decoding",
    "DeepPromptTuning",
    "FileSource",
    "FullFineTuning",
    "Generation",
    "HFSource",
    "LoPA",
    "LoRA",
    "MemorySource",
    "PTuning",
    "Population",
    "Predictor",
    "PrefixTuning",
    "Prompt",
    "PromptBank",
    "PromptTuning",
    "ResidualPromptTuning",
    "Run",
    "SeqioSource",
    "TFDSSource",
    "Task",
    "TrainConfig",
    "UserError",
    "ZeroShot",
    "__version__",
    "evaluate",
    "export_prompt",
    "get_task",
    "grid",
    "input_embeddings",
    "load_backbone",
    "load_prompt",
    "register_task",
    "seqio_task",
    "similar_prompts",
    "start_hosts",
    "task_names",
    "train",
    "train_population",
    "train_shared",
]
