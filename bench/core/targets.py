"""A figure that the project set itself as a target, and what was measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """A target and what was measured.

    Attributes:
        what: in words. value: measured, ``None`` where a row that it needs is missing or not right.
        bound: the target. at_least: whether the value must reach the bound or stay below it.
        stated: whether the target is stated for the case's shape. stated_for: the shape and machine that it is stated for.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool
    stated: bool = True
    stated_for: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value is within the bound, whatever the shape; ``None`` if there is no value."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        bound = f"at {'least' if self.at_least else 'most'} {self.bound:g}"
        if self.value is None:
            return f"not measured: {self.what} (target: {bound})"
        verdict = ("met" if self.met else "missed") if self.stated else "not stated for this shape"
        return f"{verdict}: {self.what} is {self.value:.2f} (target: {bound})"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def quotient(above: float | None, below: float | None) -> float | None:
    """``above / below``, ``None`` unless both are finite numbers and ``below`` is not 0."""
    if above is None or not below or not math.isfinite(above) or not math.isfinite(below):
        return None
    return above / below
