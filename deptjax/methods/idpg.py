"""IDPG, instance-dependent prompt generation: a small network writes the soft prompt of each text.

    h = Enc(x) (H)                              what an encoder, often the frozen model itself, makes of the text
    G(h) = f2(act(f1(h) + b))                   (M, D), of each text
    input = [G(h) + C; E]                       M + T rows; C (M, D) is the task's own part, the same for all texts

f1: H -> F and f2: F -> M D are linear: plain (`dense`), or parametrised hypercomplex multiplication (`phm`), whose
weight is a sum of Kronecker products of small matrices,

    W (in, out) = sum_i A_i (n, n) kron B_i (in / n, out / n)         n^3 + in out / n numbers instead of in out

That is the paper's S-IDPG (`layers="first"`). M-IDPG (`layers="every"`) adds prompts at every other layer too,

    x_i = [P_i + G(s_i) + C_i; E_i]             i = 1 .. L - 1; P_i, E_i what layer i - 1 has made of prompt and text

where s_i (D) is the state of the text in front of layer i, and G is one and the same for all layers: only C_i is a
layer's own, and C of the input is C_0. The authors' released code has it so (`--middle-previous --middle-prompt-mode
layerb`), on RoBERTa, with the state of the first token. On models whose norms come first s_i is behind the norm, as the
layer reads it; it is of the last source token of a causal model, and the mean of T5's encoder. H must be D: the encoder
is best the backbone.

Wu et al., "IDPG: An Instance-Dependent Prompt Generation Method", NAACL 2022, arXiv 2204.04497.

Parameters, the encoder aside: (H + 1) F + F M D + M D (dense), n^3 + H F / n + F + n^3 + F M D / n + M D (phm); with
`layers="every"` L M D in the place of M D.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.methods.base import COMMON, Filled, Sites, StreamSite, Texts, Vocabulary, register_method
from deptjax.methods.encoded import EncodedMethod
from deptjax.methods.in_common import first_adds_nothing, in_place_of, of_first_layer
from deptjax.typing import Array, Bool, Float, Key, Tree

GENERATORS = ("phm", "dense")
LAYERS = ("first", "every")
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


@dataclasses.dataclass(frozen=True)
class Generator:
    """G: what writes prompts of texts. Fields are those of `IDPG`; its parameters are those of the module it is in."""

    length: int
    hidden: int
    kind: str
    factors: int
    activation: str
    dropout: float

    def __call__(self, scope: nn.Module, state: Float[Array, "B H"], width: int) -> Float[Array, "B M D"]:
        """Returns the prompts, by the parameters `down`, `bias` and `up` of `scope`, in whose compact method it is."""
        self._check_factors(state.shape[-1], width)
        drop = nn.Dropout(self.dropout, deterministic=not scope.has_rng("dropout"))
        bias = scope.param("bias", nn.initializers.normal(0.05), (self.hidden,))
        hidden = self._linear("down", self.hidden)(drop(state)) + bias[None]
        hidden = ACTIVATIONS[self.activation](hidden)
        return self._linear("up", self.length * width)(drop(hidden)).reshape(-1, self.length, width)

    def _check_factors(self, inputs: int, width: int) -> None:
        sizes = {
            "the encoder's width": inputs,
            "hidden": self.hidden,
            "the number of outputs, prompt_length D": self.length * width,
        }
        wrong = next((what for what, size in sizes.items() if size % self.factors), None)
        if self.kind == "dense" or wrong is None:
            return
        fit = [str(n) for n in range(2, 33) if not any(size % n for size in sizes.values())]
        other = "encoder" if inputs % self.factors else "hidden or prompt_length"
        remedy = f"take factors {', '.join(fit)}" if fit else f"give another {other}"
        raise UserError(
            f"idpg: factors {self.factors} does not divide {wrong}, {sizes[wrong]}; {remedy}, or take generator 'dense'"
        )

    def _linear(self, name: str, features: int) -> nn.Module:
        if self.kind == "dense":
            return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.normal(0.02), name=name)
        return PHM(features, self.factors, name=name)


class _Generates(nn.Module):
    """A generator by itself."""

    generator: Generator

    @nn.compact
    def __call__(self, state: Float[Array, "B H"], width: int) -> Float[Array, "B M D"]:
        """Returns the prompts."""
        return self.generator(self, state, width)


class LayerPrompts(nn.Module):
    """What M-IDPG adds to the prompt in front of a layer: the layer's own C, and G of the text's state there.

    In front of the first layer both are in the prompt already, since the input, and `adds` is 0.
    """

    generator: Generator

    @nn.compact
    def __call__(self, x: Float[Array, "B M D"], text: Callable[[], Array] | None) -> Float[Array, "B M D"]:
        """Returns the prompt's part of the stream."""
        if text is None:
            raise ValueError("a prompt of each text's own is a part of each row, and rows share this one")
        width = x.shape[-1]
        own = self.param("prompt", nn.initializers.normal(0.05), (self.generator.length, width))
        adds = self.param("adds", nn.initializers.ones, ())
        if self.is_initializing():  # the generator has its parameters at the input
            return x
        rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}
        generator = _Generates(self.generator, parent=None)
        made = generator.apply({"params": self.variables[COMMON]}, text().astype(jnp.float32), width, rngs=rngs)
        return x + (adds * (jnp.asarray(made) + own[None])).astype(x.dtype)


