"""What is run: a case is a model, a method, and the size and kind of its batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .batches import PROFILES
from .models import MODELS

#: Names of precisions: of the weights, and of autocast.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "bf16": (torch.bfloat16, None),
    "bf16-amp": (torch.float32, torch.bfloat16),
    "fp16-amp": (torch.float32, torch.float16),
    "fp32": (torch.float32, None),
}


@dataclass(frozen=True)
class TrainCase:
    """One table.

    Attributes:
        model: of :data:`~.models.MODELS`. method: of :data:`~.methods.METHODS`.
        pairs: P; a batch has 2 P sequences. length: tokens of the longest. profile: of :data:`~.batches.PROFILES`.
        precision: of :data:`PRECISIONS`; ``fp16-amp`` trains with a ``GradScaler``.
        checkpointing: gradient checkpointing of the decoder's layers.
        compiled: the decoder under ``torch.compile``, the head left out of it.
        attention: with which sequences run in one row, a name of transformers' or :data:`~.attention.VARLEN`; empty: the best
            that there is.
        tiny: the model shrunk.
    """

    model: str
    method: str
    pairs: int
    length: int
    profile: str = "chat"
    precision: str = "bf16"
    checkpointing: bool = False
    compiled: bool = False
    attention: str = ""
    tiny: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        from .methods import METHODS

        known: dict[str, Mapping[str, Any]] = {
            "model": MODELS,
            "method": METHODS,
            "profile": PROFILES,
            "precision": PRECISIONS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        for name, least in (("pairs", 1), ("length", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def weights_dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return PRECISIONS[self.precision][1]

    @property
    def title(self) -> str:
        options = [name for name in ("checkpointing", "compiled", "tiny") if getattr(self, name)]
        more = "".join(f", {name}" for name in options)
        return (
            f"{self.model} {self.method}: {self.pairs} pairs x 2 x at most {self.length} tokens ({self.profile}), "
            f"{self.precision}{more}{', ' if self.attention else ''}{self.attention}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
