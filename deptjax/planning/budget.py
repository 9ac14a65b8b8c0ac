"""How many parameters a method trains on a backbone, and the sizes with which it stays within a budget."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from deptjax.errors import UserError
from deptjax.methods.base import Method, method_from_config, method_to_config
from deptjax.methods.encoded import ITSELF
from deptjax.models.encoder import Encoding
from deptjax.models.prompted import PromptedModel
from deptjax.models.sizes import SIZES, parameter_count, parameter_shapes
from deptjax.training.state import count_parameters, count_trained


def trained_parameters(config: Any, method: Method) -> int:
    """Returns how many numbers `method` trains on a backbone of this config; only shapes are computed.

    With `encoder_trainable` they are the encoder's as well, where that is the backbone or a published size. Raises
    `UserError` for another one, which must be loaded to be counted.

    >>> from deptjax.methods import DePT
    >>> from deptjax.models.sizes import SIZES
    >>> trained_parameters(SIZES["t5-base"], DePT(prompt_length=40))  # as many as 100 vectors of prompt tuning
    76800
    """
    if method.tunes_backbone:
        return parameter_count(config)
    method = method.resolve(config.width)
    module = dataclasses.replace(config, scan_layers=True).make(method.sites())  # one layer is traced for all
    shapes = PromptedModel(module, method).shapes(config.width)
    return count_trained(shapes, method.groups(shapes)) + _of_encoder(config, method)


def _of_encoder(config: Any, method: Method) -> int:
    """Returns how many numbers of its encoder a method trains."""
    choice = method.encoder_choice()
    if choice is None or not choice.trainable:
        return 0
    own = config if choice.name == ITSELF else SIZES.get(choice.name)
    if own is None:
        raise UserError(
            f"{method.kind}: encoder_trainable: the parameters of encoder '{choice.name}' are counted when it is"
            " loaded; a run tells them"
        )
    scanned = dataclasses.replace(own, scan_layers=True)  # the layout of these shapes
    return count_parameters(Encoding.of(scanned, choice).parameters(parameter_shapes(own)))


def within_budget(config: Any, method: Method, budget: int) -> Method | None:
    """Returns `method` with the largest `free_size` at which it trains no more than `budget` numbers.

    Where it trains more at the least of that size, its prompt is halved until it does not. Returns `None` for a method
    without such a size, and for one that trains more at its least.
    """
    fields = method_to_config(method)
    length = fields.get("prompt_length")
    found = _largest(config, fields, method.free_size, budget)
    while found is None and method.free_size != "prompt_length" and length is not None and length > 1:
        length //= 2
        found = _largest(config, {**fields, "prompt_length": length}, method.free_size, budget)
    return found


def _largest(config: Any, fields: dict[str, Any], name: str | None, budget: int) -> Method | None:
    """Returns the method with the largest size `name` that fits, or `None`."""
    if name is None:
        return None

    def sized(size: int) -> Method:
        return method_from_config({**fields, name: size})

    @functools.cache
    def count(size: int) -> float:
        try:
            return trained_parameters(config, sized(size))
        except UserError:  # of a size that the method cannot have on this backbone
            return math.inf

    def fits(size: int) -> bool:
        return count(size) <= budget

    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high):
        # Most counts grow evenly with the size: the largest is where a line through two of them meets the budget.
        slope = (count(high) - count(low)) / (high - low)
        guess = low + int((budget - count(low)) / slope) if slope > 0 else 2 * high
        low, high = high, max(high + 1, guess + 1)
    while high - low > 1:
        middle = high - 1 if fits(high - 1) else (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sized(low)
