"""Evaluates losses on the log-probabilities of some tokens, and asks autograd for the coefficient of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.kernels.core.stats import RowStats
from logitless.kernels.operators import native
from logitless.kernels.planner.plan import Plan, Step
from logitless.kernels.sequence_logps import segment_sum

from ..job import Coefficients, Job, Report, Term
from .loss import LossResult, Margin, Pairs, Sequences, Totals


@dataclass
class PreferenceJob(Job):
    """Objectives over sequences and pairs."""

    terms: Sequence[Term]

    @property
    def margin(self) -> Margin | None:  # type: ignore[override]
        return self.terms[0].loss.margin if len(self.terms) == 1 else None

    @property
    def loss_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"log_sum_sq_probs"} if any(t.loss.uses_confidence for t in self.terms) else ())

    def evaluation(self, wide: torch.dtype, device: torch.device) -> Evaluation:
        return Evaluation(self, wide, device)


class Evaluation:
    """Evaluates the terms on the sequences of one step and keeps the results."""

    def __init__(self, job: PreferenceJob, wide: torch.dtype, device: torch.device) -> None:
        self.job, self.wide, self.device = job, wide, device
        entries, num_sequences = job.entries, len(job.entries.sequence_sizes)
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.logps = torch.zeros(num_sequences, dtype=wide, device=device)
        self.lengths = torch.zeros(num_sequences, dtype=wide, device=device)
        self.ref_logps = torch.zeros_like(self.logps) if job.reference is not None else None
        self.parts: list[list[tuple[list[int], LossResult]]] = [[] for _ in job.terms]
        self.confidence = any(t.loss.uses_confidence for t in job.terms)
        nll_sizes = entries.sequence_sizes
        if entries.nll is not None:
            nll_sizes = torch.bincount(entries.sequences[entries.nll], minlength=num_sequences).tolist()
        self.totals = []
        self.index_of_group: list[dict[int, int]] = []
        for term in job.terms:
            unit_leaders = term.sequences[: term.num_units]
            self.totals.append(Totals(term.num_units, sum(nll_sizes[s] for s in term.nll_sequences)))
            self.index_of_group.append({s: i for i, s in enumerate(unit_leaders)})

    def coefficients(self, step: Step, stats: RowStats, ref_token_logps: Tensor | None, needs_grad: bool) -> Coefficients:
        """See :class:`Evaluates`."""
        entries, span = self.job.entries, slice(step.start, step.stop)
        sequences = [s for group in entries.groups[step.first_group : step.last_group] for s in group]
        ends = itertools.accumulate(entries.sequence_sizes[s] for s in sequences)
        offsets = torch.tensor([0, *ends], device=self.device)

        def sums(values: Tensor) -> Tensor:
            return segment_sum(values, offsets)  # tokens of a sequence are neighbours

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[span]

        counted, nll, weights = part(entries.counted), part(entries.nll), part(entries.weights)
        if sequences and self._is_closed_form():
            return Coefficients(self._closed_form(sequences, offsets, stats.logps, weights, ref_token_logps, needs_grad))
        factor = None if counted is None else counted.to(self.wide)
        if weights is not None:  # tokens of the NLL alone may have any weight, or none
            factor = weights.to(self.wide) if counted is None else torch.where(counted, weights.to(self.wide), 0)
        with torch.enable_grad():
            leaf = stats.logps.to(self.wide).requires_grad_(needs_grad)
            logps = sums(_weighted(leaf, factor))
            nll_sums = sums(-leaf if nll is None else torch.where(nll, -leaf, 0))
            lengths = sums(torch.ones_like(leaf) if counted is None else counted.to(self.wide)).detach()
            ref = None
            if ref_token_logps is not None:
                ref = sums(_weighted(ref_token_logps.to(self.wide), factor))
            confidence = None
            if self.confidence:
                assert stats.log_sum_sq_probs is not None
                aligned = leaf.detach() - stats.log_sum_sq_probs.to(self.wide)
                aligned = aligned if counted is None else torch.where(counted, aligned, 0)
                confidence = sums(aligned) / lengths.clamp(min=1)
            total = self._terms(sequences, logps, lengths, nll_sums, ref, confidence, leaf)
            gradient = None
            if needs_grad:
                (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
        index = torch.tensor(sequences, dtype=torch.long, device=self.device)
        self.logps[index] = logps.detach()
        self.lengths[index] = lengths
        if ref is not None and self.ref_logps is not None:
            self.ref_logps[index] = ref
        self.loss += total.detach()
        return Coefficients(None if gradient is None else gradient.to(stats.logps.dtype))

    def _is_closed_form(self) -> bool:
        """Whether the compiled operators know the only loss, and all it looks at."""
        entries, (term, *others) = self.job.entries, self.job.terms
        form = term.loss.closed_form
        same = form is not None and form.fn is term.loss.fn and form.margin == term.loss.margin
        plain = same and not others and entries.counted is None and entries.nll is None
        return plain and set(term.inputs) <= {"ref_logps"} and self.wide == torch.float64 and native.serves(self.device)

    def _closed_form(
        self,
        sequences: list[int],  # chosen and rejected of one pair after the other
        offsets: Tensor,  # (len(sequences) + 1,), of their tokens
        logps: Tensor,  # (n,)
        weights: Tensor | None,  # (n,)
        ref_token_logps: Tensor | None,  # (n,)
        needs_grad: bool,
    ) -> Tensor | None:
        """dLoss / dlogps of the step's tokens (n,), by one operator."""
        (term,) = self.job.terms
        form, mean = term.loss.closed_form, term.loss.margin == "mean"
        assert form is not None
        units = [self.index_of_group[0][s] for s in sequences[::2]]
        index = torch.tensor(sequences, dtype=torch.long, device=self.device)
        lengths = offsets.diff().to(self.wide)
        ref = None
        if ref_token_logps is not None:
            wide = None if weights is None else weights.to(self.wide)
            ref = segment_sum(_weighted(ref_token_logps.to(self.wide), wide), offsets)
            assert self.ref_logps is not None
            self.ref_logps[index] = ref
        if "ref_logps" in term.inputs:
            there = [m for u in units for m in (u, u + term.num_units)]
            ref = term.inputs["ref_logps"][torch.tensor(there, device=self.device)].to(self.wide)
        compared = ref if ref is None or not mean else ref / lengths.clamp(min=1)
        new = torch.empty(3 * len(units), dtype=self.wide, device=self.device)
        losses, values = new[: len(units)], new[len(units) :]
        coefficients = torch.empty_like(logps) if needs_grad else None
        scale = term.weight / term.num_units
        torch.ops.logitless.pair_loss(
            logps,
            None if weights is None else weights.double(),
            offsets,
            compared,
            native.PAIR_LOSSES.index(form.kind),
            mean,
            form.beta,
            form.gamma,
            form.label_smoothing,
            scale,
            losses,
            values,
            coefficients,
        )
        rewards = form.beta * (values if compared is None else values - compared)
        self.logps[index] = values * lengths if mean else values
        self.lengths[index] = lengths
        self.loss += losses.sum() * scale
        self.parts[0].append((units, LossResult(losses, rewards[::2], rewards[1::2])))
        return coefficients

    def _terms(
        self,
        sequences: list[int],
        logps: Tensor,
        lengths: Tensor,
        nll_sums: Tensor,
        ref: Tensor | None,
        confidence: Tensor | None,
        leaf: Tensor,
    ) -> Tensor:
        local = {s: i for i, s in enumerate(sequences)}
        total = logps[:0].sum()  # 0, with a graph
        for number, term in enumerate(self.job.terms):
            leaders = self.index_of_group[number]
            units = sorted(leaders[s] for s in sequences if s in leaders)
            if not units:
                continue
            members = units if term.loss.group == "sequence" else units + [u + term.num_units for u in units]
            here = torch.tensor([local[term.sequences[m]] for m in members], device=self.device)
            there = torch.tensor(members, device=self.device)
            inputs = {
                name: (value[there] if value.dim() == 1 and len(value) == len(term.sequences) else value)
                for name, value in term.inputs.items()
            }
            inputs = {n: v.to(self.wide) if v.is_floating_point() else v for n, v in inputs.items()}
            kind = Sequences if term.loss.group == "sequence" else Pairs
            batch = kind(
                logps=logps[here],
                lengths=lengths[here],
                nll_sums=nll_sums[here],
                ref_logps=inputs.pop("ref_logps", None if ref is None else ref[here]),
                confidence=None if confidence is None else confidence[here],
                inputs=inputs,
                totals=self.totals[number],
            )
            result = term.loss(batch)
            _check_result(result, len(units))
            check_leaves(result.losses, [leaf])
            total = total + result.losses.sum() * (term.weight / term.num_units)
            self.parts[number].append((units, _detached(result)))
        return total

    def report(self, plan: Plan, tokens: dict[str, Tensor], dtype: torch.dtype) -> Report:
        """See :class:`Evaluates`; the results of each term have its units back in the caller's order."""
        return Report(
            plan=plan,
            logps=self.logps.to(dtype),
            lengths=self.lengths.to(dtype),
            ref_logps=None if self.ref_logps is None else self.ref_logps.to(dtype),
            results=[_in_order(parts, self.wide, self.device) for parts in self.parts],
            tokens=tokens,
        )


