"""`Decoding`: what a user may choose about how text is written, checked when it is made."""

from __future__ import annotations

import dataclasses
import math

from deptjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How new tokens are chosen; greedy by default. The words are those of Hugging Face's `generate`, so is their use.

    Beam search where `num_beams` is above 1, sampling where `sample` is set. A setting that the way of decoding would
    not look at is refused. Raises `UserError`, in one line that names the field.

    >>> Decoding(num_beams=4, length_penalty=0.6).is_beam_search
    True
    >>> Decoding(top_p=0.9)
    Traceback (most recent call last):
    ...
    deptjax.errors.UserError: top_p is 0.9, but nothing is sampled; set sample=True, or leave top_p out

    Attributes:
      max_new_tokens: the most tokens a row gets.
      min_new_tokens: an end token is not chosen before there are as many. Stop strings end a row all the same.
      num_beams: beams of a beam search; 1 is none.
      length_penalty: beams are ranked by the sum of their log-probabilities divided by `length ** length_penalty`:
        above 0 favours long texts, below 0 short ones.
      early_stopping: when a beam search ends. `True`: as soon as there are `num_beams` finished texts; `False`: when
        the best running beam, at its present length, is not above the worst finished one; `"never"`: when it could
        not be above it at any length.
      num_return: texts a row: the best of the beams, or independent samples.
      sample: draw tokens at random.
      temperature: logits are divided by it.
      top_k: draw from the `top_k` likeliest tokens; 0 is all.
      top_p: draw from the fewest likeliest tokens whose probability sums to `top_p`; 1 is all.
      seed: of the draws. The draws of a row depend on the seed and the row alone.
      stop: a row ends when its text holds one of these.
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("num_beams", 1), ("num_return", 1)):
            self._check_whole(name, least)
        self._check_whole("top_k", 0)
        self._check_whole("seed", 0, 2**32 - 1)
        for name in ("length_penalty", "temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{name} is {value!r}, expected a number")
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}, expected a number above 0; greedy is sample=False")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected a number above 0 and up to 1")
        if not isinstance(self.sample, bool):
            raise UserError(f"sample is {self.sample!r}, expected true or false")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UserError(f"early_stopping is {self.early_stopping!r}, expected true, false or 'never'")
        self._check_stop()
        self._check_together()

    @property
    def is_beam_search(self) -> bool:
        """Whether there is more than one beam."""
        return self.num_beams > 1

    def _check_whole(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            upto = "" if most is None else f" and at most {most}"
            raise UserError(f"{name} is {value!r}, expected a whole number of at least {least}{upto}")

    def _check_stop(self) -> None:
        if isinstance(self.stop, str) or not isinstance(self.stop, (tuple, list)):
            raise UserError(f"stop is {self.stop!r}, expected a list of texts: write stop=({self.stop!r},)")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop holds {text!r}, expected texts of at least one character; leave it out")
            if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
                raise UserError(f"stop holds {text!r}, which is not text: it has half of a surrogate pair")
        object.__setattr__(self, "stop", tuple(self.stop))  # a list, as JSON has it

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens {self.max_new_tokens}")
        if self.sample and self.is_beam_search:
            raise UserError(f"sample is true and num_beams {self.num_beams}; sample, or search with beams, not both")
        if self.num_return > self.num_beams and not self.sample:
            remedy = "lower it, or raise num_beams" if self.is_beam_search else "set num_beams or sample"
            raise UserError(f"num_return is {self.num_return}, but there are {self.num_beams} beams; {remedy}")
        for names, used, reason in (
            (("temperature", "top_k", "top_p"), self.sample, "nothing is sampled; set sample=True"),
            (("length_penalty", "early_stopping"), self.is_beam_search, "there are no beams; set num_beams"),
        ):
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name in names and not used and value != field.default:
                    raise UserError(f"{field.name} is {value!r}, but {reason}, or leave {field.name} out")
