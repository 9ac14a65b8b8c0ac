"""IDPG, instance-dependent prompt generation: a small network writes the soft prompt of each text.

    h = Enc(x) (H)                              what an encoder, often the frozen model itself, makes of the text
    P = f2(act(f1(h))) + C                      (M, D); C (M, D) is the task's own part, the same for all texts
    input = [P; E]                              M + T rows

f1: H -> F and f2: F -> M D are linear: plain (`dense`), or parametrised hypercomplex multiplication (`phm`), whose
weight is a sum of Kronecker products of small matrices,

    W (in, out) = sum_i A_i (n, n) kron B_i (in / n, out / n)         n^3 + in out / n numbers instead of in out

Wu et al., "IDPG: An Instance-Dependent Prompt Generation Method", NAACL 2022, arXiv 2204.04497. Prompts are put in at
the first layer (S-IDPG).

Parameters, the encoder aside: (H + 1) F + F M D + M D (dense), n^3 + H F / n + F + n^3 + F M D / n + M D (phm).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.methods.base import Texts, Vocabulary, register_method
from deptjax.methods.encoded import EncodedMethod
from deptjax.typing import Array, Float, Key, Tree

GENERATORS = ("phm", "dense")
ACTIVATIONS = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu}


def phm_weight(a: Float[Array, "n n n"], b: Float[Array, "n I O"]) -> Float[Array, "nI nO"]:
    """Returns sum_i A_i kron B_i, the weight (n I, n O) of a hypercomplex product.

    >>> phm_weight(jnp.ones((2, 2, 2)), jnp.ones((2, 3, 5))).shape
    (6, 10)
    """
    n, rows, columns = b.shape
    return jnp.einsum("ijk,iro->jrko", a, b).reshape(n * rows, n * columns)


class PHM(nn.Module):
    """A linear map without bias whose weight is `phm_weight` of `factors` pairs."""

    features: int
    factors: int

    @nn.compact
    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        """Returns the product with W."""
        n, normal = self.factors, nn.initializers.normal(0.05)
        a = self.param("a", normal, (n, n, n))
        b = self.param("b", normal, (n, x.shape[-1] // n, self.features // n))
        return x @ phm_weight(a, b)


@register_method
class IDPG(EncodedMethod):
    """Instance-dependent prompt generation, of one layer; the fields of its encoder are those of `EncodedMethod`.

    Attributes:
      prompt_length: M, vectors in front of the text.
      hidden: F, the generator's bottleneck.
      generator: `phm` or `dense`.
      factors: n, the pairs of matrices of `phm`; H, F and M D must be multiples of it.
      activation: of the bottleneck, tanh, relu or gelu.
      encoding_dropout: of the encoder's vector and of the bottleneck, in training.
    """

    kind = "idpg"
    paper = "Wu et al., IDPG: An Instance-Dependent Prompt Generation Method, NAACL 2022, arXiv 2204.04497"
    formula = "2 n n n + (H F + F M D) / n + F + M D"
    free_size = "prompt_length"
    letters = {"H": "encoder_width", "F": "hidden", "M": "prompt_length", "n": "factors"}

    prompt_length: int = 5
    hidden: int = 16
    generator: str = "phm"
    factors: int = 16
    activation: str = "tanh"
    encoding_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (("generator", GENERATORS), ("activation", tuple(ACTIVATIONS))):
            if (value := getattr(self, name)) not in known:
                raise UserError(
                    f"{self.kind}: {name} '{value}' is not one of {', '.join(known)}.{nearest(value, known)}"
                )
        self.check_positive("prompt_length", "hidden", "factors")
        self.check_share("encoding_dropout")
        super().__post_init__()

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "B M D"], Array]:
        """Returns each text's prompt and the embeddings as they came; needs `texts.encoding` (B, H)."""
        encoding, shape = self.encoding_of(texts.encoding), (self.prompt_length, embeds.shape[-1])
        drop = nn.Dropout(self.encoding_dropout, deterministic=not self.has_rng("dropout"))
        bias = self.param("bias", nn.initializers.normal(0.05), (self.hidden,))
        task = self.param("prompt", nn.initializers.normal(0.05), shape)
        hidden = self._linear("down", self.hidden, encoding.shape[-1])(drop(encoding)) + bias[None]
        hidden = ACTIVATIONS[self.activation](hidden)
        made = self._linear("up", shape[0] * shape[1], self.hidden)(drop(hidden)).reshape(-1, *shape)
        return (made + task[None]).astype(embeds.dtype), embeds

    def _linear(self, name: str, features: int, inputs: int) -> nn.Module:
        if self.generator == "dense":
            return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.normal(0.02), name=name)
        for what, size in (("the encoder's width", inputs), ("the number of outputs", features)):
            if size % self.factors:
                raise UserError(
                    f"{self.kind}: factors {self.factors} does not divide {what} of '{name}', {size}; take "
                    f"{', '.join(str(n) for n in range(2, 33) if inputs % n == 0 and features % n == 0) or 'dense'}"
                )
        return PHM(features, self.factors, name=name)

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        return params

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr, "low_rank": 1e-3, **self.encoder_rate()}
