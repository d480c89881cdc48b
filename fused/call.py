"""The checked arguments of a loss module's call that both families share: head, labels, layout and reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from logitless.kernels.core.blocking import real_rows
from logitless.kernels.core.checks import (
    check_cu_seqlens,
    check_entries,
    check_head,
    check_labels,
    check_spec,
    check_temperature,
    check_tensor,
    compute_dtype,
)
from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight, read_weight
from logitless.kernels.parallel.dtensor import from_dtensor, local_rows
from logitless.kernels.parallel.vocab_parallel import VocabParallel, enter

from .checks import check_data, check_per_sequence, check_per_token


def check_layout(
    labels: Tensor,  # (S, T), or packed (P,)
    cu_seqlens: Tensor | None,  # (S + 1,)
) -> tuple[list[int] | None, int]:
    """Where packed sequences start and end, ``None`` for padded ones, and the number of sequences."""
    if cu_seqlens is not None:
        if labels.dim() != 1:
            raise ValueError(f"labels must have shape [N] with cu_seqlens, got {tuple(labels.shape)}")
        bounds = check_cu_seqlens(cu_seqlens, len(labels), labels.device)
        return bounds, len(bounds) - 1
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape [S, T], or [N] with cu_seqlens, got {tuple(labels.shape)} and no cu_seqlens")
    return None, len(labels)


def check_counted_labels(
    labels: Tensor,  # (S, T), or packed (P,)
    cu_seqlens: Tensor | None,  # (S + 1,)
    nll_labels: Tensor | None,  # like labels
    *,
    uses_nll: bool,
) -> tuple[list[int] | None, int]:
    """Check the arguments of ``count_items``; returns what :func:`check_layout` does."""
    named = {"labels": labels, "cu_seqlens": cu_seqlens, "nll_labels": nll_labels}
    for name, value in named.items():
        check_data(name, value)
    check_tensor("labels", labels)
    check_labels(labels, labels[..., None])
    if nll_labels is not None:
        if not uses_nll:
            raise ValueError("nll_labels is given, but this loss has no NLL term")
        check_labels(nll_labels, labels[..., None], "nll_labels")
    return check_layout(labels, cu_seqlens)


@dataclass(frozen=True)
class ReferenceStates:
    """Hidden states and head of the reference model. Detached."""

    hidden: Tensor  # (P, H'), P positions in the order of the policy's
    weight: Weight  # (V, H')
    bias: Tensor | None  # (V,)


@dataclass(frozen=True)
class Reference:
    """What is known of the reference model: its log-probabilities, or what to compute them from. At most one of the two.

    Attributes:
        logps: (S,) for a preference loss, like ``labels`` for a policy loss. Detached.
        states: scored forward-only, in the same tiles as the policy.
    """

    logps: Tensor | None = None
    states: ReferenceStates | None = None


@dataclass(frozen=True)
class LossCall:
    """The checked arguments of one call. P positions, S sequences.

    Attributes:
        hidden: (S, T, H), or packed (P, H), as given.
        weight: (V, H).
        labels: (S, T), or packed (P,).
        bias: (V,) or ``None``.
        head: the transforms of the logits, for the reference too.
        bounds: where packed sequences start and end, S + 1 values; ``None`` for padded ones.
        num_sequences: S.
        ignore_index: the label of positions that are not scored.
        reference: see :meth:`with_reference`.
        temperature: of each token, like ``labels``, in place of the head's; ``None``: the head's.
        sequence_group: the ranks that share every sequence; ``None``: this rank has whole sequences.
        parallel: ``weight`` is this rank's rows of a sharded head; ``head.vocab_size`` is then that of the rows.
    """

    hidden: Tensor
    weight: Weight
    labels: Tensor
    bias: Tensor | None
    head: HeadSpec
    bounds: list[int] | None
    num_sequences: int
    ignore_index: int
    reference: Reference = Reference()
    temperature: Tensor | None = None
    sequence_group: dist.ProcessGroup | None = None
    parallel: VocabParallel | None = None

    @classmethod
    def check(
        cls,
        hidden: Tensor,  # (S, T, H), or packed (P, H)
        weight: Weight,  # (V, H)
        labels: Tensor,  # (S, T), or packed (P,)
        bias: Tensor | None,  # (V,)
        head: HeadSpec | None,
        cu_seqlens: Tensor | None,  # (S + 1,)
        ignore_index: int,
        temperature: Tensor | None = None,  # like labels
        parallel: VocabParallel | None = None,
    ) -> LossCall:
        """Check what every loss is called with; no reference yet."""
        weight, bias, parallel, head = from_dtensor(weight, bias, parallel, head)
        named = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias, "cu_seqlens": cu_seqlens}
        named["temperature"] = temperature
        for name, value in named.items():
            check_data(name, value)
        head = check_spec(head)
        weight = read_weight("weight", weight)
        if parallel is not None:
            check_tensor("labels", labels)
            hidden, head = enter(parallel, hidden, weight, labels, head)
        check_head(hidden, weight, bias)
        check_entries(head, weight)
        check_labels(labels, hidden)
        check_temperature(temperature, labels, head)
        bounds, count = check_layout(labels, cu_seqlens)
        return cls(hidden, weight, labels, bias, head, bounds, count, ignore_index, temperature=temperature, parallel=parallel)

    def with_reference(
        self,
        ref_logps: Tensor | None,  # (S,), or like labels with per_token
        ref_hidden: Tensor | None,  # like hidden, up to its last dimension
        ref_weight: Weight | None,  # (V, H')
        ref_bias: Tensor | None,  # (V,)
        *,
        uses: bool,
        needs: bool,
        per_token: bool = False,
    ) -> LossCall:
        """Check the reference: log-probabilities or hidden states, not both.

        Args:
            uses: whether the loss can use a reference; passing one is an error otherwise.
            needs: whether the loss is undefined without one.
            per_token: whether ``ref_logps`` has one value per position, not one per sequence.
        """
        ref_weight, ref_bias = local_rows(ref_weight, self.parallel), local_rows(ref_bias, self.parallel)
        named = {"ref_logps": ref_logps, "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
        given = [name for name, value in named.items() if value is not None]
        for name, value in named.items():
            check_data(name, value)
        if given and not uses:
            raise ValueError(f"{given[0]} is given, but this loss does not use a reference")
        if ref_logps is not None and len(given) > 1:
            raise ValueError(f"ref_logps and {given[1]} are given: pass the log-probabilities or the hidden states, not both")
        if needs and ref_logps is None and ref_hidden is None:
            raise ValueError("this loss needs a reference: pass ref_logps, or ref_hidden and ref_weight")
        if ref_logps is None:
            return replace(self, reference=Reference(states=self._reference_states(ref_hidden, ref_weight, ref_bias)))
        if per_token:
            logps = check_per_token("ref_logps", ref_logps, self.labels)
        else:
            logps = check_per_sequence("ref_logps", ref_logps, self.num_sequences, self.hidden.device)
        return replace(self, reference=Reference(logps))

    def _reference_states(self, hidden: Tensor | None, weight: Weight | None, bias: Tensor | None) -> ReferenceStates | None:
        """Hidden states shaped like the policy's up to the hidden size, and a head of as many rows."""
        if hidden is None or weight is None:
            named = {"ref_hidden": hidden, "ref_weight": weight, "ref_bias": bias}
            if given := [name for name, value in named.items() if value is not None]:
                raise ValueError(f"ref_hidden and ref_weight must be given together, got only {', '.join(given)}")
            return None
        check_tensor("ref_hidden", hidden)
        if self.parallel is not None:
            hidden = self.parallel.gather_positions(hidden, "ref_hidden", self.labels)
        mine = self.hidden
        if hidden.device != mine.device:
            raise ValueError(f"ref_hidden is on {hidden.device} but hidden is on {mine.device}: move one of them")
        weight = read_weight("ref_weight", weight)
        if self.parallel is not None and not isinstance(weight, Tensor):
            raise TypeError(f"ref_weight is a {type(weight).__name__}, which is not served with parallel")
        check_head(hidden, weight, bias, prefix="ref_")
        if hidden.shape[:-1] != mine.shape[:-1]:
            raise ValueError(f"ref_hidden must have shape {(*mine.shape[:-1], 'H')} like hidden, got {tuple(hidden.shape)}")
        if self.head.vocab_size is not None:  # the two heads may be padded differently
            check_entries(self.head, weight, "ref_weight")
        elif len(weight) != len(self.weight):
            raise ValueError(f"ref_weight must have {len(self.weight)} rows like weight, got {len(weight)}")
        states = hidden.detach().to(compute_dtype(hidden)).reshape(-1, hidden.shape[-1])
        weight, bias = real_rows(weight.detach(), None if bias is None else bias.detach(), self.head)
        return ReferenceStates(states, weight, bias)

    @property
    def vocab_size(self) -> int:
        """V, without the padding rows of the head."""
        return self.entries if self.parallel is None else self.parallel.vocab_size

    @property
    def entries(self) -> int:
        """The weight's rows without padding: V, or V_r of a sharded head."""
        return self.head.entries_of(len(self.weight))

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype in which losses are evaluated: float64, or float32 on devices that have no float64."""
        return torch.float32 if self.hidden.device.type == "mps" else torch.float64
