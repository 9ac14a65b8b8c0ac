"""How many parameters a method trains on a backbone, and the sizes with which it stays within a budget."""

from __future__ import annotations

import dataclasses
from typing import Any

from deptjax.errors import UserError
from deptjax.methods.base import Method, method_from_config, method_to_config
from deptjax.models.prompted import PromptedModel
from deptjax.models.sizes import parameter_count
from deptjax.training.state import count_trained


def trained_parameters(config: Any, method: Method) -> int:
    """Returns how many numbers `method` trains on a backbone of this config; only shapes are computed.

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
    return count_trained(shapes, method.groups(shapes))


def within_budget(config: Any, method: Method, budget: int) -> Method | None:
    """Returns `method` with the largest `free_size` at which it trains no more than `budget` numbers.

    Returns `None` for a method without such a size, and for one that trains more at its least.
    """
    name, fields = method.free_size, method_to_config(method)
    if name is None:
        return None

    def sized(size: int) -> Method:
        return method_from_config({**fields, name: size})

    def fits(size: int) -> bool:
        try:
            return trained_parameters(config, sized(size)) <= budget
        except UserError:  # of a size that the method cannot have on this backbone
            return False

    if not fits(1):
        return None
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sized(low)
