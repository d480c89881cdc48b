"""A policy loss as the engine's job: tokens in, one coefficient a token out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.kernels.core.stats import RowStats
from logitless.kernels.planner.plan import Plan, Step

from ..job import Coefficients, Job
from ..preference.job import check_leaves
from .loss import PolicyLoss, PolicyLossResult, Tokens


@dataclass
class PolicyReport:
    """What came of a call besides the loss; detached, (N,) each, in the order of the entries.

    Attributes:
        logps, old_logps: log-probabilities under the policy, and those that it was compared with.
        metrics: of the loss function.
        bonus_mask: bool; ``None``: all.
    """

    plan: Plan
    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor | None
    entropies: Tensor | None
    metrics: dict[str, Tensor]


@dataclass
class PolicyJob(Job):
    """One policy loss over the tokens of a batch; all tensors are in the order of the entries.

    Attributes:
        loss: the loss function.
        weights: (N,) what a token's loss is multiplied by.
        inputs: (N,) tensors; ``advantages`` and, where given, ``old_logps`` and ``ref_logps`` among them.
        sequence_inputs: (S,) tensors, by sequence.
        entropy_coef: weight of the entropy bonus.
        bonus_weights: (N,) of a token's entropy in the bonus; ``None``: their mean over the loss's ``bonus_mask``, times
            ``bonus_share``.
        bonus_share: of this call in the batch; a number or 0-dim.
    """

    loss: PolicyLoss
    weights: Tensor
    inputs: Mapping[str, Tensor]
    sequence_inputs: Mapping[str, Tensor]
    entropy_coef: float
    bonus_weights: Tensor | None
    bonus_share: float | Tensor

    @property
    def loss_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"entropy"} if self.loss.uses_entropy or self.entropy_gradient else ())

    @property
    def token_groups(self) -> bool:  # type: ignore[override]
        return self.loss.group == "token"

    @property
    def entropy_gradient(self) -> bool:  # type: ignore[override]
        return self.loss.entropy_gradient or self.entropy_coef != 0

    def evaluation(self, wide: torch.dtype, device: torch.device) -> PolicyEvaluation:
        return PolicyEvaluation(self, wide, device)


class PolicyEvaluation:
    """Evaluates the loss on the tokens of one step and keeps what came of them. See :class:`Evaluates`."""

    def __init__(self, job: PolicyJob, wide: torch.dtype, device: torch.device) -> None:
        self.job, self.wide = job, wide
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.parts: list[dict[str, Tensor]] = []
        self.first_of = [0, *itertools.accumulate(map(len, job.entries.groups))]  # sequences before each group
        sizes = torch.tensor([job.entries.sequence_sizes[s] for group in job.entries.groups for s in group], device="cpu")
        self.ends = torch.nn.functional.pad(sizes.cumsum(0).long(), (1, 0))  # in the order of the entries

    def _offsets(self, step: Step) -> tuple[list[int], Tensor]:
        """The sequences of the step, and where each starts and ends among its tokens."""
        groups = self.job.entries.groups
        before = self.first_of[step.first_group]
        sequences = [s for group in groups[step.first_group : step.last_group] for s in group]
        offsets = self.ends[before : before + len(sequences) + 1] - step.start
        return sequences, offsets.to(self.loss.device)

    def coefficients(self, step: Step, stats: RowStats, ref_token_logps: Tensor | None, needs_grad: bool) -> Coefficients:
        job, span = self.job, slice(step.start, step.stop)
        sequences, offsets = ([], None) if job.token_groups else self._offsets(step)
        inputs = {name: value[span].to(self.wide) for name, value in job.inputs.items()}
        for name, value in job.sequence_inputs.items():
            inputs[name] = value[torch.tensor(sequences, dtype=torch.long, device=value.device)].to(self.wide)
        with torch.enable_grad():
            logps = stats.logps.to(self.wide).requires_grad_(needs_grad)
            entropies = None if stats.entropy is None else stats.entropy.to(self.wide)
            # the bonus has a leaf of its own, so that a gradient that the loss did not declare is seen
            bonus = seen = entropies
            if entropies is not None:
                seen = entropies.detach().requires_grad_(needs_grad)
                bonus = entropies.detach().requires_grad_(needs_grad and job.entropy_coef != 0)
            ref = inputs.pop("ref_logps", None if ref_token_logps is None else ref_token_logps.to(self.wide))
            old = inputs.pop("old_logps", None)
            tokens = Tokens(
                logps=logps,
                old_logps=logps.detach() if old is None else old,
                advantages=inputs.pop("advantages"),
                ref_logps=ref,
                entropies=seen,
                inputs=inputs,
                offsets=offsets,
            )
            result = job.loss(tokens)
            _check_result(result, len(logps))
            check_leaves(result.losses, [logps] if seen is None else [logps, seen])
            if needs_grad and not result.losses.requires_grad:
                raise ValueError("the loss function's losses do not depend on tokens.logps, or were detached from them")
            total = (result.losses * job.weights[span]).sum()
            if job.entropy_coef != 0:
                assert bonus is not None
                total = total - job.entropy_coef * (bonus * self._bonus_weights(result, span)).sum()
            gradients: list[Tensor | None] = [None, None]
            if needs_grad:
                leaves = [x for x in (logps, seen, bonus) if x is not None and x.requires_grad]
                found = dict(zip(map(id, leaves), torch.autograd.grad(total, leaves, allow_unused=True), strict=True))
                of_logps, of_seen, of_bonus = (found.get(id(x)) for x in (logps, seen, bonus))
                if of_seen is not None and not job.loss.entropy_gradient:
                    raise ValueError("the loss function's losses depend on tokens.entropies: declare entropy_gradient=True")
                gradients[0] = torch.zeros_like(logps) if of_logps is None else of_logps
                if entropies is not None and job.entropy_gradient:
                    gradients[1] = sum((g for g in (of_seen, of_bonus) if g is not None), torch.zeros_like(entropies))
        self.loss += total.detach()
        kept = {"logps": tokens.logps, "old_logps": tokens.old_logps, "ref_logps": ref, "entropies": entropies}
        part = {name: value.detach() for name, value in kept.items() if value is not None}
        part |= {"metrics/" + name: value.detach() for name, value in result.metrics.items()}
        self.parts.append(part)
        return Coefficients(*(None if g is None else g.to(stats.logps.dtype) for g in gradients))

    def _bonus_weights(self, result: PolicyLossResult, span: slice) -> Tensor:
        if self.job.bonus_weights is not None:
            weights = self.job.bonus_weights[span]
            return weights if result.bonus_mask is None else weights * result.bonus_mask
        # a mask that is known only now, over the whole batch: the loss is of group "batch"
        assert result.bonus_mask is not None
        mask = result.bonus_mask.to(self.wide)
        return mask / mask.sum().clamp(min=1) * self.job.bonus_share

    def report(self, plan: Plan, tokens: dict[str, Tensor], dtype: torch.dtype) -> PolicyReport:
        if any(part.keys() != self.parts[0].keys() for part in self.parts):
            raise ValueError("the loss function returned other metrics for one part of the batch than for another")
        joined = {name: torch.cat([part[name] for part in self.parts]) for name in self.parts[0]}
        metrics = {name.removeprefix("metrics/"): value for name, value in joined.items() if name.startswith("metrics/")}
        named = {name: joined[name].to(dtype) if name in joined else None for name in ("ref_logps", "entropies")}
        if "entropy" in tokens:
            named["entropies"] = tokens["entropy"]
        return PolicyReport(
            plan, joined["logps"].to(dtype), joined["old_logps"].to(dtype), named["ref_logps"], named["entropies"], metrics
        )


def _check_result(result: PolicyLossResult, count: int) -> None:
    """What a loss function returned: one value a token, in tensors."""
    mask = result.bonus_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (count,)):
        what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"the loss function returned bonus_mask as {what}; it must be bool with one value a token: ({count},)")
    named: dict[str, object] = {"losses": result.losses}
    named.update({f"metrics[{name!r}]": value for name, value in result.metrics.items()})
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss function returned {name} of type {type(value).__name__}; it must be a torch.Tensor")
        if tuple(value.shape) != (count,) or not value.is_floating_point():
            raise ValueError(
                f"the loss function returned {name} of shape {tuple(value.shape)} and {value.dtype}; it must be floating point "
                f"with one value a token: ({count},)"
            )
