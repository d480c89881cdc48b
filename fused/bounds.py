"""Bounds under which losses and gradients stay finite in float32 for every finite log-probability.

Beyond a bound, a value is the one at the bound and its gradient is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Bound of exponents, that of TRL's alpha divergence. ``exp(80)`` is 5.5e34; the largest float32 is 3.4e38.
LARGEST_EXPONENT = 80.0
#: Bound of products of exponentials.
LARGEST = math.exp(LARGEST_EXPONENT)
#: Bound of what is squared, and of weights that multiply a ratio.
LARGEST_ROOT = math.exp(LARGEST_EXPONENT / 2)


def bounded_exponent(x: Tensor) -> Tensor:
    """``min(x, 80)``, an exponent."""
    return x.clamp(max=LARGEST_EXPONENT)


def bounded(x: Tensor) -> Tensor:
    """``x`` between plus and minus ``exp(80)``. The gradient is finite where ``x`` is a product that overflowed."""
    return x.clamp(-LARGEST, LARGEST)


def bounded_square(margin: Tensor, target: float) -> Tensor:
    """``(margin - target)**2`` with the margin between plus and minus ``exp(40)``."""
    return (margin.clamp(-LARGEST_ROOT, LARGEST_ROOT) - target) ** 2


def bounded_power(x: Tensor, power: float) -> Tensor:
    """``(exp(x)**power - 1) / power`` with the exponent ``power * x`` at most 80; less for a power below 0.05, by which the
    result is divided.
    """
    largest = LARGEST_EXPONENT + min(0.0, math.log(abs(power)) + 3)
    return torch.expm1((power * x).clamp(max=largest)) / power
