"""The loss modules: check the arguments, describe the call to the engine, and name what comes back."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from logitless.kernels.core.checks import (
    check_cu_seqlens,
    check_head,
    check_ignore_index,
    check_labels,
    check_spec,
    check_tensor,
    check_token_weights,
    compute_dtype,
)
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.planner.plan import Plan

from ..engine import run
from ..job import Reference, Report, Term
from ..scored_tokens import Entries, make_entries, merge_groups
from .job import PreferenceJob
from .loss import Loss, LossResult, Margin, Pairs, Sequences
from .metrics import pair_metrics, sequence_metrics, token_outputs


@dataclass
class PreferenceOutput:
    """What a loss module returns; only ``loss`` carries a gradient.

    Attributes:
        loss: 0-dim, float32 (float64 for float64 input).
        logps: (S,) log-probability of each sequence: the (weighted) sum over its scored tokens.
        chosen_logps, rejected_logps: (P,) log-probabilities that the loss is a function of: sums over scored tokens, or for
            losses of length-normalised log-probabilities (SimPO, ORPO, CPO ``ipo``) their means. Empty for a sequence loss.
        chosen_rewards, rejected_rewards: (P,) implicit rewards, as TRL logs them.
        ref_logps: (S,) reference log-probabilities, where they were given or computed here.
        metrics: 0-dim tensors under TRL's names; empty unless the module was made with ``metrics=True``.
        plan: what the engine did: schedule, FLOP, bytes.
    """

    loss: Tensor
    logps: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    ref_logps: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> float:
    """A finite number in a range, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        bounds = "" if low == -math.inf and high == math.inf else f" in {'(' if open_low else '['}{low}, {high}]"
        raise ValueError(f"{name} must be a finite number{bounds}, got {value!r}")
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: Sequence[str] | Mapping[str, Any]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}")
    return str(value)


