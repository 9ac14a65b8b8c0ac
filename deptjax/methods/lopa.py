"""LoPA, low-rank prompt adaptation: a soft prompt for each text, a shared prompt gated by a low-rank matrix.

    h = Enc(x) (H)                                       what an encoder makes of the text
    U (M, R) = W2 tanh(W1 h + b1) + b2                   a head for the rows
    V (D, R) = W4 tanh(W3 h + b3) + b4                   and one for the columns
    Z = Z_S * sigmoid(U V^T)                             (M, D); Z_S is trained and the same for all texts
    input = [Z; E]                                       M + T rows

Jain, Chaudhuri, Reps and Jermaine, "Prompt Tuning Strikes Back: Customizing Foundation Models with Low-Rank Prompt
Adaptation", NeurIPS 2024, arXiv 2405.15282. The model sees soft tokens only, so one that is served needs nothing of its
own for a text. At the start U V^T is all but 0 and the gate 1/2: the prompt begins at about Z_S / 2. `variant` has the
authors' other ways to join the two, without a sigmoid: `concat` [Z_S; U V^T], `add` Z_S + U V^T, `max` of the two.

Parameters, the encoder aside: 2 (H F + F) + (F + 1) M R + (F + 1) D R + M D, with F the heads' hidden width.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.methods import initializers
from deptjax.methods.base import Texts, register_method
from deptjax.methods.encoded import EncodedMethod
from deptjax.typing import Array, Float

VARIANTS = ("gate", "concat", "add", "max")


def low_rank(u: Float[Array, "B M R"], v: Float[Array, "B D R"]) -> Float[Array, "B M D"]:
    """Returns U V^T of each text."""
    return jnp.einsum("bmr,bdr->bmd", u, v)


def gated(shared: Float[Array, "M D"], instance: Float[Array, "B M D"], variant: str = "gate") -> Array:
    """Returns the prompt of each text, (B, M, D), or (B, 2 M, D) of `concat`.

    >>> gated(jnp.full((1, 2), 3.0), jnp.zeros((4, 1, 2)))[0]
    Array([[1.5, 1.5]], dtype=float32)
    """
    shared = shared[None]
    if variant == "gate":
        return shared * jax.nn.sigmoid(instance)
    if variant == "add":
        return shared + instance
    if variant == "max":
        return jnp.maximum(shared, instance)
    return jnp.concatenate([jnp.broadcast_to(shared, instance.shape), instance], axis=1)


class Head(nn.Module):
    """A head of LoPA: dropout, a hidden layer with tanh, and `features` numbers a text.

    Kernels start as in the authors' code, and so do biases: zero behind, and in front as torch draws them.
    """

    hidden: int
    features: int
    dropout: float

    @nn.compact
    def __call__(self, encoding: Float[Array, "B H"]) -> Float[Array, "B F"]:
        """Returns the numbers in float32."""
        normal = nn.initializers.normal(0.02)
        encoding = nn.Dropout(self.dropout)(encoding, deterministic=not self.has_rng("dropout"))
        uniform = initializers.uniform_within(1.0 / math.sqrt(encoding.shape[-1]))
        hidden = jnp.tanh(nn.Dense(self.hidden, kernel_init=normal, bias_init=uniform, name="down")(encoding))
        return nn.Dense(self.features, kernel_init=normal, name="up")(hidden)


@register_method
class LoPA(EncodedMethod):
    """Low-rank prompt adaptation; the fields of its encoder are those of `EncodedMethod`.

    Attributes:
      prompt_length: M, vectors in front of the text (`concat` puts as many again).
      rank: R.
      hidden: F, the width of the heads' hidden layers; `None` takes that of the encoder.
      variant: how shared and instance part are joined: `gate` (the paper), `concat`, `add` or `max`.
      encoding_dropout: of the encoder's vector, in training.
      prompt_init: how Z_S starts: `normal` numbers (the authors'), or any way of the other methods.
      prompt_text: the text that the prompt starts from, with `prompt_init="text"`.
    """

    kind = "lopa"
    paper = (
        "Jain et al., Prompt Tuning Strikes Back: Customizing Foundation Models with Low-Rank Prompt Adaptation, "
        "NeurIPS 2024, arXiv 2405.15282"
    )
    formula = "2 (H F + F) + (F + 1) (M + D) R + M D"
    free_size = "hidden"
    letters = {"H": "encoder_width", "F": "hidden", "M": "prompt_length", "R": "rank"}
    free = ("prompt_init", "prompt_text")
    in_training = ("encoding_dropout",)

    prompt_length: int = 10
    rank: int = 4
    hidden: int | None = 256
    variant: str = "gate"
    encoding_dropout: float = 0.1
    prompt_init: str = "normal"
    prompt_text: str = initializers.DEFAULT_TEXT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            told = nearest(self.variant, VARIANTS)
            raise UserError(f"{self.kind}: variant '{self.variant}' is not one of {', '.join(VARIANTS)}.{told}")
        self.check_positive("prompt_length", "rank", "hidden")
        self.check_share("encoding_dropout")

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "B M D"], Array]:
        """Returns each text's prompt and the embeddings as they came; needs `texts.encoding` (B, H)."""
        encoding = self.encoding_of(texts.encoding)
        width, hidden = embeds.shape[-1], self.hidden or encoding.shape[-1]
        shared = self.param("prompt", nn.initializers.normal(1.0), (self.prompt_length, width))
        rows = Head(hidden, self.prompt_length * self.rank, self.encoding_dropout, name="rows")(encoding)
        columns = Head(hidden, width * self.rank, self.encoding_dropout, name="columns")(encoding)
        u = rows.reshape(-1, self.prompt_length, self.rank)
        v = columns.reshape(-1, width, self.rank)
        return gated(shared, low_rank(u, v), self.variant).astype(embeds.dtype), embeds

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        # The authors' rates: 1e-3 of all of it on code, where the encoder is frozen; 1e-5 on GLUE, encoder and all.
        return {"prompt": prompt_lr, "low_rank": 1e-3, **self.encoder_rate()}

    def positions_in_front(self) -> int:
        return self.prompt_length * (2 if self.variant == "concat" else 1)
