"""What methods inside the backbone have in common: a pattern that chooses the sites they fill."""

from __future__ import annotations

import re

from deptjax.errors import UserError
from deptjax.methods.base import AttentionSite, LinearSite, Method


class TargetedMethod(Method):
    """A method that fills the sites whose path matches `targets`, a regular expression; a dataclass with that field."""

    targets: str

    def __post_init__(self) -> None:
        self.check_sizes()
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(f"{self.kind}: targets '{self.targets}' is not a regular expression: {error}") from error

    def takes(self, site: LinearSite | AttentionSite) -> bool:
        """Returns whether `targets` is found in the path of a site."""
        return re.search(self.targets, site.path) is not None
