"""What methods have in common whose prompt is made from what an encoder says of the text.

The encoder turns each text into one vector (H). It may be a model of its own, with its own tokenizer, or the frozen
backbone itself. A frozen encoder is run once for each text, outside of the training step; a trained one runs in it.
"""

from __future__ import annotations

from deptjax.errors import UserError, nearest
from deptjax.methods.base import ENCODER, POOLINGS, EncoderChoice
from deptjax.methods.input_method import InputMethod
from deptjax.typing import Array, Tree

ITSELF = "backbone"  # the name of the encoder that is the backbone


def without_encoder(trainable: Tree) -> Tree:
    """Returns the parameters that are not a tuned encoder's."""
    return {name: tree for name, tree in trainable.items() if name != ENCODER}


class EncodedMethod(InputMethod):
    """An input method that is told `texts.encoding` (B, H). Subclasses add their own fields.

    Attributes:
      encoder: the model that reads the texts, as `load_backbone` takes it, or `backbone` for the tuned model itself.
      encoder_pooling: the text's vector: the state of its `first` token, of its `last`, their `mean`, or `pooled` by
        the checkpoint's own layer; `None` takes what the files of a sentence-transformers checkpoint say, else the
        first token of BERT's family, the mean of T5's, the last of others.
      encoder_normalize: whether the vector is scaled to length 1; `None` takes what these files say where
        encoder_pooling does, else does not.
      encoder_length: the most tokens of a text that the encoder reads.
      encoder_trainable: whether the encoder's weights are tuned too; they are then counted, and saved.
      encoder_width: H; found when the encoder is loaded.
    """

    by_instance = True
    starts_plain = False

    encoder: str = ITSELF
    encoder_pooling: str | None = None
    encoder_normalize: bool | None = None
    encoder_length: int = 256
    encoder_trainable: bool = False
    encoder_width: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, str):
            raise UserError(
                f"{self.kind}: encoder is a {type(self.encoder).__name__}; name a model, as load_backbone takes it, and"
                " give one that is loaded as encoder= of what runs the method"
            )
        super().__post_init__()
        pooling = self.encoder_pooling
        if pooling is not None and pooling not in POOLINGS:
            told = nearest(pooling, POOLINGS)
            raise UserError(f"{self.kind}: encoder_pooling '{pooling}' is not one of {', '.join(POOLINGS)}.{told}")
        self.check_positive("encoder_length", "encoder_width")

    def check_share(self, *names: str) -> None:
        """Raises `UserError` for one of these fields that is not from 0 up to, not including, 1."""
        for name in names:
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise UserError(f"{self.kind}: {name} is {value!r}; it must be from 0 to below 1")

    def resolve(self, width: int) -> EncodedMethod:
        return self.clone(encoder_width=width) if self.encoder_width is None and self.encoder == ITSELF else self

    def encoder_choice(self) -> EncoderChoice:
        return EncoderChoice(
            self.encoder, self.encoder_pooling, self.encoder_normalize, self.encoder_length, self.encoder_trainable
        )

    def with_encoder(self, choice: EncoderChoice, width: int) -> EncodedMethod:
        return self.clone(
            encoder=choice.name,
            encoder_pooling=choice.pooling,
            encoder_normalize=choice.normalize,
            encoder_width=width,
        )

    def with_encoding_width(self, width: int) -> EncodedMethod:
        return self.clone(encoder_width=width)

    def encoding_width(self) -> int:
        if self.encoder_width is None:
            raise UserError(
                f"{self.kind}: its encoder '{self.encoder}' has not been loaded; give encoder_width, its width"
            )
        return self.encoder_width

    def group(self, path: tuple[str, ...]) -> str:
        return "backbone" if path[0] == ENCODER else super().group(path)

    def encoder_rate(self) -> dict[str, float]:
        """Returns the rate of the encoder's own weights, where they are tuned: that of LoPA's authors on GLUE."""
        return {"backbone": 1e-5} if self.encoder_trainable else {}

    def encoding_of(self, encoding: Array | None) -> Array:
        """Returns what the encoder made of the texts. Raises `UserError` where nobody ran it."""
        if encoding is None:
            raise UserError(f"{self.kind}: the texts' encodings (texts.encoding) are missing; run its encoder first")
        return encoding
