"""Tasks, their sources, and the way from text to batches."""

# These register their tasks and kinds of source, whatever module is imported first, so that saved prompts find them.
from deptjax.data import glue as glue
from deptjax.data import huggingface as huggingface
from deptjax.data import mrqa as mrqa
from deptjax.data import others as others
from deptjax.data import packaged_sets as packaged_sets
from deptjax.data import seqio as seqio
from deptjax.data import superglue as superglue
from deptjax.data import tfds as tfds
