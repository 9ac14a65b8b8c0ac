"""What a method is, and the sites of a backbone that it may fill.

A *site* is a named place in a backbone where a method may act:

| site        | where                                   | what fills it is called as                                 |
|-------------|-----------------------------------------|------------------------------------------------------------|
| `input`     | after the embedding, before block 0     | `streams(embeds, texts) -> (prompt or None, embeds)`       |
| `linear`    | beside a projection                     | `module(x, y) -> y`, where `y = x @ kernel`                |
| `attention` | beside the keys and values of a layer   | `module() -> (keys, values)`, each (P, K, H)               |
| `residual`  | after a sub-layer, before the sum       | `module(y) -> y`                                           |
| `stream`    | where a prompt enters a block           | `module(x, text) -> x`, `x` (M, D), or (B, M, D) by row    |

A method says in `sites()` which of them it fills and with which small Linen module; a backbone calls whatever fills
a site and knows nothing else. Sites are named by a path without the layer's number (`attention/query`,
`encoder/mlp/wi_0`), so that a choice of sites means the same whether or not layers are scanned. The parameters of
what fills an inner site live beside the layer they act on, under the key `site`; what all layers have in common is kept
once, and put there when the model runs (`Method.inner`).

Of a stream site `text` is a function that returns (B, D), the state of each row's text where the block begins: of the
token that stands for it (BERT's first, a causal model's last of the source), or T5's mean; as the block's attention
reads it, so behind the norm that comes first. It is `None` where rows share the prompt.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.mesh import Axes
from deptjax.typing import Array, Key, Tree

ENCODER = "encoder"  # the key of a tuned encoder's weights in `trainable`
POOLINGS = ("first", "mean", "last", "pooled")
FIXED = "fixed"  # the group of parameters that a method keeps and does not train
COMMON = "common"  # the collection in which modules of inner sites find what all layers have in common
SITE = "site"  # the key under which the parameters of what fills an inner site are found


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """A projection: `path` names it (`attention/query`); kernel shape is (`features_in`, `features_out`)."""

    path: str
    features_in: int
    features_out: int


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """An attention layer: `path` names it (`encoder/attention`); keys and values are (P, `num_heads`, `head_dim`)."""

    path: str
    num_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class ResidualSite:
    """The output of a sub-layer: `path` names the sub-layer (`mlp`); the stream is (..., `width`)."""

    path: str
    width: int


@dataclasses.dataclass(frozen=True)
class StreamSite:
    """The prompt's part of the stream, where a block begins: `path` names the stack (`prompt`); it is `width` wide."""

    path: str
    width: int


class Texts(NamedTuple):
    """What the input site is told of the texts whose embeddings it is given.

    Attributes:
      mask: (B, T) bool, which columns hold a real token.
      positions: (B, T) int32, each token's index in its own text, -1 for padding; `None` says that column i holds
        token i, and that padding comes last.
      encoding: (B, H), what the method's encoder makes of each text; `None` for a method without one.
    """

    mask: Array
    positions: Array | None = None
    encoding: Array | None = None

    @classmethod
    def whole(cls, embeds: Array, encoding: Array | None = None) -> Texts:
        """Returns what is to be said of embeddings (B, T, D) that are all of real tokens."""
        return cls(jnp.ones(embeds.shape[:2], bool), None, encoding)


class EncoderChoice(NamedTuple):
    """Which encoder reads the texts, and how its states become one vector.

    Attributes:
      name: as `load_backbone` takes it, or `backbone`.
      pooling: one of `POOLINGS`; `None` takes what the encoder's files say, else what is usual for its family.
      normalize: whether vectors are scaled to length 1; `None` leaves it to the encoder's files.
      max_length: the most tokens of a text that it reads.
      trainable: whether its weights are tuned too.
    """

    name: str
    pooling: str | None
    normalize: bool | None
    max_length: int
    trainable: bool


