"""Preference losses as the engine's job: log-probabilities of tokens become those of sequences, and losses of these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from logitless.kernels.backends.interface import ElementWise
from logitless.kernels.core.stats import RowStats
from logitless.kernels.planner.plan import Plan
from logitless.kernels.planner.steps import Step
from logitless.kernels.tile.segments import segment_sum

from ..job import Coefficients, Job
from ..num_items import NAME, OF_CALL, NumItems, over
from ..results import check_leaves, check_returned
from ..scored_tokens import ScoredTokens, find_scored_tokens, merge_groups
from ..sequence_group import num_ranks, rank_tokens, whole_rows
from .loss import Margin, Pairs, PreferenceLoss, PreferenceLossResult, Sequences, Totals


@dataclass(frozen=True)
class Term:
    """One loss over some of the batch's sequences.

    Attributes:
        loss: the loss.
        sequences: which sequences; for pair losses the chosen ones, then the rejected ones.
        weight: factor of this term in the sum.
        ref_logps: (len(sequences),), where the caller has them.
        inputs: tensors with one value per sequence of this term, or one for all.
        num_items: what the loss is divided by, in place of the counts of this call.
        num_items_name: the name of that argument.
    """

    loss: PreferenceLoss
    sequences: tuple[int, ...]
    weight: float = 1.0
    ref_logps: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    num_items: NumItems = OF_CALL
    num_items_name: str = NAME

    @property
    def groups(self) -> list[list[int]]:
        s = self.sequences
        if self.loss.group == "sequence":
            return [[i] for i in s]
        half = len(s) // 2
        pairs = [[s[i], s[half + i]] for i in range(half)]
        return pairs if self.loss.group == "pair" else [[i for pair in pairs for i in pair]]

    @property
    def num_units(self) -> int:
        """Number of sequences or pairs, over which the loss is averaged."""
        return len(self.sequences) if self.loss.group == "sequence" else len(self.sequences) // 2

    @property
    def nll_sequences(self) -> tuple[int, ...]:
        """The sequences whose tokens the NLL term is over: the chosen ones, or all of a sequence loss."""
        return self.sequences[: self.num_units]

    def members(self, units: Sequence[int]) -> list[int]:
        """Where the sequences of some units stand in ``sequences``: chosen ones, then rejected ones."""
        rejected = [] if self.loss.group == "sequence" else [u + self.num_units for u in units]
        return [*units, *rejected]


@dataclass
class PreferenceReport:
    """What a call computed besides the loss; detached. S sequences, N tokens in the order of ``tokens``."""

    plan: Plan
    tokens: ScoredTokens
    logps: Tensor  # (S,)
    lengths: Tensor  # (S,)
    ref_logps: Tensor | None  # (S,), where the reference's states were scored
    results: list[PreferenceLossResult]  # one per term, in the order of its units
    totals: list[Totals]  # one per term: what its losses are divided by
    stats: dict[str, Tensor]  # (N,) each
    group: dist.ProcessGroup | None  # the ranks that share the sequences; the N tokens are this rank's


@dataclass(frozen=True)
class PreferenceJob(Job[PreferenceReport]):
    """A weighted sum of losses over sequences and pairs.

    Attributes:
        terms: the losses.
        token_weights: like ``labels``; weight of each token in its sequence's log-probability.
        nll_labels: like ``labels``; labels of the NLL term where they differ.
        position_ids: like ``labels``, where ``reweight`` reads the ranks of tokens whose sequences other ranks share.
        reweight: returns the weights of the scored tokens (N,) that take the place of ``token_weights``.
    """

    terms: Sequence[Term]
    token_weights: Tensor | None = None
    nll_labels: Tensor | None = None
    position_ids: Tensor | None = None
    reweight: Callable[[ScoredTokens], Tensor | None] | None = None

    @property
    def margin(self) -> Margin | None:  # type: ignore[override]
        alone = len(self.terms) == 1 and self.call.sequence_group is None
        return self.terms[0].loss.margin if alone else None

    @property
    def loss_outputs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"log_sum_sq_probs"} if any(t.loss.uses_confidence for t in self.terms) else ())

    def scored_tokens(self) -> ScoredTokens:
        group = self.call.sequence_group
        groups = merge_groups([term.groups for term in self.terms])
        if group is not None:  # sums over ranks are known once all tokens of this rank are scored
            groups = [[s for some in groups for s in some]]
        nll_sequences = [s for term in self.terms if term.loss.uses_nll for s in term.nll_sequences]
        tokens = find_scored_tokens(self.call, groups, self.token_weights, self.nll_labels, nll_sequences)
        if group is not None and self.position_ids is not None:
            tokens = rank_tokens(tokens, self.position_ids, group)
        return tokens if self.reweight is None else replace(tokens, weights=self.reweight(tokens))

    def evaluation(self, tokens: ScoredTokens, elementwise: ElementWise) -> PreferenceEvaluation:
        return PreferenceEvaluation(self, tokens, elementwise)


@dataclass
class _Sums:
    """What the tokens of a step add up to, for each of its sequences: (s,) each. See :class:`Sequences`."""

    sequences: list[int]
    logps: Tensor
    lengths: Tensor
    nll_sums: Tensor
    ref_logps: Tensor | None
    confidence: Tensor | None


class PreferenceEvaluation:
    """Evaluates the terms on the sequences of one step and keeps the results. See :class:`~logitless.fused.job.Evaluation`."""

    def __init__(self, job: PreferenceJob, tokens: ScoredTokens, elementwise: ElementWise) -> None:
        self.job, self.tokens, self.elementwise = job, tokens, elementwise
        self.wide, self.device, self.group = job.call.wide_dtype, tokens.device, job.call.sequence_group
        num_sequences = len(tokens.sequence_sizes)
        self.loss = torch.zeros((), dtype=self.wide, device=self.device)
        self.logps = torch.zeros(num_sequences, dtype=self.wide, device=self.device)
        self.lengths = torch.zeros_like(self.logps)
        self.ref_logps = None if job.call.reference.states is None else torch.zeros_like(self.logps)
        self.parts: list[list[tuple[list[int], PreferenceLossResult]]] = [[] for _ in job.terms]
        self.confidence = any(term.loss.uses_confidence for term in job.terms)
        nll_sizes = tokens.sequence_sizes
        if tokens.nll is not None:
            nll_sizes = torch.bincount(tokens.sequences[tokens.nll], minlength=num_sequences).tolist()
        self.call_totals = [Totals(t.num_units, sum(nll_sizes[s] for s in t.nll_sequences)) for t in job.terms]
        self.totals = [self._divisors(t, own) for t, own in zip(job.terms, self.call_totals, strict=True)]
        self.unit_of = [{s: i for i, s in enumerate(term.sequences[: term.num_units])} for term in job.terms]

    def _divisors(self, term: Term, own: Totals) -> Totals:
        """What the losses of a term are divided by. ``own``: its counts in this call."""
        any_scored = any(self.tokens.sequence_sizes[s] for s in term.sequences)
        any_of_nll = bool(own.num_nll_tokens)
        units, tokens = term.num_items.checked(any_scored, any_of_nll, self.device, self.wide, term.num_items_name)
        return Totals(own.num_groups if units is None else units, own.num_nll_tokens if tokens is None else tokens)

    def coefficients(self, step: Step, stats: RowStats, ref_logps: Tensor | None, needs_grad: bool) -> Coefficients:
        tokens, span = self.tokens, slice(step.start, step.stop)
        sequences, offsets = tokens.sequences_of(step.first_group, step.last_group)
        weights = None if tokens.weights is None else tokens.weights[span]
        if sequences and self._has_closed_form():
            return Coefficients(self._closed_form(sequences, offsets, stats.logps, weights, ref_logps, needs_grad))
        with torch.enable_grad():
            leaf = stats.logps.to(self.wide).requires_grad_(needs_grad)
            sums = self._sums(step, sequences, offsets, leaf, weights, ref_logps, stats.log_sum_sq_probs)
            total = sums.logps[:0].sum()  # 0, with a graph
            for number in range(len(self.job.terms)):
                share = self._term(number, sums, leaf)
                total = total if share is None else total + share
            gradient = None
            if needs_grad:
                (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
                gradient = torch.zeros_like(leaf) if gradient is None else gradient
        index = torch.tensor(sequences, dtype=torch.long, device=self.device)
        self.logps[index] = sums.logps.detach()
        self.lengths[index] = sums.lengths
        if sums.ref_logps is not None and self.ref_logps is not None:
            self.ref_logps[index] = sums.ref_logps
        self.loss += total.detach() / num_ranks(self.group)  # every rank computes the whole loss, and returns its share
        return Coefficients(None if gradient is None else gradient.to(stats.logps.dtype))

    def _sums(
        self,
        step: Step,
        sequences: list[int],
        offsets: Tensor,  # (s + 1,)
        logps: Tensor,  # (n,) of the step's tokens, as are the next three
        weights: Tensor | None,
        ref_logps: Tensor | None,
        log_sum_sq_probs: Tensor | None,
    ) -> _Sums:
        tokens, wide, span = self.tokens, self.wide, slice(step.start, step.stop)
        counted = None if tokens.counted is None else tokens.counted[span]
        nll = None if tokens.nll is None else tokens.nll[span]

        def add(values: Tensor) -> Tensor:
            return segment_sum(values, offsets, self.elementwise.segment_sum)  # tokens of a sequence are neighbours

        factor = None if counted is None else counted.to(wide)
        if weights is not None:  # tokens of the NLL alone may have any weight, or none
            factor = weights.to(wide) if counted is None else torch.where(counted, weights.to(wide), 0)
        sums = {"logps": add(_weighted(logps, factor))}
        sums["lengths"] = add(torch.ones_like(logps) if counted is None else counted.to(wide)).detach()
        if self.group is None or any(term.loss.uses_nll for term in self.job.terms):
            sums["nll_sums"] = add(-logps if nll is None else torch.where(nll, -logps, 0))
        if ref_logps is not None:
            sums["ref_logps"] = add(_weighted(ref_logps.to(wide), factor))
        if self.confidence:
            assert log_sum_sq_probs is not None
            aligned = logps.detach() - log_sum_sq_probs.to(wide)
            sums["confidence"] = add(aligned if counted is None else torch.where(counted, aligned, 0))
        if self.group is not None:
            sums = self._over_ranks(self.group, sums, sequences, None if nll is None else add(nll.to(wide)))
        confidence = sums.get("confidence")
        return _Sums(
            sequences=sequences,
            logps=sums["logps"],
            lengths=sums["lengths"],
            nll_sums=sums["nll_sums"],
            ref_logps=sums.get("ref_logps"),
            confidence=None if confidence is None else confidence / sums["lengths"].clamp(min=1),
        )

    def _over_ranks(
        self, group: dist.ProcessGroup, sums: dict[str, Tensor], sequences: list[int], nll_lengths: Tensor | None
    ) -> dict[str, Tensor]:
        """Sums over whole sequences (s,), in one collective; ``nll_lengths`` where the NLL term is over other tokens."""
        sums = whole_rows(sums if nll_lengths is None else sums | {"nll_lengths": nll_lengths}, group)
        place = {s: i for i, s in enumerate(sequences)}
        for number, term in enumerate(self.job.terms):
            members = torch.tensor([place[s] for s in term.nll_sequences], dtype=torch.long, device=self.device)
            own = Totals(term.num_units, sums.get("nll_lengths", sums["lengths"])[members].sum())
            self.call_totals[number] = own
            if term.num_items.tokens is None:
                self.totals[number] = Totals(self.totals[number].num_groups, own.num_nll_tokens)
        # a loss that reads NLL sums without uses_nll becomes NaN
        return {"nll_sums": torch.full_like(sums["lengths"], torch.nan)} | sums

    def _term(self, number: int, sums: _Sums, leaf: Tensor) -> Tensor | None:
        """The share of the loss that a term has in the units of a step; ``None`` if the step has none of them."""
        term, unit_of = self.job.terms[number], self.unit_of[number]
        units = sorted(unit_of[s] for s in sums.sequences if s in unit_of)
        if not units and term.num_units:
            return None  # a batch without units is evaluated all the same: it has the metrics of any other
        members = term.members(units)
        local = {s: i for i, s in enumerate(sums.sequences)}
        here = torch.tensor([local[term.sequences[m]] for m in members], dtype=torch.long, device=self.device)
        there = torch.tensor(members, dtype=torch.long, device=self.device)
        inputs = {}
        for name, value in term.inputs.items():
            value = value[there] if value.dim() == 1 and len(value) == len(term.sequences) else value
            inputs[name] = value.to(self.wide) if value.is_floating_point() else value
        ref = None if sums.ref_logps is None else sums.ref_logps[here]
        kind = Sequences if term.loss.group == "sequence" else Pairs
        result = term.loss(
            kind(
                logps=sums.logps[here],
                lengths=sums.lengths[here],
                nll_sums=sums.nll_sums[here],
                ref_logps=ref if term.ref_logps is None else term.ref_logps[there].to(self.wide),
                confidence=None if sums.confidence is None else sums.confidence[here],
                inputs=inputs,
                totals=self.totals[number],
                call_totals=self.call_totals[number],
            )
        )
        rewards = {"chosen_rewards": result.chosen_rewards, "rejected_rewards": result.rejected_rewards}
        others = {name: value for name, value in rewards.items() if value is not None}
        others |= {f"metrics[{name!r}]": value for name, value in result.metrics.items()}
        check_returned(result.losses, others, len(units), "group, that is one loss per pair or per sequence")
        check_leaves(result.losses, [leaf])
        self.parts[number].append((units, result.detach()))
        return result.losses.sum() * over(term.weight, self.totals[number].num_groups)

    def _has_closed_form(self) -> bool:
        """Whether the backend computes the only loss by a function of the margin, and the loss reads nothing else."""
        tokens, (term, *others) = self.tokens, self.job.terms
        form = term.loss.closed_form
        if (
            form is None
            or others
            or term.inputs
            or self.group is not None
            or self.elementwise.pair_margins is None
            or self.wide != torch.float64
        ):
            return False
        return form.fn is term.loss.fn and form.margin == term.loss.margin and tokens.counted is None and tokens.nll is None

    def _closed_form(
        self,
        sequences: list[int],  # chosen and rejected of one pair after the other
        offsets: Tensor,  # (len(sequences) + 1,), of their tokens
        logps: Tensor,  # (n,)
        weights: Tensor | None,  # (n,)
        ref_token_logps: Tensor | None,  # (n,)
        needs_grad: bool,
    ) -> Tensor | None:
        """dLoss / dlogps of the step's tokens (n,), in one launch."""
        (term,) = self.job.terms
        form, mean = term.loss.closed_form, term.loss.margin == "mean"
        assert form is not None and self.elementwise.pair_margins is not None
        units = [self.unit_of[0][s] for s in sequences[::2]]
        index = torch.tensor(sequences, dtype=torch.long, device=self.device)
        lengths = offsets.diff().to(self.wide)
        ref = None
        if ref_token_logps is not None:
            wide = None if weights is None else weights.to(self.wide)
            ref = self.elementwise.segment_sum(_weighted(ref_token_logps.to(self.wide), wide), offsets)
            assert self.ref_logps is not None
            self.ref_logps[index] = ref
        if term.ref_logps is not None:
            there = [m for u in units for m in (u, u + term.num_units)]
            ref = term.ref_logps[torch.tensor(there, device=self.device)].to(self.wide)
        compared = ref if ref is None or not mean else ref / lengths.clamp(min=1)
        new = torch.empty(3 * len(units), dtype=self.wide, device=self.device)
        losses, values = new[: len(units)], new[len(units) :]
        coefficients = torch.empty_like(logps) if needs_grad else None
        scale = over(term.weight, self.totals[0].num_groups)
        on_device = isinstance(scale, Tensor)  # the operator takes a number, which would have to be copied to the host
        self.elementwise.pair_margins(
            logps,
            None if weights is None else weights.double(),
            offsets,
            compared,
            form.function,
            mean,
            form.beta,
            form.gamma,
            form.label_smoothing,
            1.0 if on_device else scale,
            losses,
            values,
            coefficients,
        )
        if on_device and coefficients is not None:
            coefficients.mul_(scale)
        rewards = form.beta * (values if compared is None else values - compared)
        self.logps[index] = values * lengths if mean else values
        self.lengths[index] = lengths
        self.loss += losses.sum() * scale
        self.parts[0].append((units, PreferenceLossResult(losses, rewards[::2], rewards[1::2])))
        return coefficients

    def report(self, plan: Plan, stats: dict[str, Tensor], dtype: torch.dtype) -> PreferenceReport:
        return PreferenceReport(
            plan=plan,
            tokens=self.tokens,
            logps=self.logps.to(dtype),
            lengths=self.lengths.to(dtype),
            ref_logps=None if self.ref_logps is None else self.ref_logps.to(dtype),
            results=[_in_order(parts, self.device) for parts in self.parts],
            totals=self.totals,
            stats=stats,
            group=self.group,
        )


def _weighted(logps: Tensor, factor: Tensor | None) -> Tensor:
    """``logps * factor``, and 0 where the factor is 0, even if ``logps`` is infinite or NaN there. Each (n,)."""
    return logps if factor is None else torch.where(factor != 0, logps * factor, 0)


def _in_order(parts: list[tuple[list[int], PreferenceLossResult]], device: torch.device) -> PreferenceLossResult:
    """The results of all steps, joined and in the order of the units."""
    units = [u for some, _ in parts for u in some]
    inverse = torch.argsort(torch.tensor(units, dtype=torch.long, device=device))
    results = [result for _, result in parts]

    def joined(values: Iterable[Tensor | None]) -> Tensor | None:
        present = [v for v in values if v is not None]
        return torch.cat(present)[inverse] if present else None

    return PreferenceLossResult(
        torch.cat([r.losses for r in results])[inverse],
        joined(r.chosen_rewards for r in results),
        joined(r.rejected_rewards for r in results),
        {name: torch.cat([r.metrics[name] for r in results])[inverse] for name in results[0].metrics},
    )
