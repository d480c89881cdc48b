"""What is run: shapes and cases of the head's benchmark, and suites, which group the cases of any benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

import logitless as ll

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGITS = ("random", "peaked")
IGNORE = -100


def check(of: object, least: Mapping[str, int], **known: Iterable[str]) -> None:
    """Raise ``ValueError`` if an attribute of ``of`` is below its least value, or not one of the known names."""
    for name, bound in least.items():
        if getattr(of, name) < bound:
            raise ValueError(f"{name} must be at least {bound}, got {getattr(of, name)}")
    for name, values in known.items():
        if getattr(of, name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(of, name)!r}")


@dataclass(frozen=True)
class Suite:
    """A named group of cases.

    ``make`` takes replaced values of the shape (for training: of the case), and whether a small run was asked for. By default
    ``providers`` run (empty: all that can), with ``--quick`` ``quick_providers``. ``base``: the shape without replaced values.
    """

    name: str
    help: str
    make: Callable[[Mapping[str, Any], bool], list[Any]]
    providers: tuple[str, ...] = ()
    quick_providers: tuple[str, ...] = ()
    base: Any = None


@dataclass(frozen=True)
class Shape:
    """Sizes and kind of the inputs.

    Attributes:
        pairs: P; a batch is P chosen sequences followed by P rejected ones.
        tokens: positions of each sequence.
        hidden, vocab: H and V.
        masked: the share of each sequence, from its start, that is prompt and not scored.
        dtype: of hidden states and weight.
        logits: ``random`` (standard deviation 1), or ``peaked``: the target of each token is raised by 0 to ``log V + 6``
            nats, so that probabilities range from near 0 to near 1 as in a trained model.
        softcap: of the logits; 0: none.
        spread: the longest response over the shortest; their lengths are evenly spaced, and the rest is padding.
        seed: of the random numbers.
    """

    pairs: int = 2
    tokens: int = 256
    hidden: int = 1024
    vocab: int = 65536
    masked: float = 0.25
    dtype: str = "bf16"
    logits: str = "random"
    softcap: float = 0.0
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, {"pairs": 1, "tokens": 1, "hidden": 1, "vocab": 1}, dtype=DTYPES, logits=LOGITS)
        if not 0 <= self.masked < 1:
            raise ValueError(f"masked must be in [0, 1), got {self.masked}")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be a number >= 0 (0: none), got {self.softcap}")
        if not 1 <= self.spread < math.inf:
            raise ValueError(f"spread must be a number >= 1 (1: responses of equal length), got {self.spread}")

    @property
    def prompt(self) -> int:
        """Positions of each sequence that are not scored."""
        return int(self.tokens * self.masked)

    @property
    def scored(self) -> int:
        """N: scored tokens of the batch."""
        return sum(self.responses)

    @property
    def responses(self) -> list[int]:
        """Scored tokens of each sequence, which follow its prompt; from the longest to the shortest."""
        longest, sequences = self.tokens - self.prompt, 2 * self.pairs
        step = (longest - longest / self.spread) / (sequences - 1)
        return [max(1, round(longest - i * step)) for i in range(sequences)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def head(self) -> ll.HeadSpec:
        """The transformation of the logits."""
        return ll.HeadSpec(softcap=self.softcap or None)

    @property
    def options(self) -> str:
        """Soft-cap and spread in words, where there are any."""
        softcap = f", softcap {self.softcap:g}" if self.softcap else ""
        return softcap + (f", responses {self.spread:g}:1" if self.spread > 1 else "")

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs x 2 x {self.tokens} tokens ({self.scored} scored), H={self.hidden}, V={self.vocab}, "
            f"{self.dtype}, {self.logits} logits{self.options}"
        )


def parse_shape(text: str) -> dict[str, Any]:
    """``"tokens=512,vocab=32000"`` as values of :class:`Shape`'s fields; ``ValueError`` with the known keys for others."""
    kinds = {f.name: type(getattr(Shape, f.name)) for f in fields(Shape)}
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise ValueError(f"unknown shape key {key!r}; known keys: {', '.join(kinds)}")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise ValueError(f"shape key {key!r} takes {kinds[key].__name__}, got {value!r}") from None
    Shape(**values)
    return values


#: Tasks without a head, and what they compute.
_WITHOUT_HEAD = {"tile": "logits to gradient", "gae": "rewards and values to advantages"}


@dataclass(frozen=True)
class Case:
    """One table: a task on a shape.

    Attributes:
        suite: the suite that it belongs to.
        task: ``logps`` (log-probs under an arbitrary upstream gradient), a loss of :mod:`logitless.bench.losses`, ``tile``
            (log-probs and gradient of given logits), or ``gae`` (advantages from rewards and values).
        train_head: whether the head's weight has a gradient.
        backward: whether there is a backward pass.
    """

    suite: str
    task: str
    shape: Shape
    train_head: bool = True
    backward: bool = True

    @property
    def gemms(self) -> int:
        """The fewest GEMMs of ``2*N*H*V`` FLOP."""
        return 0 if self.task in _WITHOUT_HEAD else 1 + int(self.backward) + int(self.backward and self.train_head)

    @property
    def floor(self) -> str:
        """The unit of the column of ratios: what the roofline provider runs."""
        return "copy" if self.task in _WITHOUT_HEAD else "GEMM"

    @property
    def kind(self) -> str:
        """What is computed, in words."""
        what = _WITHOUT_HEAD.get(self.task) or ("forward + backward" if self.backward else "forward only")
        return what + ("" if self.train_head else ", frozen head")

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.task} {self.kind}; {self.shape}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        return cls(**{**values, "shape": Shape(**values["shape"])})
