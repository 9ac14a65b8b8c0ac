"""`TextEncoder`: texts as vectors, for methods whose prompt depends on the text. Each is encoded once.

An encoder has its own tokens of a text: what it reads is made of the text by its own tokenizer, whatever the backbone's
tokens are. Vectors are kept, since a text comes again in every epoch, and in every task that is asked of it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import logging
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from deptjax.data.buckets import power_of_two
from deptjax.data.pipeline import pad
from deptjax.errors import UserError
from deptjax.methods.base import ENCODER, POOLINGS, EncoderChoice, Method
from deptjax.methods.encoded import ITSELF
from deptjax.models.backbone import Backbone, digest_of, rounded_bytes
from deptjax.models.encoder import Encoding
from deptjax.models.layout import with_layout
from deptjax.prompt import Prompt
from deptjax.sharding import Placement
from deptjax.tokens import token_ids
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

# A batch has always so many rows, and a length that its longest text decides: so a text's bits do not depend on when it
# is encoded, and a run that was resumed goes on with the vectors that it would have had.
ROWS = 8
# Vectors that each encoder keeps, with their tokens, in host memory: 393,000 texts, those of the largest task of GLUE,
# at 1,300 numbers a text. An epoch goes over its texts in an order of its own, so of a task that is larger most are
# encoded again.
KEPT_BYTES = 2 * 2**30


class TextEncoder:
    """An encoder with its tokenizer and its pooling; several threads may ask for vectors.

    Args:
      backbone: the encoder's weights, where they lie.
      choice: how it is used; its `name` is what messages call it.

    Attributes:
      encoding: the function from tokens to vectors, without weights.
      width: H.
      choice: as given.
    """

    def __init__(self, backbone: Backbone, choice: EncoderChoice) -> None:
        self.backbone, self.choice = backbone, choice
        self.encoding, self.width = Encoding.of(backbone.config, choice), backbone.width
        context = backbone.config.context
        self._limit = choice.max_length if context is None else min(choice.max_length, context)
        self._check_limit()
        self._kept: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._told_cut = False

    def tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns each text's token ids (E,) int32 as the encoder takes them, cut to its `max_length`."""
        found = token_ids(self.backbone.tokenizer, texts)
        if long := [place for place, row in enumerate(found) if len(row) > self._limit]:
            if not self._told_cut:
                self._told_cut = True
                logger.warning(
                    "encoder '%s': texts of more than %d tokens, encoder_length, are cut", self.choice.name, self._limit
                )
            # By the tokenizer, which knows what stands at a text's end whatever its length.
            some = [texts[place] for place in long]
            cut = token_ids(self.backbone.tokenizer, some, truncation=True, max_length=self._limit)
            for place, row in zip(long, cut, strict=True):
                found[place] = row
        for text, row in zip(texts, found, strict=True):
            if not row:
                raise UserError(f"encoder '{self.choice.name}': the text {text!r:.40} has no tokens; give a text")
        return [np.asarray(row, np.int32) for row in found]

    def _check_limit(self) -> None:
        if self.backbone.tokenizer is None:  # an encoder that is given tokens alone
            return
        around = self.backbone.tokenizer.num_special_tokens_to_add()
        if self._limit <= around:
            raise UserError(
                f"encoder '{self.choice.name}': encoder_length is {self._limit}, and its tokenizer puts {around} tokens"
                " of its own around a text; give it more"
            )

    def vectors(self, rows: Sequence[np.ndarray], weights: Tree | None = None) -> np.ndarray:
        """Returns the vectors (N, H) float32 of texts in the encoder's tokens; `weights` replace its own."""
        if weights is not None:
            return self._encoded(rows, weights)
        keys = [row.tobytes() for row in rows]
        with self._lock:
            known = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        made = self._encoded(list(new.values()), self.backbone.params)
        known.update((key, vector.copy()) for key, vector in zip(new, made, strict=True))  # each may go alone
        with self._lock:
            for key, vector in known.items():
                self._kept_bytes += 0 if key in self._kept else len(key) + vector.nbytes
                self._kept[key] = vector
                self._kept.move_to_end(key)
            while self._kept_bytes > KEPT_BYTES:
                oldest, gone = self._kept.popitem(last=False)
                self._kept_bytes -= len(oldest) + gone.nbytes
        return np.stack([known[key] for key in keys])

    def tuned(self, remat: str) -> Encoding:
        """Returns the function for a step that tunes the encoder, which keeps of its layers what `remat` says."""
        return Encoding.of(dataclasses.replace(self.backbone.config, remat=remat), self.choice)

    def started_from(self, prompt: Prompt, where: str) -> Prompt:
        """Returns a prompt to start from, as `laid_out` does.

        Raises `UserError`, which begins with `where`, for one that was tuned with another encoder.
        """
        if prompt.encoder is None:
            return prompt
        if ENCODER in prompt.trainable and not self.choice.trainable:
            raise UserError(f"{where} was tuned together with its encoder; start from it with encoder_trainable")
        try:
            self.check_is(prompt.encoder)
            return self.laid_out(prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}; take that encoder, or another prompt to start from") from None

    def laid_out(self, prompt: Prompt) -> Prompt:
        """Returns a prompt with the weights of its tuned encoder, if it has them, in this one's layout of layers.

        Raises `UserError` for weights that are not of this encoder's shapes.
        """
        tuned = prompt.trainable.get(ENCODER)
        if tuned is None:
            return prompt
        config = dataclasses.replace(self.backbone.config, quantize=None)  # as a prompt keeps what was tuned
        given = traverse_util.flatten_dict(with_layout(tuned, config.scan_layers))
        shapes = jax.eval_shape(lambda: config.make().init(jax.random.key(0), method="init_pass")["params"])
        wanted = Encoding.of(config, self.choice).parameters(shapes)
        weights = {path: given[path] for path in traverse_util.flatten_dict(wanted) if path in given}
        weights = traverse_util.unflatten_dict(weights)
        if jax.tree.map(np.shape, weights) != jax.tree.map(np.shape, wanted):
            raise UserError(f"its tuned encoder's weights are not those of '{self.backbone.name}'")
        return dataclasses.replace(prompt, trainable={**prompt.trainable, ENCODER: weights})

    def card(self) -> dict[str, Any]:
        """Returns what a saved prompt says of its encoder.

        The name, the fingerprint, and of one that is not the backbone digests of its vocabulary and, unless the prompt
        has weights of its own for it, of all weights that make the vectors.
        """
        card = {"name": self.choice.name, "fingerprint": self.backbone.fingerprint}
        if self.choice.name == ITSELF:
            return card
        card["vocabulary"] = self._vocabulary
        return card if self.choice.trainable or self._weights is None else {**card, "weights": self._weights}

    def check_is(self, card: dict[str, Any] | None) -> None:
        """Raises `UserError` naming a field in which this encoder differs from what a prompt says of its own."""
        if card is None:  # of the backbone, whose fingerprint the prompt has
            return
        wanted, actual = dict(card.get("fingerprint", {})), dict(self.backbone.fingerprint)
        if "vocabulary" in card:
            wanted["vocabulary"], actual["vocabulary"] = card["vocabulary"], self._vocabulary
        if "weights" in card and self._weights is not None:
            wanted["weights"], actual["weights"] = card["weights"], self._weights
        for field in {**wanted, **actual}:
            if wanted.get(field) != actual.get(field):
                raise UserError(
                    f"it was tuned with encoder '{card.get('name')}', and '{self.backbone.name}' is another: {field} is"
                    f" {actual.get(field)}, not {wanted.get(field)}"
                )

    @functools.cached_property
    def _vocabulary(self) -> str:
        """The digest of the tokens and their ids."""
        return digest_of([json.dumps(sorted(self.backbone.tokenizer.get_vocab().items())).encode()])

    @functools.cached_property
    def _weights(self) -> str | None:
        """The digest of the weights that make the vectors, whatever their layout; `None` of quantised ones."""
        if self.backbone.config.quantize is not None:
            return None
        apart = with_layout(self.encoding.parameters(self.backbone.params), scan_layers=False)
        leaves = sorted(("/".join(path), leaf) for path, leaf in traverse_util.flatten_dict(apart).items())
        return digest_of(part for path, leaf in leaves for part in (path.encode(), rounded_bytes(np.asarray(leaf))))

    def of_batch(self, batch: dict[str, Any], weights: Tree | None = None) -> dict[str, Any]:
        """Returns a batch with the vectors of its texts, `encoding`, in place of the tokens they are made of."""
        rest = {name: leaf for name, leaf in batch.items() if name not in ("encoder_source", "encoder_mask")}
        rows = [ids[mask] for ids, mask in zip(batch["encoder_source"], batch["encoder_mask"], strict=True)]
        return {**rest, "encoding": self.vectors(rows, weights)}

    def _encoded(self, rows: Sequence[np.ndarray], weights: Tree) -> np.ndarray:
        found = np.zeros((len(rows), self.width), np.float32)
        groups: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(power_of_two(len(row)), []).append(place)
        for length, places in groups.items():
            for start in range(0, len(places), ROWS):
                some = places[start : start + ROWS]
                filled = [rows[place] for place in some + some[-1:] * (ROWS - len(some))]
                ids, mask = pad(filled, length)
                found[some] = np.asarray(_encode(self.encoding, weights, ids, mask))[: len(some)]
        return found


