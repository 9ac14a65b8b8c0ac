"""MPT, multitask prompt tuning: a prompt that tasks share, times a matrix of rank one of the task's own.

    P = P* o (u v^T)            P* (M, D), u (M), v (D)
    input = [P; E]

Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", ICLR 2023, arXiv 2303.02861.
P* is learnt on source tasks, by distillation from a prompt of each (`deptjax.training.shared`), and a target task
starts from it and the mean of the sources' u and v (`start_from`). u and v start at 1, so that a run without source
tasks is prompt tuning at first, where numbers near 0 would hide the prompt; they have a rate of their own. After
training P is worked out, and saved as a prompt of prompt tuning.

Parameters: M D + M + D.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from deptjax.methods import initializers
from deptjax.methods.base import register_method
from deptjax.methods.reparametrised import ReparametrisedPrompt
from deptjax.typing import Array, Float


def task_prompt(shared: Float[Array, "M D"], u: Float[Array, "M"], v: Float[Array, "D"]) -> Float[Array, "M D"]:
    """Returns P* o (u v^T).

    >>> task_prompt(jnp.ones((2, 3)), jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0, 3.0]))
    Array([[1., 0., 3.],
           [2., 0., 6.]], dtype=float32)
    """
    return shared * jnp.outer(u, v)


@register_method
class MPT(ReparametrisedPrompt):
    """Multitask prompt tuning, of a target task.

    Attributes:
      prompt_length: M, vectors in front of the text.
      prompt_init: where P* starts: text, vocab (sampled), labels, random numbers (random), or a saved prompt's folder.
      prompt_text: the text that it starts from, with `prompt_init="text"`.
    """

    kind = "mpt"
    paper = (
        "Wang et al., Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, ICLR 2023, arXiv"
        " 2303.02861"
    )
    formula = "M D + M + D"
    free_size = "prompt_length"
    letters = {"M": "prompt_length"}

    prompt_length: int = 100
    prompt_init: str = "vocab"
    prompt_text: str = initializers.DEFAULT_TEXT

    @nn.compact
    def made_prompt(self, width: int) -> Float[Array, "M D"]:
        """Returns `P* o (u v^T)` (M, D), float32."""
        shared = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, width))
        u = self.param("u", nn.initializers.ones, (self.prompt_length,))
        return task_prompt(shared, u, self.param("v", nn.initializers.ones, (width,)))

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr, "low_rank": 5e-3}
