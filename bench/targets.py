"""The project's targets for the head: DPO with a trained head, forward only, GPUs, policy losses, and what needs no head."""

from __future__ import annotations

from dataclasses import replace

from .core.cases import Case, Shape
from .core.report import Target, quotient
from .core.rows import OK
from .core.runner import CaseOutcome
from .suites import GPU_SHAPES, HEADLINE, SUITES

#: Suites whose targets are those of one H100.
ON_GPU = frozenset({"gpu", "gpu-losses", "policy-gpu"})
_TRL_SCORED = "TRL's function on scored tokens and its loss over logitless"
_OVER_GEMMS, _OVER_SCORED = "logitless over the bare GEMMs", "logitless over the bare GEMMs on scored tokens"


def _stated_shapes(case: Case) -> list[Shape]:
    """The shapes for which the targets of a case's suite are stated."""
    if case.suite in ("policy", "policy-gpu", "gae"):
        return [own.shape for own in SUITES[case.suite].make({}, False)]
    return GPU_SHAPES if case.suite in ON_GPU else [HEADLINE]


def targets(outcome: CaseOutcome) -> list[Target]:
    """The targets of a case, of which other cases have none; at other shapes they are marked as not stated."""
    case, shapes = outcome.case, _stated_shapes(outcome.case)
    words = f"{shapes[0]}, on {'one H100' if case.suite in ON_GPU else 'a 2-core CPU machine'}"
    stated = case.task == "tile" or case.shape in shapes
    flop = [_flop_target(outcome)] if case.suite in ("policy", "policy-gpu") else []  # of every shape
    return [*(replace(target, stated=stated, stated_for=words) for target in _targets(outcome)), *flop]


def _over(outcome: CaseOutcome, what: str, above: str, below: str, bound: float, at_least: bool = True) -> Target:
    """A ratio of times."""
    return Target(f"time of {what}", quotient(outcome.time(above), outcome.time(below)), bound, at_least)


def _targets(outcome: CaseOutcome) -> list[Target]:
    case = outcome.case
    if case.suite == "forward":
        return [_over(outcome, "logitless, forward only, over the bare GEMM", "logitless:op", "gemm", 1.15, False)]
    if case.suite == "tile":
        reached = quotient(outcome.time("copy"), outcome.time("pass@cpu"))
        return [Target("share of the copy's bandwidth that the C++ pass reaches", reached, 0.6, True)]
    if case.suite == "gae":
        loop = "loop:gae" if outcome.time("loop:gae") else "floats:gae"  # on a GPU the first would take minutes
        return [
            _over(outcome, "a loop over tokens over logitless", loop, "logitless:gae", 100.0),
            _over(outcome, "a loop over padded steps over logitless", "padded:gae", "logitless:gae", 1.0),
        ]
    if case.suite == "policy":
        return [
            _over(outcome, _TRL_SCORED, "trl:policy-scored", "logitless:policy", 3.0),
            _over(outcome, _OVER_SCORED, "logitless:policy", "gemm:policy", 1.15, False),
        ]
    if case.suite == "policy-gpu":
        return _gpu_targets(outcome, "logitless:policy", "gemm:policy", "torch:policy", "trl:policy-scored", "liger:policy")
    if case.suite in ON_GPU:
        return _gpu_targets(outcome, "logitless", "gemm", "torch", "trl", "liger")
    if case.suite != "dpo" or case.task != "dpo":
        return []
    plain, ours = (row.errors if row and row.status == OK else None for row in map(outcome.row, ("torch", "logitless")))
    ratios = {
        kind: [quotient(getattr(a, kind, None), getattr(b, kind, None)) for a, b in ((plain, ours), (ours, plain))]
        for kind in ("token_logps", "dhidden", "dweight")
    }
    return [
        _over(outcome, "plain PyTorch over logitless", "torch", "logitless", 2.5),
        _over(outcome, "Liger over logitless", "liger", "logitless", 2.0),
        _over(outcome, "TRL's function over logitless", "trl", "logitless", 6.0),
        _over(outcome, _OVER_GEMMS, "logitless", "gemm", 1.15, False),
        Target("max logp error of plain PyTorch over logitless", ratios["token_logps"][0], 10.0, True),
        Target("dX error of logitless over plain PyTorch", ratios["dhidden"][1], 1.5, False),
        Target("dW error of logitless over plain PyTorch", ratios["dweight"][1], 1.5, False),
    ]


def _gpu_targets(outcome: CaseOutcome, logitless: str, gemm: str, torch: str, trl: str, liger: str) -> list[Target]:
    """The same for every loss; the providers have other names where tokens are packed."""
    case, row, policy = outcome.case, outcome.row(logitless), outcome.case.suite == "policy-gpu"
    found = [
        _over(outcome, _OVER_SCORED if policy else _OVER_GEMMS, logitless, gemm, 1.10, False),
        _over(outcome, "plain PyTorch over logitless", torch, logitless, 1.2),
    ]
    if case.backward:
        over_trl = _TRL_SCORED if policy else "TRL's function over logitless"
        found.append(_over(outcome, over_trl, trl, logitless, 1.4 if case.train_head else 1.5))
        if case.task not in ("ppo", "dapo-entropy"):  # Liger has neither
            found.append(_over(outcome, "Liger over logitless", liger, logitless, 3.0))
    other = any((case.shape.hidden, case.shape.vocab) == (one.hidden, one.vocab) for one in GPU_SHAPES[1:])
    if case.train_head and case.backward and not other:
        extra = None if row is None or row.status != OK or row.extra_bytes is None else row.extra_bytes / 2**30
        found.append(Target("extra GiB of logitless", extra, 4.5, False))
    return found


def _flop_target(outcome: CaseOutcome) -> Target:
    shape, row = outcome.case.shape, outcome.row("logitless:policy")
    flops = None if row is None or row.status != OK else row.flops
    ratio = quotient(flops, shape.scored * shape.hidden * shape.vocab)
    return Target("FLOP of logitless over N H V", ratio, 2 * outcome.case.gemms + 0.02, False)