def check_per_sequence(name: str, value: Any, count: int, device: torch.device, *, boolean: bool = False) -> Tensor:
    """A tensor with one value a sequence, without a gradient."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if tuple(value.shape) != (count,):
        raise ValueError(f"{name} must have shape [{count}], one value a sequence, got {tuple(value.shape)}")
    if boolean and value.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {value.dtype}")
    if not boolean and not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but hidden is on {device}: move one of them")
    return value.detach()


class FusedLinearLoss(nn.Module):
    """Base of all loss modules, and the module for a loss of your own.

    Args:
        fn: a function of :class:`logitless.Pairs` (or :class:`logitless.Sequences` with ``group="sequence"``) that returns one
            loss a group, or a :class:`logitless.LossResult`; plain differentiable torch on small tensors.
        group: ``"pair"``, ``"sequence"`` or ``"batch"``: which sequences' coefficients depend on each other.
        margin: see :class:`logitless.Loss`.
        needs_reference, uses_nll: see :class:`logitless.Loss`.
        metrics: also compute metrics (entropy, mean logits, token accuracy ...) in the same pass.
        ignore_index: the label of positions to leave out.

    Example:
        >>> import torch.nn.functional as F
        >>> loss = FusedLinearLoss(lambda pairs: F.relu(1 - (pairs.chosen_logps - pairs.rejected_logps)), margin="sum")
        >>> x, w = torch.randn(4, 6, 16), torch.randn(100, 16)
        >>> loss(x, w, torch.randint(100, (4, 6))).loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        fn: Callable[..., Tensor | LossResult],
        *,
        group: str = "pair",
        margin: Margin | None = None,
        needs_reference: bool = False,
        uses_nll: bool = False,
        metrics: bool = False,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        loss = Loss(fn, group, margin, needs_reference, uses_nll, optional_reference=True)  # type: ignore[arg-type]
        self._configure(loss, metrics=metrics, ignore_index=ignore_index)

    def _configure(self, loss: Loss, *, metrics: bool, ignore_index: int, mean_logps: bool = False) -> None:
        check_ignore_index(ignore_index)
        self.loss, self.metrics = loss, check_bool("metrics", metrics)
        self.ignore_index, self._mean_logps = ignore_index, mean_logps

    def forward(
        self,
        hidden: Tensor,  # (S, T, H), or packed (N, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (S, T), or packed (N,)
        bias: Tensor | None = None,  # (V,)
        head: HeadSpec | None = None,
        ref_logps: Tensor | None = None,  # (S,)
        ref_hidden: Tensor | None = None,  # like hidden, up to its last dimension
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S + 1,)
        token_weights: Tensor | None = None,  # like labels
        nll_labels: Tensor | None = None,  # like labels
    ) -> PreferenceOutput:
        """Compute the loss. Sequences come stacked: chosen ones first, then the matching rejected ones.

        Args:
            hidden: hidden states of the policy, float64, float32, bfloat16 or float16; padded ``[S, T, H]``, or packed
                ``[N, H]`` with ``cu_seqlens``.
            weight: the head's weight.
            labels: int32 or int64, already shifted (:func:`logitless.shift`); ``ignore_index`` where nothing is scored.
            bias: the head's bias.
            head: logit scale, soft-cap, temperature; of the reference's head too.
            ref_logps: the reference's log-probability of each sequence, weighted like the policy's.
            ref_hidden, ref_weight, ref_bias: or the reference's hidden states and head, scored without gradient in the same
                tiles. Its hidden size may differ.
            cu_seqlens: int32 or int64, where each packed sequence starts and ends.
            token_weights: weight of each token's log-probability in its sequence's sum (step- and token-level DPO).
            nll_labels: labels of the NLL term where they differ from ``labels`` (ORPO scores prompt and response).

        Returns:
            PreferenceOutput: ``loss`` and detached log-probabilities, rewards and metrics.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        batch = _Batch.check(self, hidden, weight, labels, bias, head, cu_seqlens, token_weights, nll_labels)
        reference = batch.reference(self.loss, ref_logps, ref_hidden, ref_weight, ref_bias)
        inputs = {} if reference.logps is None else {"ref_logps": reference.logps}
        term = Term(self.loss, tuple(range(batch.num_sequences)), 1.0, inputs)
        loss, report, entries = batch.run([term], reference.states, self.metrics)
        return self._output(loss, report, entries, term)

    def token_weights(self, entries: Entries) -> None:
        """Adjust the weights of the scored tokens; LD-DPO does."""

    def _output(self, loss: Tensor, report: Report, entries: Entries, term: Term) -> PreferenceOutput:
        result = report.results[0]
        logps = report.logps / report.lengths.clamp(min=1) if self._mean_logps else report.logps
        acc, empty = logps.dtype, logps.new_zeros(0)
        half = len(logps) // 2
        chosen, rejected = (empty, empty) if self.loss.group == "sequence" else (logps[:half], logps[half:])
        metrics = pair_metrics(report, entries, term, chosen, rejected) if self.metrics else {}
        return PreferenceOutput(
            loss=loss,
            logps=report.logps,
            chosen_logps=chosen,
            rejected_logps=rejected,
            chosen_rewards=empty if result.chosen_rewards is None else result.chosen_rewards.to(acc),
            rejected_rewards=empty if result.rejected_rewards is None else result.rejected_rewards.to(acc),
            ref_logps=term.inputs.get("ref_logps", report.ref_logps),
            metrics=metrics,
            plan=report.plan,
        )


def check_layout(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[list[int] | None, int]:
    """Where packed sequences start and end (``None`` for padded ones), and how many there are."""
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels must have shape [S, T], or [N] with cu_seqlens, got {tuple(labels.shape)} and no cu_seqlens"
            )
        return None, len(labels)
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape [N] with cu_seqlens, got {tuple(labels.shape)}")
    bounds = check_cu_seqlens(cu_seqlens, len(labels), labels.device)
    return bounds, len(bounds) - 1


def check_reference_states(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> Reference | None:
    """The reference's hidden states and head, shaped like the policy's up to the hidden size; ``None`` if none are given."""
    named = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    given = [name for name, value in named.items() if value is not None]
    if given and (ref_hidden is None or ref_weight is None):
        raise ValueError(f"ref_hidden and ref_weight must be given together, got only {', '.join(given)}")
    if ref_hidden is None or ref_weight is None:
        return None
    check_tensor("ref_hidden", ref_hidden)
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden is on {ref_hidden.device} but hidden is on {hidden.device}: move one of them")
    check_head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden must have shape {(*hidden.shape[:-1], 'H')} like hidden, got {tuple(ref_hidden.shape)}")
    if len(ref_weight) != len(weight):
        raise ValueError(f"ref_weight must have {len(weight)} rows like weight, got {len(ref_weight)}")
    states = ref_hidden.detach().to(compute_dtype(ref_hidden)).reshape(-1, ref_hidden.shape[-1])
    return Reference(states, ref_weight.detach(), None if ref_bias is None else ref_bias.detach())


@functools.cache
def eagerly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable``, at the first call: as a decorator it would add a second to every import of the package."""
    return torch.compiler.disable(fn)


@dataclass
class _ReferenceInputs:
    logps: Tensor | None
    states: Reference | None


