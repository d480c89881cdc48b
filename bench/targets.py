"""The figures that the project set itself, and what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cases import Case, Shape
from .runner import OK, Outcome, is_number
from .suites import GPU_SHAPES, HEADLINE, SUITES

#: Suites whose targets are those of one H100.
ON_GPU = frozenset({"gpu", "gpu-losses", "policy-gpu"})


@dataclass(frozen=True)
class Target:
    """A figure that the project set itself, and what came out.

    Attributes:
        what: in words. value: measured, ``None`` where a row that it needs is not there or not right.
        bound: the target. at_least: whether the value must reach the bound or stay below it.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        if self.value is None:
            return f"{self.what}: not measured (target {sign} {self.bound:g})"
        return f"{self.what}: {self.value:.2f} (target {sign} {self.bound:g}: {'met' if self.met else 'missed'})"

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "value": self.value, "bound": self.bound, "at_least": self.at_least, "met": self.met}


def stated_for(case: Case) -> list[Shape]:
    """The shapes for which the targets of a case's suite are stated."""
    if case.suite in ("policy", "policy-gpu", "gae"):
        return [own.shape for own in SUITES[case.suite].make({}, False)]
    return GPU_SHAPES if case.suite in ON_GPU else [HEADLINE]


def quotient(above: float | None, below: float | None) -> float | None:
    if above is None or not below or not is_number(above) or not is_number(below):
        return None
    return above / below


def targets(outcome: Outcome) -> list[Target]:
    """The project's targets for DPO with a trained head, forward only, what runs on a GPU, policy losses, and what needs no
    head; other cases have none.
    """
    case = outcome.case

    def time(name: str) -> float | None:
        row = outcome.row(name)
        return None if row is None else row.median

    def error(name: str, kind: str) -> float | None:
        row = outcome.row(name)
        return None if row is None or row.status != OK or row.errors is None else getattr(row.errors, kind)

    if case.suite == "forward":
        ratio = quotient(time("logitless:op"), time("gemm"))
        return [Target("time of logitless, forward only, over the bare GEMM", ratio, 1.15, False)]
    if case.suite == "tile":
        reached = quotient(time("copy"), time("pass@cpu"))
        return [Target("share of the copy's bandwidth that the C++ pass reaches", reached, 0.6, True)]
    if case.suite == "gae":
        ours = time("logitless:gae")
        loop = time("loop:gae") or time("floats:gae")  # on a GPU, where the first would take minutes
        return [
            Target("time of a loop over tokens over logitless", quotient(loop, ours), 100.0, True),
            Target("time of a loop over padded steps over logitless", quotient(time("padded:gae"), ours), 1.0, True),
        ]
    if case.suite == "policy":
        return [
            Target(_TRL_SCORED, quotient(time("trl:policy-scored"), time("logitless:policy")), 3.0, True),
            Target(_POLICY_GEMMS, quotient(time("logitless:policy"), time("gemm:policy")), 1.15, False),
            _flop_target(outcome),
        ]
    if case.suite == "policy-gpu":
        names = ("logitless:policy", "gemm:policy", "torch:policy", "trl:policy-scored", "liger:policy")
        return [*_gpu_targets(outcome, time, *names), _flop_target(outcome)]
    if case.suite in ON_GPU:
        return _gpu_targets(outcome, time, "logitless", "gemm", "torch", "trl", "liger")
    if case.suite != "dpo" or case.task != "dpo":
        return []
    ours = time("logitless")
    return [
        Target("time of plain PyTorch over logitless", quotient(time("torch"), ours), 2.5, True),
        Target("time of Liger over logitless", quotient(time("liger"), ours), 2.0, True),
        Target("time of TRL's function over logitless", quotient(time("trl"), ours), 6.0, True),
        Target("time of logitless over the bare GEMMs", quotient(ours, time("gemm")), 1.15, False),
        *(
            Target(f"{what} of {first} over {second}", quotient(error(a, kind), error(b, kind)), bound, at_least)
            for what, kind, a, b, bound, at_least in (
                ("max logp error", "token_logps", "torch", "logitless", 10.0, True),
                ("dX error", "dhidden", "logitless", "torch", 1.5, False),
                ("dW error", "dweight", "logitless", "torch", 1.5, False),
            )
            for first, second in ((_SPOKEN[a], _SPOKEN[b]),)
        ),
    ]


_SPOKEN = {"torch": "plain PyTorch", "logitless": "logitless"}
_TRL_SCORED = "time of TRL's function on scored tokens and its loss over logitless"
_POLICY_GEMMS = "time of logitless over the bare GEMMs on scored tokens"


def _gpu_targets(
    outcome: Outcome, time: Callable[[str], float | None], logitless: str, gemm: str, torch: str, trl: str, liger: str
) -> list[Target]:
    """The same for every loss; the providers are called otherwise where tokens are packed."""
    case, ours, row = outcome.case, time(logitless), outcome.row(logitless)
    policy = case.suite == "policy-gpu"
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


def _flop_target(outcome: Outcome) -> Target:
    shape, row = outcome.case.shape, outcome.row("logitless:policy")
    flops = None if row is None or row.status != OK else row.flops
    ratio = quotient(flops, shape.scored * shape.hidden * shape.vocab)
    return Target("FLOP of logitless over N H V", ratio, 2 * outcome.case.gemms + 0.02, False)
