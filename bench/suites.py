"""The suites: which cases on which shapes, and who takes part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cases import Case, Shape
from .losses import LOSSES


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


def _gpu_others(headline: Shape) -> list[Shape]:
    """The other shapes of an H100: N, H, V of well-known models."""
    return [
        replace(headline, vocab=128256),
        replace(headline, pairs=2 * headline.pairs, hidden=2048),
        replace(headline, hidden=1024),
        replace(headline, hidden=2304, vocab=256000, softcap=30.0),
    ]


#: All that the targets on a GPU are stated for, and where bare GEMMs are measured.
GPU_SHAPES = [GPU_HEADLINE, *_gpu_others(GPU_HEADLINE)]
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


def _three(case: Case) -> list[Case]:
    """Trained, frozen and forward only."""
    return [case, replace(case, train_head=False), replace(case, backward=False)]


def _on_gpu(suite: str, tasks: Sequence[str]) -> Callable[[Shape, bool], list[Case]]:
    """Each task trained, frozen and forward only; with the suite's own shape also at the others of an H100.

    The order is that in which a time limit should leave them in: the headline first, then all that are trained. What is
    forward only differs least from task to task.
    """

    def cases(shape: Shape, quick: bool) -> list[Case]:
        shapes = [shape, *(_gpu_others(shape) if shape == GPU_HEADLINE and not quick else [])]
        by_shape = [[_three(Case(suite, task, one)) for task in tasks] for one in shapes]
        first = [case for kind in zip(*by_shape[0]) for case in kind]
        rest = [kinds for of_shape in by_shape[1:] for kinds in of_shape]
        return first + [case for kind in zip(*rest) for case in kind]

    return cases


#: Ragged responses with as many scored tokens as the headline.
POLICY = Shape(pairs=4, tokens=170, spread=2.0)
#: The same at the size of one H100: again 8192 tokens are scored.
GPU_POLICY = replace(GPU_HEADLINE, pairs=8, masked=0.25, spread=3.0)
_RAGGED = 10.0
_FOR_POLICY = (
    "gemm:policy",
    "torch:policy",
    "torch:padded",
    "verl-style:policy",
    "trl:policy",
    "trl:policy-scored",
    "liger:policy",
    "logitless:policy",
    "logitless:policy-op",
)


def _policy(suite: str) -> Callable[[Shape, bool], list[Case]]:
    """The losses, a frozen head, an entropy bonus, and about as many tokens in responses of lengths 10:1."""

    def cases(shape: Shape, quick: bool) -> list[Case]:
        dapo = Case(suite, "dapo", shape)
        # N is a multiple of 64 at the suites' own shapes: 766 tokens took the bare GEMMs a quarter longer than 768 (seen)
        longer = replace(shape, tokens=math.ceil(1.25 * shape.tokens), spread=_RAGGED)
        headline = [
            dapo,
            replace(dapo, train_head=False),
            replace(dapo, task="dapo-entropy", shape=replace(shape, logits="peaked")),
            replace(dapo, shape=longer),
            replace(dapo, task="ppo"),
        ]
        if suite != "policy-gpu":
            return headline
        others = [_three(replace(dapo, shape=one)) for one in (_gpu_others(shape) if shape == GPU_POLICY and not quick else [])]
        trained_and_frozen, forward = [c for kind in list(zip(*others))[:2] for c in kind], [c[2] for c in others]
        return [*headline, *trained_and_frozen, replace(dapo, backward=False), *forward]

    return cases


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
            _on_gpu("gpu", ("dpo",)),
            GPU_HEADLINE,
            {},
            ("gemm", "torch", "torch-compile", "trl", "liger", "cce", "logitless", *_ON_GPUS),
        ),
        Suite(
            "gpu-losses",
            "SimPO, ORPO and KTO at the same sizes",
            _on_gpu("gpu-losses", ("simpo", "orpo", "kto")),
            GPU_HEADLINE,
            {},
            ("gemm", "torch", "trl", "liger", "cce", "logitless"),
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
            "policy",
            "one update of policy training: GRPO's and PPO's losses on packed responses of different lengths",
            _policy("policy"),
            POLICY,
            _TINY,
            _FOR_POLICY,
        ),
        Suite(
            "policy-gpu",
            "the same at the size of one H100",
            _policy("policy-gpu"),
            GPU_POLICY,
            {},
            (*_FOR_POLICY, *(f"logitless:policy{op}@{name}" for op in ("", "-op") for name in ("torch", "cuda", "triton"))),
        ),
        Suite(
            "gae",
            "generalized advantage estimation of 1M packed tokens",
            _single("gae", "gae", backward=False),
            Shape(pairs=512, tokens=1862, hidden=1, vocab=2, masked=0.0, dtype="fp32", spread=_RAGGED),
            {"pairs": 64},
        ),
    )
}
