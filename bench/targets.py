"""The project's targets for the head: DPO with a trained head, forward only, GPUs, policy losses, and what needs no head."""

from __future__ import annotations

from dataclasses import replace

from .core.cases import Case, Shape
from .core.rows import OK
from .core.runner import CaseOutcome
from .core.targets import Target, quotient
from .suites import GPU_SHAPES, HEADLINE, SUITES

#: Suites whose targets are those of one H100.
ON_GPU = frozenset({"gpu", "gpu-losses", "policy-gpu"})
_SPOKEN = {"torch": "plain PyTorch", "logitless": "logitless"}
_TRL_SCORED = "time of TRL's function on scored tokens and its loss over logitless"
_POLICY_GEMMS = "time of logitless over the bare GEMMs on scored tokens"


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


def _targets(outcome: CaseOutcome) -> list[Target]:
    case, time = outcome.case, outcome.time

    def over(what: str, above: str, below: str, bound: float, at_least: bool = True) -> Target:
        return Target(f"time of {what}", quotient(time(above), time(below)), bound, at_least)

    def error(what: str, kind: str, above: str, below: str, bound: float, at_least: bool) -> Target:
        values = []
        for name in (above, below):
            row = outcome.row(name)
            values.append(None if row is None or row.status != OK or row.errors is None else getattr(row.errors, kind))
        return Target(f"{what} of {_SPOKEN[above]} over {_SPOKEN[below]}", quotient(*values), bound, at_least)

    if case.suite == "forward":
        return [over("logitless, forward only, over the bare GEMM", "logitless:op", "gemm", 1.15, False)]
    if case.suite == "tile":
        reached = quotient(time("copy"), time("pass@cpu"))
        return [Target("share of the copy's bandwidth that the C++ pass reaches", reached, 0.6, True)]
    if case.suite == "gae":
        loop = "loop:gae" if time("loop:gae") else "floats:gae"  # on a GPU the first would take minutes
        return [
            over("a loop over tokens over logitless", loop, "logitless:gae", 100.0),
            over("a loop over padded steps over logitless", "padded:gae", "logitless:gae", 1.0),
        ]
    if case.suite == "policy":
        return [
            Target(_TRL_SCORED, quotient(time("trl:policy-scored"), time("logitless:policy")), 3.0, True),
            Target(_POLICY_GEMMS, quotient(time("logitless:policy"), time("gemm:policy")), 1.15, False),
        ]
    if case.suite == "policy-gpu":
        return _gpu_targets(outcome, "logitless:policy", "gemm:policy", "torch:policy", "trl:policy-scored", "liger:policy")
    if case.suite in ON_GPU:
        return _gpu_targets(outcome, "logitless", "gemm", "torch", "trl", "liger")
    if case.suite != "dpo" or case.task != "dpo":
        return []
    return [
        over("plain PyTorch over logitless", "torch", "logitless", 2.5),
        over("Liger over logitless", "liger", "logitless", 2.0),
        over("TRL's function over logitless", "trl", "logitless", 6.0),
        over("logitless over the bare GEMMs", "logitless", "gemm", 1.15, False),
        error("max logp error", "token_logps", "torch", "logitless", 10.0, True),
        error("dX error", "dhidden", "logitless", "torch", 1.5, False),
        error("dW error", "dweight", "logitless", "torch", 1.5, False),
    ]


def _gpu_targets(outcome: CaseOutcome, logitless: str, gemm: str, torch: str, trl: str, liger: str) -> list[Target]:
    """The same for every loss; the providers have other names where tokens are packed."""
    case, time, row = outcome.case, outcome.time, outcome.row(logitless)
    policy, ours = case.suite == "policy-gpu", outcome.time(logitless)
    over_gemms = _POLICY_GEMMS if policy else "time of logitless over the bare GEMMs"
    found = [
        Target(over_gemms, quotient(ours, time(gemm)), 1.10, False),
        Target("time of plain PyTorch over logitless", quotient(time(torch), ours), 1.2, True),
    ]
    if case.backward:
        bound = 1.4 if case.train_head else 1.5
        over_trl = _TRL_SCORED if policy else "time of TRL's function over logitless"
        found.append(Target(over_trl, quotient(time(trl), ours), bound, True))
        if case.task not in ("ppo", "dapo-entropy"):  # Liger has neither
            found.append(Target("time of Liger over logitless", quotient(time(liger), ours), 3.0, True))
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
