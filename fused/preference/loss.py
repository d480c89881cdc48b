"""What a preference-loss function receives and returns: log-probabilities of sequences or pairs, and one loss for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..num_items import Counted, over

Group = Literal["sequence", "pair", "batch"]
Margin = Literal["sum", "mean"]


@dataclass(frozen=True)
class Totals:
    """Counts of a call, or of a whole optimiser step, whichever part of it a loss function is called with.

    Attributes:
        num_groups: pairs (sequences for a sequence loss).
        num_nll_tokens: tokens of the NLL term: all scored tokens of the chosen sequences (of all sequences for a sequence
            loss), or those of ``nll_labels``.
    """

    num_groups: Tensor | float
    num_nll_tokens: Tensor | float


@dataclass
class Sequences:
    """Some sequences of the batch. All tensors are (s,), float64 on CPUs and GPUs; ``logps`` carries the gradient.

    Attributes:
        logps: weighted sum of the log-probabilities of the scored tokens.
        lengths: number of scored tokens.
        nll_sums: sum of ``-logp`` over the tokens of the NLL term, unweighted.
        ref_logps: the reference's ``logps``, or ``None``.
        confidence: mean over scored tokens of ``logp - log(sum_v p_v^2)``, detached; ``None`` unless the loss declares it.
        inputs: further arguments by name, per sequence (``desirable`` ...) or for all of them (``kl``).
        totals: what the loss is divided by: the counts of the call or, with ``num_items_in_batch``, those of the step. The
            engine divides the sum of the losses by ``totals.num_groups``.
        call_totals: the counts of the call, for metrics; ``None``: ``totals``.

    With a ``sequence_group``, every value is of whole sequences; ``nll_sums`` is NaN unless the loss declares ``uses_nll``.
    """

    logps: Tensor
    lengths: Tensor
    nll_sums: Tensor
    ref_logps: Tensor | None
    confidence: Tensor | None
    inputs: Mapping[str, Tensor]
    totals: Totals
    call_totals: Totals | None = None

    @property
    def mean_logps(self) -> Tensor:
        """``logps`` per scored token; 0 for a sequence without any."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def reference(self) -> Tensor:
        """``ref_logps``, or 0 if the loss runs without a reference."""
        return torch.zeros_like(self.logps) if self.ref_logps is None else self.ref_logps

    def token_mean_nll(self) -> Tensor:
        """Each group's share of the token-mean NLL, scaled so that the mean over groups is that NLL. (s,)."""
        return self._token_mean_nll(self.totals)

    def _token_mean_nll(self, totals: Totals) -> Tensor:
        return self.nll_sums * over(totals.num_groups, totals.num_nll_tokens)


class Pairs(Sequences):
    """Some pairs: sequences ``0..p-1`` are chosen, ``p..2p-1`` the matching rejected ones. Attributes are (2p,)."""

    @property
    def num_pairs(self) -> int:
        return len(self.logps) // 2

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected half, (p,) each, of something with one value a sequence."""
        return values[: self.num_pairs], values[self.num_pairs :]

    @property
    def chosen_logps(self) -> Tensor:
        return self.split(self.logps)[0]

    @property
    def rejected_logps(self) -> Tensor:
        return self.split(self.logps)[1]

    @property
    def chosen_lengths(self) -> Tensor:
        return self.split(self.lengths)[0]

    @property
    def rejected_lengths(self) -> Tensor:
        return self.split(self.lengths)[1]

    @property
    def ref_chosen_logps(self) -> Tensor:
        return self.split(self.reference)[0]

    @property
    def ref_rejected_logps(self) -> Tensor:
        return self.split(self.reference)[1]

    def chosen_nll(self) -> Tensor:
        """Each pair's share of the token-mean NLL of the chosen sequences; its mean over pairs is that NLL. (p,)."""
        return self.split(self.token_mean_nll())[0]

    def chosen_nll_of_call(self) -> Tensor:
        """The same for metrics: the mean over the pairs of the call is the token-mean NLL of the call. (p,)."""
        return self.split(self._token_mean_nll(self.call_totals or self.totals))[0]