@dataclasses.dataclass(frozen=True)
class Sites:
    """What fills each site; `None` leaves the site empty, which costs nothing.

    `input` is an unbound Linen module. The others are functions of the site that return a Linen module built
    with the given `name`, or `None` to leave that one empty.
    """

    input: Any | None = None
    linear: Callable[[LinearSite, str], nn.Module | None] | None = None
    attention: Callable[[AttentionSite, str], nn.Module | None] | None = None
    residual: Callable[[ResidualSite, str], nn.Module | None] | None = None
    stream: Callable[[StreamSite, str], nn.Module | None] | None = None

    @property
    def inner(self) -> bool:
        """Whether something is to fill sites inside the blocks."""
        return any(fill is not None for fill in (self.linear, self.attention, self.residual, self.stream))


NO_SITES = Sites()


@dataclasses.dataclass(frozen=True)
class Filled:
    """Fills a kind of inner site as `method.fill` does.

    Equal methods give equal ones, as two bound methods are not: so their models are equal, and share programs.
    """

    method: Any

    def __call__(self, site: Any, name: str) -> nn.Module | None:
        """Returns the module for a site, or `None` to leave it empty."""
        return self.method.fill(site, name)  # type: ignore[no-any-return]


class Vocabulary(NamedTuple):
    """What an initialiser may look at: the frozen embedding table (V, D), the tokenizer, and the task's labels."""

    embedding: Array
    tokenizer: Any
    labels: tuple[str, ...] = ()
    check_prompt: Callable[[Any, str], None] | None = None  # of a saved `Prompt`: whether it is of this backbone


def input_parameters(method: Method, key: Key, width: int) -> Tree:
    """Returns the parameters of what fills the input site for embeddings of a width, as Linen makes them."""
    fill, embeds, encoded = method.sites().input, jnp.zeros((1, 1, width)), method.encoding_width()
    texts = Texts.whole(embeds, None if encoded is None else jnp.zeros((1, encoded)))
    return {} if fill is None else fill.init(key, embeds, texts, method="streams").get("params", {})


class _Type(NamedTuple):
    """A type that a method's field may have: which values are of it, as what they are kept, and its name for a user."""

    takes: Callable[[Any], bool]
    plain: Callable[[Any], Any]
    told: str


def _is_a(number: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, number) and not isinstance(value, bool)


_TYPES = {
    "bool": _Type(lambda value: isinstance(value, bool), bool, "True or False"),
    "int": _Type(_is_a(numbers.Integral), int, "a whole number"),
    "float": _Type(_is_a(numbers.Real), lambda value: value if isinstance(value, int) else float(value), "a number"),
    "str": _Type(lambda value: isinstance(value, (str, os.PathLike)), os.fspath, "a text"),
}


