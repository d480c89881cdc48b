"""The suites of the head's benchmark: which cases on which shapes, and which providers take part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .core.cases import Case, Shape, Suite
from .core.registry import PROVIDERS
from .losses import PREFERENCE_LOSSES

#: Cases of a shape; the flag says whether ``--quick`` was given.
Cases = Callable[[Shape, bool], list[Case]]

#: The shape that the project's speed and precision targets are stated for.
HEADLINE = Shape()
#: The same for one H100: every position is scored, so N is 8192.
GPU_HEADLINE = Shape(pairs=4, tokens=1024, hidden=4096, vocab=151936, masked=0.0)
#: Ragged responses with as many scored tokens as the headline.
POLICY = Shape(pairs=4, tokens=170, spread=2.0)
#: The same at the size of one H100: again 8192 tokens are scored.
GPU_POLICY = replace(GPU_HEADLINE, pairs=8, masked=0.25, spread=3.0)
_SMALL = Shape(hidden=512, vocab=32768)
_TINY = {"tokens": 64, "hidden": 256, "vocab": 8192}
_MASKED = replace(_SMALL, tokens=512, masked=0.9)
_TILE = replace(HEADLINE, hidden=64)
_LONG = Shape(pairs=1, tokens=8192, hidden=256, vocab=32768)
_LENGTHS = Shape(tokens=1024, hidden=256, vocab=32768)
_VOCAB = Shape(tokens=128, hidden=512, vocab=262144)
_RAGGED = 10.0
_GAE = Shape(pairs=512, tokens=1862, hidden=1, vocab=2, masked=0.0, dtype="fp32", spread=_RAGGED)
_GPU_HELP = "DPO at the sizes of one H100: trained head, frozen head, forward only"
_MEMORY_HELP = "DPO: time and peak memory against sequence length"
_POLICY_HELP = "one update of policy training: GRPO's and PPO's losses on packed responses of different lengths"


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


def _at(*names: str) -> tuple[str, ...]:
    """Our providers on each backend of a GPU."""
    return tuple(f"{name}@{backend}" for name in names for backend in ("torch", "cuda", "triton"))


def _each(*tasks: str, **options: bool) -> Cases:
    """One case per task."""
    return lambda shape, quick: [Case("", task, shape, **options) for task in tasks]


def _headline(shape: Shape, quick: bool) -> list[Case]:
    return _each("dpo", *(() if quick else ("nll",)))(shape, quick)


def _sweep(shape: Shape, quick: bool) -> list[Case]:
    """DPO on sequences of ``tokens``, and of half, a quarter ... as many."""
    lengths = sorted({max(2, shape.tokens >> i) for i in range(3 if quick else 4)})
    return [Case("", "dpo", replace(shape, tokens=n)) for n in lengths]


def _three(case: Case) -> list[Case]:
    """Trained, frozen and forward only."""
    return [case, replace(case, train_head=False), replace(case, backward=False)]


def _on_gpu(*tasks: str) -> Cases:
    """Each task trained, frozen and forward only; with the suite's own shape also at the others of an H100.

    A time limit cuts off the end: the headline comes first, then all that are trained, and what is forward only, which
    differs least from task to task, last.
    """

    def cases(shape: Shape, quick: bool) -> list[Case]:
        shapes = [shape, *(_gpu_others(shape) if shape == GPU_HEADLINE and not quick else [])]
        by_shape = [[_three(Case("", task, one)) for task in tasks] for one in shapes]
        first = [case for kind in zip(*by_shape[0]) for case in kind]
        rest = [kinds for of_shape in by_shape[1:] for kinds in of_shape]
        return first + [case for kind in zip(*rest) for case in kind]

    return cases


def _policy(shape: Shape, quick: bool) -> list[Case]:
    """The losses, a frozen head, an entropy bonus, and about as many tokens in responses of lengths 10:1."""
    dapo = Case("", "dapo", shape)
    # N is a multiple of 64 at the suites' own shapes: the bare GEMMs took a quarter longer for 766 tokens than for 768
    longer = replace(shape, tokens=math.ceil(1.25 * shape.tokens), spread=_RAGGED)
    return [
        dapo,
        replace(dapo, train_head=False),
        replace(dapo, task="dapo-entropy", shape=replace(shape, logits="peaked")),
        replace(dapo, shape=longer),
        replace(dapo, task="ppo"),
    ]


def _policy_on_gpu(shape: Shape, quick: bool) -> list[Case]:
    """The same, forward only, and GRPO at the other shapes of an H100."""
    headline = _policy(shape, quick)
    others = _gpu_others(shape) if shape == GPU_POLICY and not quick else []
    kinds = list(zip(*(_three(replace(headline[0], shape=one)) for one in others))) or [()] * 3
    return [*headline, *kinds[0], *kinds[1], replace(headline[0], backward=False), *kinds[2]]


_PEERS = ("gemm", "torch", "trl", "liger", "logitless")
_QUICK = (*_PEERS, "torch-compile")
_SWEEP = (*_PEERS, "logitless:op", "logitless:small")
_GPU = (*_PEERS, "cce")
_FOR_POLICY = (
    *("gemm:policy", "torch:policy", "torch:padded", "verl-style:policy", "trl:policy", "trl:policy-scored", "liger:policy"),
    *("logitless:policy", "logitless:policy-op"),
)
_FOR_POLICY_GPU = (*_FOR_POLICY, *_at("logitless:policy", "logitless:policy-op"))


def _suite(
    name: str,
    about: str,
    cases: Cases,
    base: Shape,
    quick: Mapping[str, Any],
    providers: tuple[str, ...] = (),
    quick_providers: tuple[str, ...] = (),
) -> Suite:
    """A suite with its base shape, and what ``--quick`` changes in it."""

    def make(overrides: Mapping[str, Any], is_quick: bool) -> list[Case]:
        shape = replace(base, **{**(quick if is_quick else {}), **overrides})
        return [replace(case, suite=name) for case in cases(shape, is_quick)]

    return Suite(name, about, make, providers, quick_providers, base)


_ALL = [
    _suite("dpo", "the headline: DPO with a trained head at the shape of the targets", _headline, HEADLINE, {}, (), _QUICK),
    _suite("op", "log-probs under an arbitrary upstream gradient", _each("logps"), _SMALL, _TINY),
    _suite("losses", "NLL and every preference loss", _each(*PREFERENCE_LOSSES), replace(_SMALL, tokens=128), _TINY),
    _suite("forward", "forward only", _each("logps", backward=False), HEADLINE, _TINY),
    _suite(
        "tile", "the element-wise pass alone, against a copy of the tile", _each("tile", backward=False), _TILE, {"tokens": 64}
    ),
    _suite("gpu", _GPU_HELP, _on_gpu("dpo"), GPU_HEADLINE, {}, (*_GPU, "torch-compile", *_at("logitless"))),
    _suite("gpu-losses", "SimPO, ORPO and KTO at the same sizes", _on_gpu("simpo", "orpo", "kto"), GPU_HEADLINE, {}, _GPU),
    _suite("frozen", "DPO with a frozen head", _each("dpo", train_head=False), _SMALL, _TINY),
    _suite("long", "DPO on long sequences, against their length", _sweep, _LONG, {"tokens": 1024, "vocab": 8192}, _SWEEP),
    _suite("vocab", "DPO with a vocabulary of 2^18", _each("dpo"), _VOCAB, {"tokens": 32, "hidden": 128}, _SWEEP),
    _suite("masked", "DPO where nine tenths of each sequence is prompt", _each("dpo"), _MASKED, {**_TINY, "tokens": 128}),
    _suite("memory", _MEMORY_HELP, _sweep, _LENGTHS, {"tokens": 512, "vocab": 16384}, _SWEEP, _PEERS),
    _suite("policy", _POLICY_HELP, _policy, POLICY, _TINY, _FOR_POLICY),
    _suite("policy-gpu", "the same at the size of one H100", _policy_on_gpu, GPU_POLICY, {}, _FOR_POLICY_GPU),
    _suite("gae", "generalized advantage estimation of 1M packed tokens", _each("gae", backward=False), _GAE, {"pairs": 64}),
]
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}


def default_providers(suite: str, quick: bool) -> list[str]:
    """The providers of a suite that compute one of its tasks, in the order of the registry."""
    tasks = {case.task for case in SUITES[suite].make({}, quick)}
    chosen = (quick and SUITES[suite].quick_providers) or SUITES[suite].providers
    return [
        name
        for name, provider in PROVIDERS.items()
        if provider.tasks & tasks and (name in chosen if chosen else provider.quick or not quick)
    ]
