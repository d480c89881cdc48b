"""What is run: a case is a model, a method, and the size and kind of its batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.cases import check
from .batches import PROFILES, Batch, make_batch
from .methods import METHODS
from .models import MODELS

#: Names of precisions: the dtypes of the weights and of autocast.
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
        compiled: whether the decoder, without the head, is under ``torch.compile``.
        attention: of sequences in one row: a name of transformers', or :data:`~.attention.VARLEN`; empty: the best available.
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
        least = {"pairs": 1, "length": 16}
        check(self, least, model=MODELS, method=METHODS, profile=PROFILES, precision=PRECISIONS)

    @property
    def weights_dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return PRECISIONS[self.precision][1]

    @property
    def title(self) -> str:
        options = [self.precision, *(name for name in ("checkpointing", "compiled", "tiny") if getattr(self, name))]
        options += [self.attention] if self.attention else []
        size = f"{self.pairs} pairs x 2 x at most {self.length} tokens ({self.profile})"
        return f"{self.model} {self.method}: {size}, {', '.join(options)}"


def case_batch(case: TrainCase, vocab: int, *, pairs: int | None = None, length: int | None = None, seed: int = 0) -> Batch:
    """The batch of a case, or one of another size."""
    sizes = {"pairs": pairs or case.pairs, "length": length or case.length}
    return make_batch(case.profile, **sizes, vocab=vocab, seed=case.seed + seed)
