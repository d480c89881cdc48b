"""The suites: which cases, by which arms. The most important cases come first, because a time limit leaves out the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.cases import Suite
from .arms import ARMS
from .cases import TrainCase
from .methods import METHODS
from .models import MODELS

#: The case that the targets are stated for.
HEADLINE = TrainCase("qwen3-0.6b", "dpo", pairs=8, length=1024)
_TRAINED = tuple(name for name, arm in ARMS.items() if not arm.floor)


@dataclass(frozen=True)
class TrainSuite(Suite):
    """kind: what is done with the cases: ``steps`` and ``curves``, or the largest ``pairs`` or ``length`` that fits."""

    kind: str = "steps"


def _shrink(case: TrainCase) -> TrainCase:
    """The case for a CPU: everything smaller by about as much."""
    return replace(case, pairs=min(case.pairs, 2), length=max(48, case.length // 16 if case.length <= 1024 else 96), tiny=True)


def _suite(name: str, about: str, cases: Iterable[TrainCase], arms: Iterable[str] = ARMS, kind: str = "steps") -> TrainSuite:
    def make(overrides: Mapping[str, Any], tiny: bool) -> list[TrainCase]:
        return list(dict.fromkeys(replace(_shrink(case) if tiny else case, **overrides) for case in all_cases))

    all_cases = tuple(cases)
    return TrainSuite(name, about, make, tuple(arms), kind=kind)


def _of_model(name: str, pairs: int, method: str = HEADLINE.method) -> TrainCase:
    """With gradient checkpointing where 80 GB would not hold the decoder's activations."""
    return replace(HEADLINE, model=name, method=method, pairs=pairs, checkpointing=bool(MODELS[name].lora))


_METHODS = [replace(HEADLINE, method=name) for name in METHODS]
_MODELS = [_of_model(name, 4 if MODELS[name].lora else HEADLINE.pairs) for name in MODELS]
_PROFILES = [replace(HEADLINE, profile=name) for name in ("fixed", "summary", "balanced", "reasoning")]
_SIZES = [replace(HEADLINE, pairs=p, length=n) for p, n in ((2, 1024), (24, 512), (4, 2048), (2, 4096), (1, 8192))]
_OTHERS = [_of_model(m, 4, name) for name in METHODS for m in MODELS if name != HEADLINE.method and m != HEADLINE.model]
_AUTOCAST = [replace(HEADLINE, precision=name) for name in ("fp16-amp", "bf16-amp")]
_OPTIONS = [replace(HEADLINE, checkpointing=True), replace(HEADLINE, compiled=True), *_AUTOCAST]
_LONG = replace(HEADLINE, pairs=1, length=4096, profile="fixed", checkpointing=True)
_LARGE = replace(_LONG, pairs=4, length=2048)
_CURVES = [replace(HEADLINE, method=name, pairs=4, length=512) for name in ("dpo", "grpo", "kto")]
_OPTIONS_HELP = "gradient checkpointing, torch.compile of the decoder, autocast, fp16 with a GradScaler"
_LONGEST_HELP = "the longest sequence that fits, one pair, gradient checkpointing"
_LARGEST_HELP = "the largest batch that fits, gradient checkpointing"
_CURVES_HELP = "losses of 50 steps beside TRL's, and beside the effect of another rounding of TRL's"

_ALL = [
    _suite("steps", "every method, every model, every profile of lengths", [*_METHODS, *_MODELS, *_PROFILES]),
    _suite("grid", "batch sizes and lengths; every method on every model", [*_SIZES, *_OTHERS]),
    _suite("options", _OPTIONS_HELP, _OPTIONS),
    _suite("longest", _LONGEST_HELP, [_LONG, replace(_LONG, method="simpo")], _TRAINED, "length"),
    _suite("largest", _LARGEST_HELP, [_LARGE, replace(_LARGE, method="simpo")], _TRAINED, "pairs"),
    _suite("curves", _CURVES_HELP, _CURVES, _TRAINED, "curves"),
]
SUITES: dict[str, TrainSuite] = {suite.name: suite for suite in _ALL}