class Method:
    """Base class of all methods: which sites it fills, how its parameters start, and which learning rate moves them.

    Subclasses are frozen dataclasses (or Linen modules, which are dataclasses too) whose fields are plain values, so
    that a method can be written to JSON and read back with `method_from_config`.
    """

    kind: ClassVar[str]
    """The method's name in configs, on the command line and in a saved prompt."""

    paper: ClassVar[str]
    """Where it was published, in one line."""

    formula: ClassVar[str]
    """How many parameters it trains at its default options, in the letters of ARCHITECTURE.md and of `letters`.

    Ends in "for each layer", "for each attention layer" or "for each projection" (from I to O numbers) where a method
    sits at more than one place, all of which are added up."""

    letters: ClassVar[Mapping[str, str]] = {}
    """The fields that letters of `formula` stand for."""

    free_size: ClassVar[str | None] = None
    """The size that is chosen to stay within a budget of parameters; `None` where none can be."""

    starts_plain: ClassVar[bool] = True
    """True when at first the model computes what the frozen one does behind the method's prompt, if it has one."""

    by_instance: ClassVar[bool] = False
    """True when the prompt in front of a text depends on the text, and so cannot be computed ahead."""

    tunes_backbone: ClassVar[bool] = False
    """True when the backbone's own parameters are trained: then they are moved from `frozen` to `trainable`."""

    sizes: ClassVar[tuple[str, ...]] = ()
    """Fields that are sizes of parameters; zeros beyond a smaller size change nothing (see `deptjax.methods.room`)."""

    more_sizes: ClassVar[tuple[str, ...]] = ()
    """Fields that are sizes too, and must be equal in prompts that are stacked."""

    in_front: ClassVar[Mapping[str, int]] = {"prompt": -2}
    """Names of parameters whose size along an axis is the prompt's length, and the axis: zeros go in front there."""

    free: ClassVar[tuple[str, ...]] = ()
    """Fields that say how training starts, or that `scales` accounts for: they may differ between stacked prompts."""

    in_training: ClassVar[tuple[str, ...]] = ()
    """Fields that every step of training reads and nothing later: they may differ between saved prompts that are
    stacked, and not between members that are trained together."""

    derived: ClassVar[tuple[str, ...]] = ()
    """Names, among the parameters of an inner site, of those that are not kept: `inner` puts them there."""

    axes: ClassVar[Mapping[str, Axes]] = {}
    """Logical axes of large parameters of an inner site, by name, to split them over a mesh as the model is; `in` and
    `out` are those of the kernel beside the site. Parameters that are not named are whole on every device."""

    @classmethod
    def typical(cls) -> Method:
        """Returns the method at its defaults, for what is asked of no run in particular."""
        return cls()

    def stacked_by(self, name: str) -> Any:
        """Returns what prompts that are stacked must have in common of a field that is no size and not free."""
        return getattr(self, name)

    def check_positive(self, *names: str) -> None:
        """Raises `UserError` for one of these fields that is given and below 1."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{self.kind}: {name} is {value}; it must be at least 1")

    def check_types(self) -> None:
        """Raises `UserError` for a field whose value is not of its type; numpy's numbers and paths become plain."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            kinds, value = str(field.type).split(" | "), getattr(self, field.name)
            types = [_TYPES[kind] for kind in kinds if kind in _TYPES]
            if not types or field.name in ("parent", "name"):  # of another kind, or Linen's
                continue
            if value is None and "None" in kinds:
                continue
            plain = next((type_.plain(value) for type_ in types if type_.takes(value)), None)
            if plain is None:
                told = " or ".join(type_.told for type_ in types)
                raise UserError(f"{self.kind}: {field.name} is {value!r}; it must be {told}")
            if type(plain) is not type(value):
                object.__setattr__(self, field.name, plain)  # the dataclass is frozen

    def check_sizes(self) -> None:
        """Raises `UserError` for a field that is not of its type, and for a size that is given and below 1."""
        self.check_types()
        self.check_positive(*self.sizes, *self.more_sizes)

    def sites(self) -> Sites:
        """Returns what fills each site."""
        return Sites()

    def resolve(self, width: int) -> Method:
        """Returns the method with every field that depends on the embedding width D filled in."""
        return self

    def initialize(self, key: Key, params: Tree, vocabulary: Vocabulary) -> Tree:
        """Returns the input site's initial parameters, given Linen's, after a look at the frozen vocabulary."""
        return params

    def start(self, key: Key, trainable: Tree, vocabulary: Vocabulary) -> Tree:
        """Returns all initial parameters, given Linen's: the input site's are `initialize`'s."""
        if "input" not in trainable:
            return trainable
        return {**trainable, "input": self.initialize(key, trainable["input"], vocabulary)}

    def inner(self, trainable: Tree) -> Tree:
        """Returns the parameters of what fills the inner sites, in the backbone's tree.

        They are `trainable["backbone"]`, and those named in `derived`.
        """
        return trainable.get("backbone", {})

    def common(self, trainable: Tree) -> Tree:
        """Returns what all layers have in common, in the backbone's tree: what the modules of inner sites find in the
        collection `COMMON`. Of layers that are scanned it stands there once, without an axis of layers.
        """
        return {}

    def at_input(self, trainable: Tree) -> Tree:
        """Returns the parameters of what fills the input site: `trainable["input"]`, and what else acts there."""
        return trainable.get("input", {})

    def soft_prompt(self, trainable: Tree, width: int) -> Array | None:
        """Returns the vectors (M, D) that stand in front of every text, which `trainable` may hold in parts.

        `None` of a method that has none, or another for each text.
        """
        return None if self.by_instance else trainable.get("input", {}).get("prompt")

    def fold(self, trainable: Tree) -> tuple[Method, Tree]:
        """Returns a simpler method and its parameters that compute what this one does with `trainable`.

        What only training needed, such as a network that makes the prompt, is worked out once and left away; a run
        saves what this returns. A method without such parts returns itself.
        """
        return self, trainable

    def group(self, path: tuple[str, ...]) -> str:
        """Returns the learning-rate group of the parameter at `path` in `trainable`.

        One of `"prompt"` (soft prompts, which live on the scale of the embeddings), `"low_rank"` (low-rank factors)
        and `"backbone"` (full weights); or `FIXED`, of what the method brings with it and leaves as it is.
        """
        raise NotImplementedError

    def groups(self, trainable: Tree) -> Tree:
        """Returns a tree like `trainable` whose leaves are the names of learning-rate groups."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self.group(tuple(k.key for k in path)), trainable)

    def learning_rates(self, prompt_lr: float) -> dict[str, float]:
        """Returns a good peak learning rate for each group, for a user who gives none.

        `prompt_lr` is the backbone's: a good rate for a vector that lives among its input embeddings
        (`Backbone.prompt_lr`).
        """
        raise NotImplementedError

    def scales(self) -> dict[str, float]:
        """Returns, by the name of a parameter, the constant that the method's formula multiplies it with."""
        return {}

    def encoder_choice(self) -> EncoderChoice | None:
        """Returns which encoder reads the texts, or `None` for a method without one."""
        return None

    def encoding_width(self) -> int | None:
        """Returns H, the width of an encoder's vectors, or `None` for a method without one."""
        return None

    def with_encoder(self, choice: EncoderChoice, width: int) -> Method:
        """Returns the method for an encoder that is used so, and whose vectors have this width."""
        return self.with_encoding_width(width)

    def with_encoding_width(self, width: int) -> Method:
        """Returns the method for an encoder whose vectors have this width."""
        return self

    def positions_in_front(self) -> int:
        """Returns how many positions the method puts in front of a text."""
        return 0

    def source_limit(self) -> int | None:
        """Returns the longest source text in tokens that the method can take, or `None` for any length."""
        return None