def _weighted(logps: Tensor, factor: Tensor | None) -> Tensor:
    """``logps * factor`` with 0 where the factor is 0, whatever stands there. Each (n,)."""
    return logps if factor is None else torch.where(factor != 0, logps * factor, 0)


def _check_result(result: LossResult, count: int) -> None:
    """What a loss function returned: one value a group, in tensors."""
    named: dict[str, object] = {"losses": result.losses}
    for name in ("chosen_rewards", "rejected_rewards"):
        if getattr(result, name) is not None:
            named[name] = getattr(result, name)
    named.update({f"metrics[{name!r}]": value for name, value in result.metrics.items()})
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss function returned {name} of type {type(value).__name__}; it must be a torch.Tensor")
        if tuple(value.shape) != (count,) or not value.is_floating_point():
            raise ValueError(
                f"the loss function returned {name} of shape {tuple(value.shape)} and {value.dtype}; it must be floating point "
                f"with one value a group, that is one loss a pair or one loss a sequence: ({count},)"
            )


def check_leaves(losses: Tensor, leaves: Sequence[Tensor]) -> None:
    """Only statistics of tokens get gradients: a parameter inside of a loss function would be left out silently."""
    seen, todo = set(), [losses.grad_fn] if losses.grad_fn is not None else []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                f"the loss function uses a tensor of shape {tuple(variable.shape)} that requires a gradient, which it would "
                "not get: detach it, or write the loss with linear_logps or sequence_logps"
            )
        todo += [parent for parent, _ in node.next_functions if parent is not None]


def _detached(result: LossResult) -> LossResult:
    def d(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach()

    return LossResult(
        result.losses.detach(),
        d(result.chosen_rewards),
        d(result.rejected_rewards),
        {k: v.detach() for k, v in result.metrics.items()},
    )


def _in_order(parts: list[tuple[list[int], LossResult]], dtype: torch.dtype, device: torch.device) -> LossResult:
    if not parts:
        return LossResult(torch.zeros(0, dtype=dtype, device=device))
    inverse = torch.argsort(torch.tensor([u for units, _ in parts for u in units], device=device))

    def gather(values: list[Tensor | None]) -> Tensor | None:
        present = [v for v in values if v is not None]
        return torch.cat(present)[inverse] if present else None

    results = [r for _, r in parts]
    losses = gather([r.losses for r in results])
    assert losses is not None
    metrics = {name: torch.cat([r.metrics[name] for r in results])[inverse] for name in results[0].metrics}
    return LossResult(
        losses, gather([r.chosen_rewards for r in results]), gather([r.rejected_rewards for r in results]), metrics
    )
