"""What is benchmarked: shapes, the tensors of a shape, cases, and the suites that group them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from logitless.kernels.spec import HeadSpec

from .losses import LOSSES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGITS = ("random", "peaked")
IGNORE = -100


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
            nats, so that probabilities run from near 0 to near 1 as in a trained model.
        softcap: of the logits; 0: none.
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
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pairs", "tokens", "hidden", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.masked < 1:
            raise ValueError(f"masked must be in [0, 1), got {self.masked}")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap must be a number >= 0 (0: none), got {self.softcap}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {self.dtype!r}")
        if self.logits not in LOGITS:
            raise ValueError(f"logits must be one of {list(LOGITS)}, got {self.logits!r}")

    @property
    def sequences(self) -> int:
        return 2 * self.pairs

    @property
    def prompt(self) -> int:
        """Positions of each sequence that are not scored."""
        return int(self.tokens * self.masked)

    @property
    def scored(self) -> int:
        """N: scored tokens of the batch."""
        return self.sequences * (self.tokens - self.prompt)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def head(self) -> HeadSpec:
        """What is done to the logits."""
        return HeadSpec(softcap=self.softcap or None)

    def __str__(self) -> str:
        softcap = f", softcap {self.softcap:g}" if self.softcap else ""
        return (
            f"{self.pairs} pairs x 2 x {self.tokens} tokens ({self.scored} scored), H={self.hidden}, V={self.vocab}, "
            f"{self.dtype}, {self.logits} logits{softcap}"
        )


def parse_shape(text: str) -> dict[str, Any]:
    """``"tokens=512,vocab=32000"`` as values of :class:`Shape`'s fields.

    Raises:
        ValueError: for an unknown key or a value of the wrong kind; the message lists the known keys.
    """
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


@dataclass(frozen=True)
class Case:
    """One table: a task on a shape.

    Attributes:
        suite: the suite that it belongs to.
        task: ``logps`` (log-probs under an arbitrary upstream gradient), ``nll``, a loss of :data:`~.losses.LOSSES`,
            ``tile`` (log-probs and gradient of logits that are there), or ``train`` (a whole trainer step).
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
        """GEMMs of ``2*N*H*V`` FLOP that no implementation can do without."""
        return 0 if self.task == "tile" else 1 + int(self.backward) + int(self.backward and self.train_head)

    @property
    def floor(self) -> str:
        """What times are multiples of: the provider that is the roofline."""
        return "copy" if self.task == "tile" else "GEMM"

    @property
    def kind(self) -> str:
        """What is computed, in words."""
        what = "logits to gradient" if self.task == "tile" else "forward + backward" if self.backward else "forward only"
        return what + ("" if self.train_head else ", frozen head")

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.task} {self.kind}; {self.shape}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        return cls(**{**values, "shape": Shape(**values["shape"])})


@dataclass
class Inputs:
    """The tensors of a case, the same for every provider. S sequences of T tokens.

    Attributes:
        hidden: (S, T, H) leaf. weight: (V, H) leaf, with a gradient where the case trains the head.
        labels: (S, T) int64, already shifted, -100 in the prompt.
        ref_logps: (S,) log-probabilities of the reference. One number for all sequences, so that it cancels in a pair and
            in KTO can be moved to the KL term: that gives Liger, which takes no reference log-probabilities, the same loss.
        desirable: (S,) bool, for KTO. kl: 0-dim, for KTO.
        upstream: (S, T) float32, the gradient of the log-probs in ``logps``.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_logps: Tensor
    desirable: Tensor
    kl: Tensor
    upstream: Tensor

    @property
    def scored(self) -> Tensor:
        return self.labels != IGNORE

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are wanted."""
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


_FILL_ROWS = 1024


