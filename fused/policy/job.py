"""A policy loss as the engine's job: the loss function gets log-probabilities of tokens, autograd one coefficient for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from logitless.kernels.backends.interface import ElementWise
from logitless.kernels.core.stats import RowStats
from logitless.kernels.planner.plan import Plan
from logitless.kernels.planner.steps import Step

from ..job import Coefficients, Job
from ..num_items import over
from ..results import check_leaves, check_returned, mean_or_zero
from ..scored_tokens import ScoredTokens, find_scored_tokens
from ..sequence_group import WholeSequences
from .aggregation import Aggregation
from .inputs import InputOptions, PolicyInputs, TokenInputs
from .loss import PolicyLoss, PolicyLossResult, Tokens

#: What the entropies are multiplied by in the bonus: the weights of the losses; one over the number of scored tokens; one over
#: the number of tokens in the loss function's ``bonus_mask``.
BonusWeights = Literal["losses", "token-mean", "masked-mean"]


@dataclass
class PolicyReport:
    """What a call computed besides the loss; detached, (N,) each, in the order of ``tokens``.

    Attributes:
        logps, old_logps: log-probabilities under the policy, and those that it was compared with.
        metrics: of the loss function.
    """

    plan: Plan
    tokens: ScoredTokens
    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor | None
    entropies: Tensor | None
    metrics: dict[str, Tensor]
    whole: WholeSequences | None  # the sequences, where several ranks share them; N tokens are this rank's

    def token_means(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the scored tokens, those of all ranks that share the sequences; 0 without any. (N,) each -> 0-dim."""
        if self.whole is None or not named:
            return {name: mean_or_zero(values) for name, values in named.items()}
        sums = torch.stack([values.sum(dtype=self.whole.lengths.dtype) for values in named.values()])
        means = self.whole.sums(sums) / self.whole.lengths.sum().clamp(min=1)
        return dict(zip(named, means, strict=True))

    def sequence_means(self, named: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Means over the scored tokens of each sequence (S,), 0 without any, and which sequences have some. (N,) each."""
        sequences, sizes = self.tokens.sequences, self.tokens.sequence_sizes
        values = torch.stack(list(named.values()))
        sums = values.new_zeros(len(named), len(sizes)).index_add_(1, sequences, values)
        if self.whole is None:
            lengths = torch.tensor(sizes, dtype=values.dtype, device=values.device)
        else:
            sums, lengths = self.whole.sums(sums), self.whole.lengths
        return dict(zip(named, sums / lengths.clamp(min=1), strict=True)), lengths > 0


@dataclass(frozen=True)
class PolicyJob(Job[PolicyReport]):
    """One policy loss over the tokens of a batch.

    Attributes:
        loss: the loss function.
        inputs: advantages, log-probabilities and what else was given.
        input_options: how to read them.
        aggregation: how the losses of tokens become one number.
        entropy_coef: weight of the entropy bonus.
        bonus_weights: see :data:`BonusWeights`.
    """

    loss: PolicyLoss
    inputs: PolicyInputs
    input_options: InputOptions
    aggregation: Aggregation
    entropy_coef: float
    bonus_weights: BonusWeights

    @property
    def loss_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"entropy"} if self.loss.uses_entropy or self.entropy_gradient else ())

    @property
    def token_groups(self) -> bool:  # type: ignore[override]
        return self.loss.group == "token"

    @property
    def entropy_gradient(self) -> bool:  # type: ignore[override]
        return self.loss.entropy_gradient or self.entropy_coef != 0

    def scored_tokens(self) -> ScoredTokens:
        sequences = range(self.call.num_sequences)
        together = self.loss.group == "batch" or self.call.sequence_group is not None
        return find_scored_tokens(self.call, [sequences] if together else [[s] for s in sequences])

    def evaluation(self, tokens: ScoredTokens, elementwise: ElementWise) -> PolicyEvaluation:
        some = len(tokens) > 0
        num_items = self.aggregation.num_items.checked(some, some, tokens.device, self.call.wide_dtype)
        aggregation = replace(self.aggregation, num_items=num_items)
        add, whole = elementwise.segment_sum, None
        if self.call.sequence_group is not None:
            whole = WholeSequences.of(tokens, self.call.sequence_group, self.call.wide_dtype)
            add = whole.segment_sum(add)
        inputs = self.inputs.gather(self.call, tokens, self.input_options, add)
        return PolicyEvaluation(self, tokens, inputs, aggregation, elementwise.segment_sum, whole)


@dataclass
class _Part:
    """What one step leaves for the report, (n,) each; detached."""

    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor | None
    entropies: Tensor | None
    metrics: dict[str, Tensor]


class PolicyEvaluation:
    """Evaluates the loss on the tokens of one step and keeps the results. See :class:`~logitless.fused.job.Evaluation`."""

    def __init__(
        self,
        job: PolicyJob,
        tokens: ScoredTokens,
        inputs: TokenInputs,
        aggregation: Aggregation,
        add: Callable[[Tensor, Tensor], Tensor],  # a backend's segment_sum
        whole: WholeSequences | None,
    ) -> None:
        self.job, self.tokens, self.inputs, self.add, self.whole = job, tokens, inputs, add, whole
        self.wide = job.call.wide_dtype
        self.loss = torch.zeros((), dtype=self.wide, device=tokens.device)
        self.parts: list[_Part] = []
        self.weights = aggregation.token_weights(tokens, self.wide, whole)
        self.num_tokens = aggregation.num_tokens(tokens, whole)

    def coefficients(self, step: Step, stats: RowStats, ref_logps: Tensor | None, needs_grad: bool) -> Coefficients:
        job, span = self.job, slice(step.start, step.stop)
        with torch.enable_grad():
            logps = stats.logps.to(self.wide).requires_grad_(needs_grad)
            entropies = None if stats.entropy is None else stats.entropy.to(self.wide)
            # the bonus has a leaf of its own, so that a gradient that the loss did not declare is seen
            bonus = seen = entropies
            if entropies is not None:
                seen = entropies.detach().requires_grad_(needs_grad)
                bonus = entropies.detach().requires_grad_(needs_grad and job.entropy_coef != 0)
            tokens = self._tokens(step, logps, seen, ref_logps)
            result = job.loss(tokens)
            _check_result(result, len(logps))
            check_leaves(result.losses, [logps] if seen is None else [logps, seen])
            if needs_grad and not result.losses.requires_grad:
                raise ValueError("the loss function's losses do not depend on tokens.logps, or were detached from them")
            total = (result.losses * self.weights[span]).sum()
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
        metrics = {name: value.detach() for name, value in result.metrics.items()}
        self.parts.append(_Part(logps.detach(), tokens.old_logps, tokens.ref_logps, entropies, metrics))
        return Coefficients(*(None if g is None else g.to(stats.logps.dtype) for g in gradients))

    def _tokens(self, step: Step, logps: Tensor, entropies: Tensor | None, ref_logps: Tensor | None) -> Tokens:
        """What the loss function gets. ``ref_logps`` (n,): where the reference's states were scored."""
        given, wide, span = self.inputs, self.wide, slice(step.start, step.stop)

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[span].to(wide)

        inputs = {name: value[span].to(wide) for name, value in given.others.items()}
        offsets, whole = None, None if self.job.token_groups else self.whole
        if not self.job.token_groups:
            sequences, offsets = self.tokens.sequences_of(step.first_group, step.last_group)
            for name, value in given.of_sequences.items():
                inputs[name] = value[torch.tensor(sequences, dtype=torch.long, device=value.device)].to(wide)
        old_logps, ref = part(given.old_logps), part(given.ref_logps)
        return Tokens(
            logps=logps,
            old_logps=logps.detach() if old_logps is None else old_logps,
            advantages=given.advantages[span].to(wide),
            ref_logps=ref_logps.to(wide) if ref is None and ref_logps is not None else ref,
            entropies=entropies,
            inputs=inputs,
            offsets=offsets if whole is None else None,
            add=self.add,
            whole=whole,
        )

    def _bonus_weights(self, result: PolicyLossResult, span: slice) -> Tensor:
        if self.job.bonus_weights == "masked-mean":  # the mask covers the whole batch: the loss is of group "batch"
            assert result.bonus_mask is not None
            mask = result.bonus_mask.to(self.wide)
            return mask / mask.sum().clamp(min=1)
        weights = self.weights[span]
        if self.job.bonus_weights == "token-mean":
            weights = over(torch.ones_like(weights), self.num_tokens)
        return weights if result.bonus_mask is None else weights * result.bonus_mask

    def report(self, plan: Plan, stats: dict[str, Tensor], dtype: torch.dtype) -> PolicyReport:
        names = self.parts[0].metrics.keys()
        if any(part.metrics.keys() != names for part in self.parts):
            raise ValueError("the loss function returned other metrics for one part of the batch than for another")

        def joined(values: list[Any]) -> Tensor | None:
            return None if values[0] is None else torch.cat(values).to(dtype)

        logps, old_logps = (torch.cat([getattr(p, name) for p in self.parts]).to(dtype) for name in ("logps", "old_logps"))
        return PolicyReport(
            plan=plan,
            tokens=self.tokens,
            logps=logps,
            old_logps=old_logps,
            ref_logps=joined([p.ref_logps for p in self.parts]),
            entropies=stats.get("entropy", joined([p.entropies for p in self.parts])),
            metrics={name: torch.cat([p.metrics[name] for p in self.parts]) for name in names},
            whole=self.whole,
        )


def _check_result(result: PolicyLossResult, count: int) -> None:
    """What a loss function returned: one value per token, in tensors."""
    mask = result.bonus_mask
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (count,)):
        what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"the loss function returned bonus_mask as {what}; it must be bool with one value per token: ({count},)"
        )
    metrics = {f"metrics[{name!r}]": value for name, value in result.metrics.items()}
    check_returned(result.losses, metrics, count, "token")