MethodClass = TypeVar("MethodClass", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register_method(cls: MethodClass) -> MethodClass:
    """Makes a method known by its `kind` to configs, the command line and saved prompts. A class decorator."""
    _METHODS[cls.kind] = cls
    return cls


def method_names() -> list[str]:
    """Returns the names of all registered methods, sorted."""
    return sorted(_METHODS)


def method_class(name: str) -> type[Any]:
    """Returns the class registered as `name`. Raises `UserError` for a name that is not known."""
    if name not in _METHODS:
        known = ", ".join(method_names())
        raise UserError(f"unknown method '{name}'; there are: {known}.{nearest(name, _METHODS)}")
    return _METHODS[name]


def method_fields(cls: type[Any]) -> list[str]:
    """Returns the names of the fields of a method class that a user may set."""
    return [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]


def method_to_config(method: Any) -> dict[str, Any]:
    """Returns a JSON-ready dict: `{"method": name, field: value, ...}`, every field included."""
    return {"method": method.kind, **{name: getattr(method, name) for name in method_fields(type(method))}}


def method_from_config(config: dict[str, Any]) -> Any:
    """Returns the method that `method_to_config` described. Raises `UserError` for an unknown method or field."""
    fields = dict(config)
    cls = method_class(fields.pop("method"))
    known = method_fields(cls)
    for name in fields:
        if name not in known:
            there = ", ".join(known)
            raise UserError(f"method '{cls.kind}' has no field '{name}'; it has: {there}.{nearest(name, known)}")
    return cls(**fields)
