"""Loggers as they were before an entry point set them up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from deptjax.cli.setup import NOISY


@contextlib.contextmanager
def logging_as_before() -> Iterator[None]:
    """Takes back at the end what an entry point did to loggers, on which other tests listen."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logger = logging.getLogger("deptjax")
    logger.propagate = True
    logger.handlers.clear()
