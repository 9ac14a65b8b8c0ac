"""Tasks, their sources, and the way from text to batches."""

from deptjax.data import huggingface as huggingface  # registers its kind of source, so that saved prompts find it
from deptjax.data import packaged_sets as packaged_sets  # registers its tasks, whatever module is imported first