@functools.partial(jax.jit, static_argnums=0)
def _encode(encoding: Encoding, weights: Tree, ids: Any, mask: Any) -> Any:
    return encoding(weights, jnp.asarray(ids), jnp.asarray(mask))


def encoder_of(method: Method, backbone: Backbone, given: Backbone | None = None) -> TextEncoder | None:
    """Returns the encoder that a method reads its texts with, loaded, or `None` for a method without one.

    Args:
      method: as a user makes it, or of a saved prompt.
      backbone: the model that is tuned, which may be its own encoder: the weights are then the same arrays.
      given: a loaded encoder, in place of the one that the method names; of a method that names the backbone, the
        choice that is returned has its name.

    Raises `UserError` for an encoder that cannot be loaded, or whose width is not the method's.
    """
    choice = method.encoder_choice()
    if choice is None:
        return None
    encoder = _loaded(method, choice, backbone, given)
    if choice.name == ITSELF and encoder is not backbone:  # else a saved prompt would be read with the backbone
        choice = choice._replace(name=encoder.name)
    return TextEncoder(encoder, _pooled(choice, encoder))


def _pooled(choice: EncoderChoice, encoder: Backbone) -> EncoderChoice:
    """Returns a choice with what it leaves open as the encoder's files have it. Raises `UserError` where it cannot be.

    A saved prompt says what its run took, so what lies beside an encoder's weights later changes nothing.
    """
    told = encoder.sentence
    if choice.pooling is not None or told is None:
        return choice._replace(normalize=bool(choice.normalize))
    if told.pooling not in POOLINGS:
        raise UserError(
            f"encoder '{choice.name}': its files pool by {told.pooling}, and not by one of {', '.join(POOLINGS)}; name "
            "one of these as encoder_pooling"
        )
    found = choice._replace(
        pooling=told.pooling, normalize=told.normalize if choice.normalize is None else choice.normalize
    )
    logger.warning(
        "encoder '%s': pooled by %s%s, as its files say; encoder_pooling and encoder_normalize say otherwise",
        choice.name,
        found.pooling,
        ", normalised" if found.normalize else "",
    )
    return found


