"""The version of the library, read by setup.py without importing anything heavy."""

from __future__ import annotations

__version__ = "0.1.0"