@register_method
class IDPG(EncodedMethod):
    """Instance-dependent prompt generation; the fields of its encoder are those of `EncodedMethod`.

    Attributes:
      prompt_length: M, vectors in front of the text.
      hidden: F, the generator's bottleneck.
      generator: `phm` or `dense`.
      factors: n, the pairs of matrices of `phm`; H, F and M D must be multiples of it.
      activation: of the bottleneck, tanh, relu or gelu.
      encoding_dropout: of the encoder's vector and of the bottleneck, in training.
      layers: `first` puts prompts in at the input (S-IDPG), `every` adds to them at every layer too (M-IDPG).
    """

    kind = "idpg"
    paper = "Wu et al., IDPG: An Instance-Dependent Prompt Generation Method, NAACL 2022, arXiv 2204.04497"
    formula = "2 n n n + (H F + F M D) / n + F + M D"
    free_size = "prompt_length"
    letters = {"H": "encoder_width", "F": "hidden", "M": "prompt_length", "n": "factors"}
    in_training = ("encoding_dropout",)
    derived = ("adds",)

    prompt_length: int = 5
    hidden: int = 16
    generator: str = "phm"
    factors: int = 16
    activation: str = "tanh"
    encoding_dropout: float = 0.1
    layers: str = "first"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("generator", GENERATORS), ("activation", tuple(ACTIVATIONS)), ("layers", LAYERS)):
            if (value := getattr(self, name)) not in known:
                raise UserError(
                    f"{self.kind}: {name} '{value}' is not one of {', '.join(known)}.{nearest(value, known)}"
                )
        self.check_positive("prompt_length", "hidden", "factors")
        self.check_share("encoding_dropout")

    def __call__(
        self, embeds: Float[Array, "B T D"], mask: Bool[Array, "B T"], encoding: Float[Array, "B H"] | None = None
    ) -> tuple[Float[Array, "B M+T D"], Bool[Array, "B M+T"]]:
        """As every method of the input has it. Raises `UserError` with layers `every`, for it acts inside too."""
        if self.layers == "every":
            raise UserError(f"{self.kind}: with layers 'every' it acts inside the model; take layers 'first'")
        return super().__call__(embeds, mask, encoding)

    @nn.compact
    def streams(self, embeds: Float[Array, "B T D"], texts: Texts) -> tuple[Float[Array, "B M D"], Array]:
        """Returns each text's prompt and the embeddings as they came; needs `texts.encoding` (B, H)."""
        encoding, width = self.encoding_of(texts.encoding), embeds.shape[-1]
        made = self._generator(self, encoding, width)
        if self.layers == "every" and encoding.shape[-1] != width:
            raise UserError(
                f"{self.kind}: layers 'every' gives the generator states of the backbone, of width {width}, and encoder"
                f" '{self.encoder}' has {encoding.shape[-1]}; take one as wide, such as 'backbone', or layers 'first'"
            )
        if self.layers == "first":
            made = made + self.param("prompt", nn.initializers.normal(0.05), (self.prompt_length, width))[None]
        elif self.has_variable("params", "prompt"):  # the first layer's, which `at_input` puts here
            made = made + self.get_variable("params", "prompt")[None]
        return made.astype(embeds.dtype), embeds

    @property
    def _generator(self) -> Generator:
        sizes = self.prompt_length, self.hidden, self.generator, self.factors
        return Generator(*sizes, self.activation, self.encoding_dropout)

    def sites(self) -> Sites:
        return Sites(input=self, stream=None if self.layers == "first" else Filled(self))

    @nn.nowrap  # outside of this module: a layer has its own
    def fill(self, site: StreamSite, name: str) -> nn.Module:
        """Returns what is added to the prompt in front of a layer."""
        return LayerPrompts(self._generator, name=name)

    def inner(self, trainable: Tree) -> Tree:
        return first_adds_nothing(super().inner(trainable), "prompt")

    def common(self, trainable: Tree) -> Tree:
        return in_place_of(super().inner(trainable), "prompt", trainable.get("input", {}))

    def at_input(self, trainable: Tree) -> Tree:
        own = super().at_input(trainable)
        return own if self.layers == "first" else {**own, "prompt": of_first_layer(trainable["backbone"], "prompt")}

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        return params

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        return {"prompt": prompt_lr, "low_rank": 1e-3, **self.encoder_rate()}