@dataclass
class _Batch:
    """The checked tensors of a call."""

    module: FusedLinearLoss
    hidden: Tensor  # as given
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    head: HeadSpec
    bounds: list[int] | None
    token_weights: Tensor | None
    nll_labels: Tensor | None
    num_sequences: int

    @classmethod
    def check(
        cls,
        module: FusedLinearLoss,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        head: HeadSpec | None,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        nll_labels: Tensor | None,
        any_loss: Sequence[Loss] = (),
    ) -> _Batch:
        losses = any_loss or (module.loss,)
        head = check_spec(head)
        check_head(hidden, weight, bias)
        check_labels(labels, hidden)
        bounds, num_sequences = check_layout(labels, cu_seqlens)
        if not any_loss and losses[0].group != "sequence" and num_sequences % 2:
            raise ValueError(
                f"labels must hold an even number of sequences, chosen first and then rejected, got {num_sequences}"
            )
        if token_weights is not None:
            check_token_weights(token_weights, labels)
            if token_weights.requires_grad:
                raise ValueError("token_weights must not require a gradient: detach it, or use sequence_logps")
        if nll_labels is not None:
            if not any(loss.uses_nll for loss in losses):
                raise ValueError("nll_labels is given, but this loss has no NLL term")
            check_labels(nll_labels, hidden, "nll_labels")
        return cls(module, hidden, weight, labels, bias, head, bounds, token_weights, nll_labels, num_sequences)

    def reference(
        self,
        loss: Loss,
        ref_logps: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> _ReferenceInputs:
        """Check the reference: log-probabilities or hidden states, not both, and only for a loss that has one."""
        given = [
            n for n, t in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight), ("ref_bias", ref_bias)) if t is not None
        ]
        device = self.hidden.device
        if not (loss.needs_reference or loss.optional_reference) and (given or ref_logps is not None):
            name = given[0] if given else "ref_logps"
            raise ValueError(f"{name} is given, but this loss does not use a reference")
        if ref_logps is not None and given:
            raise ValueError(f"ref_logps and {given[0]} are given: pass the log-probabilities or the hidden states, not both")
        if loss.needs_reference and ref_logps is None and ref_hidden is None:
            raise ValueError("this loss needs a reference: pass ref_logps, or ref_hidden and ref_weight")
        if ref_logps is not None:
            return _ReferenceInputs(check_per_sequence("ref_logps", ref_logps, self.num_sequences, device), None)
        return _ReferenceInputs(None, check_reference_states(self.hidden, self.weight, ref_hidden, ref_weight, ref_bias))

    def run(self, terms: list[Term], states: Reference | None, metrics: bool) -> tuple[Tensor, Report, Entries]:
        """Hand the call to the engine. Inside compiled code this runs eagerly: the schedule depends on the data."""
        return eagerly(_Batch._run)(self, terms, states, metrics)

    def _run(self, terms: list[Term], states: Reference | None, metrics: bool) -> tuple[Tensor, Report, Entries]:
        entries = make_entries(
            self.labels,
            self.bounds,
            merge_groups([t.groups for t in terms]),
            len(self.weight),
            self.module.ignore_index,
            self.token_weights,
            self.nll_labels,
            [s for t in terms if t.loss.uses_nll for s in t.nll_sequences],
        )
        self.module.token_weights(entries)
        outputs = token_outputs() if metrics else frozenset()
        job = PreferenceJob(entries, self.head, states, outputs, terms)
        x = self.hidden.to(compute_dtype(self.hidden)).reshape(-1, self.hidden.shape[-1])
        loss, report = run(job, x, self.weight, self.bias)
        return loss, report, entries


@dataclass
class KTOOutput:
    """What :class:`FusedLinearKTOLoss` returns; only ``loss`` carries a gradient.

    Attributes:
        loss: 0-dim.
        logps: (S,) log-probability of each sequence.
        rewards: (S,) ``beta * (logps - ref_logps)``.
        chosen_logps, rejected_logps, chosen_rewards, rejected_rewards: those of the desirable and of the other sequences.
        ref_logps: (S,).
        metrics: under TRL's names; a class that is absent has none.
        plan: what the engine did.
    """

    loss: Tensor
    logps: Tensor
    rewards: Tensor
    desirable: Tensor
    ref_logps: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None

    @property
    def chosen_logps(self) -> Tensor:
        return self.logps[self.desirable]

    @property
    def rejected_logps(self) -> Tensor:
        return self.logps[~self.desirable]

    @property
    def chosen_rewards(self) -> Tensor:
        return self.rewards[self.desirable]

    @property
    def rejected_rewards(self) -> Tensor:
        return self.rewards[~self.desirable]


def sequence_output(loss: Tensor, report: Report, entries: Entries, term: Term, want_metrics: bool) -> KTOOutput:
    desirable = term.inputs["desirable"]
    rewards = report.results[0].metrics.get("rewards", report.logps).to(report.logps.dtype)  # no sequences, no metrics
    metrics = sequence_metrics(report, entries, term, rewards) if want_metrics else {}
    ref = term.inputs.get("ref_logps", report.ref_logps)
    return KTOOutput(loss, report.logps, rewards, desirable, ref, metrics, report.plan)


__all__ = ["FusedLinearLoss", "KTOOutput", "Loss", "LossResult", "Pairs", "PreferenceOutput", "Sequences"]