def _loaded(method: Method, choice: EncoderChoice, backbone: Backbone, given: Backbone | None) -> Backbone:
    check_encoder(given)
    if given is None and choice.name == ITSELF and jax.process_count() > 1:
        raise UserError(
            f"{method.kind}: encoder 'backbone' is not for several hosts, each of which encodes texts of its own; name "
            "an encoder that every host loads"
        )
    loaded = given or (backbone if choice.name == ITSELF else load_encoder(choice.name, f"{method.kind}: encoder"))
    width = getattr(method, "encoder_width", None)
    if width not in (None, loaded.width):
        raise UserError(
            f"{method.kind}: encoder_width is {width}, and encoder '{loaded.name}' has {loaded.width}; leave it out"
        )
    return loaded


def check_encoder(given: Any) -> None:
    """Raises `UserError` for what is given as an encoder and is neither a `Backbone` nor `None`."""
    if not (given is None or isinstance(given, Backbone)):
        raise UserError(
            f"encoder is a {type(given).__name__}; give a Backbone, from load_backbone, or name it in the method"
        )


class SavedEncoders:
    """The encoders of saved prompts, each loaded once; prompts with the same one share its vectors too.

    Args:
      backbone: the model that the prompts are for.
      given: a loaded encoder, in place of the one that prompts name; the backbone itself needs no other place.

    Raises `UserError` for one that is not loaded.
    """

    def __init__(self, backbone: Backbone, given: Backbone | None = None) -> None:
        check_encoder(given)
        self._backbone, self._given = backbone, given
        self._loaded: dict[tuple[EncoderChoice, bool], TextEncoder] = {}

    def of(self, prompt: Prompt) -> TextEncoder | None:
        """Returns the encoder of a prompt, or `None` for a method without one.

        Raises `UserError` for one that cannot be loaded, or is not the one that the prompt was tuned with.
        """
        choice = prompt.method.encoder_choice()
        if choice is None:
            return None
        tuned, frozen = prompt.trainable.get(ENCODER), choice._replace(trainable=False)
        if choice.trainable and tuned is None:
            raise UserError("its method has encoder_trainable, and the encoder's weights are not among its tensors")
        encoder = self._opened(prompt, frozen)
        if tuned is None:
            return encoder
        weights = encoder.laid_out(prompt).trainable[ENCODER]
        config = dataclasses.replace(encoder.backbone.config, quantize=None)
        own = dataclasses.replace(encoder.backbone, config=config, params=jax.tree.map(jnp.asarray, weights))
        return TextEncoder(own, frozen)

    def _opened(self, prompt: Prompt, choice: EncoderChoice) -> TextEncoder:
        """Returns the encoder that was given if it is the prompt's, else the one that the prompt names."""
        if choice.name == ITSELF or self._given is None:
            return self._opened_as(prompt, choice, None)
        try:
            return self._opened_as(prompt, choice, self._given)
        except UserError as error:
            refused = error
        try:  # of several prompts' encoders one may have moved, and that one alone was given
            named = self._opened_as(prompt, choice, None)
        except UserError:
            raise refused from None
        logger.warning("encoder '%s' is read from there, for the one that was given is another", choice.name)
        return named

    def _opened_as(self, prompt: Prompt, choice: EncoderChoice, given: Backbone | None) -> TextEncoder:
        key = (choice, given is not None)
        if prompt.encoder is None and choice.name != ITSELF:
            raise UserError(
                f"it was tuned with encoder '{choice.name}', and has no fingerprint of it (field encoder) to know it"
                " by; tune it again, or set Prompt.encoder to the card of a TextEncoder"
            )
        try:
            if key not in self._loaded:
                self._loaded[key] = TextEncoder(_loaded(prompt.method, choice, self._backbone, given), choice)
            self._loaded[key].check_is(prompt.encoder)
        except UserError as error:
            remedy = "give the encoder that it was tuned with as encoder= or --encoder"
            raise UserError(f"{error}; the prompt cannot be used without it: {remedy}") from None
        return self._loaded[key]


def load_encoder(name: str, where: str) -> Backbone:
    """Returns an encoder on one device of this host. Raises `UserError`, which begins with `where`."""
    from deptjax.interop.load import load_backbone  # formats are loaded when an encoder is named

    try:
        return load_backbone(name, mesh=Placement.over(jax.local_devices()[:1]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def load_given_encoder(place: str, prompts: Iterable[Prompt]) -> Backbone:
    """Returns the encoder that a command was given for saved prompts.

    Raises `UserError` for one that cannot be loaded, and where no prompt has an encoder of its own.
    """
    choices = [prompt.method.encoder_choice() for prompt in prompts]
    if all(choice is None or choice.name == ITSELF for choice in choices):
        raise UserError(f"--encoder {place}: no prompt here was tuned with an encoder of its own; leave it out")
    return load_encoder(place, "--encoder")