@dataclass
class PreferenceLossResult:
    """What a loss function returns if it has rewards or metrics besides its losses.

    Attributes:
        losses: one value per group, (p,) or (s,); the engine averages over the groups.
        chosen_rewards, rejected_rewards: (p,); a sequence loss puts ``rewards`` into ``metrics``. Detached by the engine.
        metrics: further values by name, one per group, averaged over the groups of the call. The names must not depend on the
            data.
    """

    losses: Tensor
    chosen_rewards: Tensor | None = None
    rejected_rewards: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> PreferenceLossResult:
        """The same without a graph."""
        chosen, rejected = self.chosen_rewards, self.rejected_rewards
        return PreferenceLossResult(
            self.losses.detach(),
            None if chosen is None else chosen.detach(),
            None if rejected is None else rejected.detach(),
            {name: values.detach() for name, values in self.metrics.items()},
        )


@dataclass(frozen=True)
class ClosedForm:
    """The same loss as a scalar function of the pair's margin: backends may compute losses and derivatives in one launch.

    The margin is the difference of chosen and rejected, per token for ``margin="mean"``. Rewards are ``beta`` times each of
    them minus its reference.

    Attributes:
        fn, margin: the loss function that this replaces, and its margin.
        function: ``"log_sigmoid"``, ``"hinge"`` or ``"square"``, see
            :class:`~logitless.kernels.backends.interface.ElementWise`.
        beta, gamma, label_smoothing: its parameters.
    """

    fn: Callable[..., Tensor | PreferenceLossResult]
    margin: Margin
    function: str
    beta: float
    gamma: float = 0.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss function and its properties that the engine depends on.

    Args:
        fn: takes :class:`Pairs` (``group="pair"`` and ``"batch"``) or :class:`Sequences` (``group="sequence"``), returns
            one loss per group or a :class:`PreferenceLossResult`. Plain differentiable torch; autograd differentiates it.
            It is called with no pairs if the batch has none.
        group: which sequences' coefficients depend on each other: ``"pair"``, ``"sequence"``, or ``"batch"`` for all.
        margin: ``"sum"`` or ``"mean"`` if a pair's loss depends on its log-probabilities only through that difference of
            chosen and rejected. A pair that exceeds the memory budget then needs no second pass.
        needs_reference: whether the loss is undefined without reference log-probabilities.
        uses_nll: whether ``fn`` reads ``nll_sums`` (``nll_labels`` is an error otherwise).
        uses_confidence: whether ``fn`` reads ``confidence``.
        nll_only: whether the loss is its NLL term alone, which is divided by tokens only.
        optional_reference: whether ``fn`` works with and without a reference.
        closed_form: the same loss for the compiled operators; ignored if ``fn`` or ``margin`` is not its own.
    """

    fn: Callable[..., Tensor | PreferenceLossResult]
    group: Group = "pair"
    margin: Margin | None = None
    needs_reference: bool = False
    uses_nll: bool = False
    uses_confidence: bool = False
    optional_reference: bool = False
    closed_form: ClosedForm | None = None
    nll_only: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be callable, got {self.fn!r}")
        if self.group not in ("sequence", "pair", "batch"):
            raise ValueError(f"group must be 'sequence', 'pair' or 'batch', got {self.group!r}")
        if self.margin not in (None, "sum", "mean"):
            raise ValueError(f"margin must be None, 'sum' or 'mean', got {self.margin!r}")
        if self.margin is not None and self.group != "pair":
            raise ValueError(f"margin={self.margin!r} needs group='pair', got group={self.group!r}")

    @property
    def uses_reference(self) -> bool:
        return self.needs_reference or self.optional_reference

    def counted(self, name: str) -> Counted:
        """What the loss divides by; an error, which says that ``name`` cannot be used, if it cannot be divided."""
        if self.group == "batch":
            raise ValueError(
                f"{name} cannot be used with this loss, which depends on all pairs of a batch at once (group='batch': aot, "
                "aot_unpaired, use_weighting with sft, or your own): pass all of them in one call"
            )
        units = "sequences" if self.group == "sequence" else "pairs"
        return Counted(None if self.nll_only else units, "tokens of the NLL" if self.uses_nll else None)

    def __call__(self, sequences: Sequences) -> PreferenceLossResult:
        result = self.fn(sequences)
        return result if isinstance(result, PreferenceLossResult) else PreferenceLossResult(result)