def _normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Tensor:
    """Random numbers in ``dtype``, a few rows at a time: a float32 copy of a large weight would blur the memory figures.

    Drawn by all cores, each block of rows by a generator of its own: a weight of 152k x 4096 takes one core 8 seconds.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    parts = out.view(-1, shape[-1]).split(_FILL_ROWS)
    seeds = torch.randint(2**62, (len(parts),), generator=g).tolist()

    def fill(rows: Tensor, seed: int) -> None:
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).mul_(std))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, parts, seeds))
    return out


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """The tensors of a case; the same on every call, machine and device."""
    shape = case.shape
    s, t, h, v = shape.sequences, shape.tokens, shape.hidden, shape.vocab
    g = torch.Generator().manual_seed(shape.seed)
    weight = _normal((v, h), 1 / math.sqrt(h), shape.torch_dtype, device, g)
    hidden = _normal((s, t, h), 1.0, shape.torch_dtype, device, g)
    labels = torch.randint(v, (s, t), generator=g)
    if shape.logits == "peaked":
        lift = torch.rand(s, t, 1, generator=g) * (math.log(v) + 6)
        rows = weight[labels.to(device)].float()
        hidden = (hidden.float() + lift.to(device) * rows / rows.square().sum(-1, keepdim=True)).to(shape.torch_dtype)
    labels[:, : shape.prompt] = IGNORE
    upstream = torch.randn(s, t, generator=g)
    scored = labels != IGNORE
    # Of N(0, 1) logits the log-sum-exp is log V + 1/2; with that, the reference lands where the policy is on average, and
    # no loss of log-ratios is saturated.
    targets = (hidden[scored.to(device)].float() * weight[labels[scored].to(device)].float()).sum(-1)
    targets = shape.head.apply(targets)
    others = torch.full_like(targets, math.log(v) + 0.5)
    constant = (targets - torch.logaddexp(others, targets)).mean().item() * (t - shape.prompt)
    return Inputs(
        hidden=hidden.requires_grad_(case.backward),
        weight=weight.requires_grad_(case.backward and case.train_head),
        labels=labels.to(device),
        ref_logps=torch.full((s,), constant, device=device),
        desirable=(torch.arange(s) % 2 == 0).to(device),
        kl=torch.tensor(0.5, device=device),
        upstream=upstream.to(device),
    )


@dataclass(frozen=True)
class Suite:
    """A named group of cases.

    Attributes:
        cases: the cases for a base shape; the flag says whether ``--quick`` was given.
        base, quick: the base shape, and what ``--quick`` changes in it.
        providers: names that run by default; empty: all that could.
        quick_providers: those of ``--quick``, where they are fewer.
    """

    name: str
    help: str
    cases: Callable[[Shape, bool], list[Case]]
    base: Shape
    quick: Mapping[str, Any]
    providers: tuple[str, ...] = ()
    quick_providers: tuple[str, ...] = ()

    def make(self, overrides: Mapping[str, Any], quick: bool) -> list[Case]:
        """Its cases, with some values of the shape replaced."""
        return self.cases(replace(self.base, **{**(self.quick if quick else {}), **overrides}), quick)


#: The shape that the project's speed and precision targets are stated for.
HEADLINE = Shape()
#: The same for one H100: every position is scored, so N is 8192.
GPU_HEADLINE = Shape(pairs=4, tokens=1024, hidden=4096, vocab=151936, masked=0.0)
_GPU_OTHERS = (
    replace(GPU_HEADLINE, vocab=128256),
    replace(GPU_HEADLINE, pairs=8, hidden=2048),
    replace(GPU_HEADLINE, hidden=1024),
    replace(GPU_HEADLINE, hidden=2304, vocab=256000, softcap=30.0),
)
_SMALL = Shape(hidden=512, vocab=32768)
_TINY = {"tokens": 64, "hidden": 256, "vocab": 8192}
_ON_GPUS = ("logitless@torch", "logitless@cuda", "logitless@triton")
_SWEEP = ("gemm", "torch", "trl", "liger", "logitless", "logitless:op", "logitless:small")


def _single(suite: str, task: str, **options: bool) -> Callable[[Shape, bool], list[Case]]:
    return lambda shape, quick: [Case(suite, task, shape, **options)]


def _sweep(suite: str) -> Callable[[Shape, bool], list[Case]]:
    """DPO on sequences of ``tokens``, and of half, a quarter ... as many."""

    def cases(shape: Shape, quick: bool) -> list[Case]:
        lengths = sorted({max(2, shape.tokens >> i) for i in range(3 if quick else 4)})
        return [Case(suite, "dpo", replace(shape, tokens=n)) for n in lengths]

    return cases


def _headline(shape: Shape, quick: bool) -> list[Case]:
    return [Case("dpo", task, shape) for task in (("dpo",) if quick else ("dpo", "nll"))]


def _losses(shape: Shape, quick: bool) -> list[Case]:
    return [Case("losses", task, shape) for task in LOSSES]


def _gpu(shape: Shape, quick: bool) -> list[Case]:
    """DPO trained, frozen and forward only: the headline first, so that a time limit leaves it in; another shape alone."""

    def three(one: Shape) -> list[Case]:
        case = Case("gpu", "dpo", one)
        return [case, replace(case, train_head=False), replace(case, backward=False)]

    if shape != GPU_HEADLINE:
        return three(shape)
    others = [] if quick else [three(one) for one in _GPU_OTHERS]
    return three(shape) + [case for kind in zip(*others) for case in kind]  # first all that are trained


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "dpo",
            "the headline: DPO with a trained head at the shape of the targets",
            _headline,
            HEADLINE,
            {},
            quick_providers=("gemm", "torch", "torch-compile", "trl", "liger", "logitless"),
        ),
        Suite("op", "log-probs under an arbitrary upstream gradient", _single("op", "logps"), _SMALL, _TINY),
        Suite("losses", "NLL and every preference loss", _losses, replace(_SMALL, tokens=128), _TINY),
        Suite("forward", "forward only", _single("forward", "logps", backward=False), HEADLINE, _TINY),
        Suite(
            "tile",
            "the element-wise pass alone, against a copy of the tile",
            _single("tile", "tile", backward=False),
            replace(HEADLINE, hidden=64),
            {"tokens": 64},
        ),
        Suite(
            "gpu",
            "DPO at the sizes of one H100: trained head, frozen head, forward only",
            _gpu,
            GPU_HEADLINE,
            {},
            ("gemm", "torch", "torch-compile", "trl", "liger", "cce", "logitless", *_ON_GPUS),
        ),
        Suite("frozen", "DPO with a frozen head", _single("frozen", "dpo", train_head=False), _SMALL, _TINY),
        Suite(
            "long",
            "DPO on long sequences, against their length",
            _sweep("long"),
            Shape(pairs=1, tokens=8192, hidden=256, vocab=32768),
            {"tokens": 1024, "vocab": 8192},
            _SWEEP,
        ),
        Suite(
            "vocab",
            "DPO with a vocabulary of 2^18",
            _single("vocab", "dpo"),
            Shape(tokens=128, hidden=512, vocab=262144),
            {"tokens": 32, "hidden": 128},
            _SWEEP,
        ),
        Suite(
            "masked",
            "DPO where nine tenths of each sequence is prompt",
            _single("masked", "dpo"),
            replace(_SMALL, tokens=512, masked=0.9),
            {**_TINY, "tokens": 128},
        ),
        Suite(
            "memory",
            "DPO: time and peak memory against sequence length",
            _sweep("memory"),
            Shape(tokens=1024, hidden=256, vocab=32768),
            {"tokens": 512, "vocab": 16384},
            _SWEEP,
            ("gemm", "torch", "trl", "liger", "logitless"),  # each of them is a process of its own at each length
        ),
        Suite(
            "train",
            "a whole step of TRL's DPOTrainer on a small transformer with random weights",
            _single("train", "train"),
            Shape(tokens=128, hidden=256, vocab=32768),
            {"tokens": 32, "hidden": 64, "vocab": 4096},
        ),
    )
}
