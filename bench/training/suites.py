"""The suites: which cases, by which arms. Cases stand in the order of interest, so that a time limit leaves the rest out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .arms import ARMS
from .cases import TrainCase
from .methods import METHODS
from .models import MODELS

#: The one that the targets are stated for.
HEADLINE = TrainCase("qwen3-0.6b", "dpo", pairs=8, length=1024)
_TRAINED = tuple(name for name, arm in ARMS.items() if not arm.floor)


@dataclass(frozen=True)
class Suite:
    """Cases and arms. kind: what is done with them, ``steps``, ``limits`` or ``curves``."""

    name: str
    kind: str
    about: str
    cases: tuple[TrainCase, ...]
    arms: tuple[str, ...]


def _of_model(name: str, pairs: int, method: str = HEADLINE.method) -> TrainCase:
    """With gradient checkpointing where the decoder's activations would not leave room for anything in 80 GB."""
    return replace(HEADLINE, model=name, method=method, pairs=pairs, checkpointing=bool(MODELS[name].lora))


def _steps() -> tuple[TrainCase, ...]:
    methods = [replace(HEADLINE, method=name) for name in METHODS]
    models = [_of_model(name, 4 if MODELS[name].lora else HEADLINE.pairs) for name in MODELS]
    profiles = [replace(HEADLINE, profile=name) for name in ("fixed", "summary", "balanced", "reasoning")]
    return tuple(dict.fromkeys((*methods, *models, *profiles)))


def _grid() -> tuple[TrainCase, ...]:
    """Batch and length, then the other methods on the other models."""
    sizes = ((2, 1024), (24, 512), (4, 2048), (2, 4096), (1, 8192))
    grid = [replace(HEADLINE, pairs=pairs, length=length) for pairs, length in sizes]
    others = [
        _of_model(model, 4, method)
        for method in METHODS
        for model in MODELS
        if method != HEADLINE.method and model != HEADLINE.model
    ]
    return tuple(grid + others)


def _options() -> tuple[TrainCase, ...]:
    return (
        replace(HEADLINE, checkpointing=True),
        replace(HEADLINE, compiled=True),
        replace(HEADLINE, precision="fp16-amp"),
        replace(HEADLINE, precision="bf16-amp"),
    )


_LONG = replace(HEADLINE, pairs=1, length=4096, profile="fixed", checkpointing=True)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("steps", "steps", "every method, every model, every profile of lengths", _steps(), tuple(ARMS)),
        Suite("grid", "steps", "batch sizes and lengths; every method on every model", _grid(), tuple(ARMS)),
        Suite(
            "options",
            "steps",
            "gradient checkpointing, torch.compile of the decoder, autocast, fp16 with a GradScaler",
            _options(),
            tuple(ARMS),
        ),
        Suite(
            "longest",
            "limits",
            "the longest sequence that fits, one pair, gradient checkpointing",
            (_LONG, replace(_LONG, method="simpo")),
            _TRAINED,
        ),
        Suite(
            "largest",
            "limits",
            "the largest batch that fits, gradient checkpointing",
            (replace(_LONG, pairs=4, length=2048), replace(_LONG, method="simpo", pairs=4, length=2048)),
            _TRAINED,
        ),
        Suite(
            "curves",
            "curves",
            "losses of 50 steps beside TRL's, and beside what another rounding of TRL's does",
            tuple(replace(HEADLINE, method=name, pairs=4, length=512) for name in ("dpo", "grpo", "kto")),
            _TRAINED,
        ),
    )
}


def shrink(case: TrainCase) -> TrainCase:
    """The case for a CPU: everything smaller by about as much."""
    return replace(case, pairs=min(case.pairs, 2), length=max(48, case.length // 16 if case.length <= 1024 else 96), tiny=True)
