"""What a policy loss is called with besides hidden states and head, and what of it each scored token gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call import LossCall
from ..checks import check_data, check_number, check_per_token
from ..rl.segments import Segments
from ..scored_tokens import ScoredTokens
from .importance import importance_weights


@dataclass(frozen=True)
class RolloutCorrection:
    """How ``sampling_logps`` become weights of the tokens' losses; see :func:`logitless.rl.importance_sampling_ratio`."""

    mode: str
    clip_min: float | None
    clip_max: float | None


@dataclass(frozen=True)
class InputOptions:
    """How a loss module reads its inputs.

    Attributes:
        correction: makes the importance ratio from ``sampling_logps``; ``None``: it is given, or there is none.
        reads_sampling: whether the loss function reads ``sampling_logps``.
        sequence_ratios: whether it reads one importance ratio per sequence, if there are such.
        prefers_sequences: if there are as many packed sequences as positions, whether ``advantages`` and
            ``importance_sampling_ratio`` have one value per sequence.
    """

    correction: RolloutCorrection | None
    reads_sampling: bool
    sequence_ratios: bool
    prefers_sequences: bool


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of the scored tokens, in their order: (N,) each.

    Attributes:
        others: further inputs of the loss function, by name.
        of_sequences: (S,), by name.
    """

    advantages: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    others: Mapping[str, Tensor]
    of_sequences: Mapping[str, Tensor]


@dataclass(frozen=True)
class PolicyInputs:
    """The checked inputs of a call. Detached.

    Attributes:
        advantages, importance_sampling_ratio: (S,), or like ``labels``.
        old_logps, sampling_logps: like ``labels``.
        entropy_threshold: 0-dim.
    """

    advantages: Tensor
    old_logps: Tensor | None
    sampling_logps: Tensor | None
    importance_sampling_ratio: Tensor | None
    entropy_threshold: Tensor | None

    @classmethod
    def check(
        cls,
        call: LossCall,
        advantages: Any,
        old_logps: Any,
        sampling_logps: Any,
        importance_sampling_ratio: Any,
        entropy_threshold: Any,
    ) -> PolicyInputs:
        """Check types, shapes and devices; names are those of the arguments."""
        labels, count = call.labels, call.num_sequences

        def optional(name: str, value: Any, num_sequences: int | None = None) -> Tensor | None:
            return None if value is None else check_per_token(name, value, labels, num_sequences)

        return cls(
            check_per_token("advantages", advantages, labels, count),
            optional("old_logps", old_logps),
            optional("sampling_logps", sampling_logps),
            optional("importance_sampling_ratio", importance_sampling_ratio, count),
            None if entropy_threshold is None else _check_threshold(entropy_threshold),
        )

    def gather(
        self, call: LossCall, tokens: ScoredTokens, options: InputOptions, add: Callable[[Tensor, Tensor], Tensor]
    ) -> TokenInputs:
        """The inputs of the scored tokens. ``add``: a backend's ``segment_sum``, added over the ranks of a sequence group."""

        def at_tokens(values: Tensor) -> Tensor:
            return values.reshape(-1)[tokens.rows]

        def is_per_sequence(values: Tensor) -> bool:
            if values.shape == call.labels.shape == (call.num_sequences,):  # packed, and both are possible
                return options.prefers_sequences
            return values.shape != call.labels.shape

        advantages = self.advantages
        by_sequence = is_per_sequence(advantages)
        others, of_sequences = {}, {}
        ratio = self.importance_sampling_ratio
        ratio_by_sequence = ratio is not None and is_per_sequence(ratio)
        if options.correction is not None:
            ratio = self._ratio(call, options.correction, add)
            ratio_by_sequence = options.correction.mode.startswith("sequence_")
        if ratio is not None and not ratio_by_sequence:
            others["importance_sampling_ratio"] = at_tokens(ratio)
        elif ratio is not None and options.sequence_ratios:
            of_sequences["sequence_importance_sampling_ratio"] = ratio
        elif ratio is not None:
            others["importance_sampling_ratio"] = ratio[tokens.sequences]
        if options.reads_sampling and self.sampling_logps is not None:
            others["sampling_logps"] = at_tokens(self.sampling_logps)
        if self.entropy_threshold is not None:
            threshold = self.entropy_threshold.to(tokens.device, call.wide_dtype)
            others["entropy_threshold"] = threshold.expand(len(tokens))
        ref_logps = call.reference.logps
        return TokenInputs(
            advantages[tokens.sequences] if by_sequence else at_tokens(advantages),
            None if self.old_logps is None else at_tokens(self.old_logps),
            None if ref_logps is None else at_tokens(ref_logps),
            others,
            of_sequences,
        )

    def _ratio(self, call: LossCall, correction: RolloutCorrection, add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The ratio of the trainer's to the rollout engine's probabilities, like ``labels`` or (S,)."""
        assert self.old_logps is not None and self.sampling_logps is not None
        labels = call.labels
        if call.bounds is None:
            bounds = torch.arange(len(labels) + 1, device=labels.device) * labels.shape[1]
        else:
            bounds = torch.tensor(call.bounds, device=labels.device)
        return importance_weights(
            self.old_logps,
            self.sampling_logps.to(self.old_logps.dtype),
            Segments(labels.shape, bounds, (labels != call.ignore_index).reshape(-1)),
            mode=correction.mode,
            clip_min=correction.clip_min,
            clip_max=correction.clip_max,
            add=add,
        )


def _check_threshold(threshold: Any) -> Tensor:
    """``entropy_threshold``, finite; 0-dim. The value of a tensor on a GPU is not checked."""
    name = "entropy_threshold"
    check_data(name, threshold)
    if not isinstance(threshold, Tensor):
        return torch.tensor(check_number(name, threshold), dtype=torch.float64, device="cpu")
    if threshold.numel() != 1 or not threshold.is_floating_point():
        raise ValueError(f"{name} must be one floating point number, got {threshold.dtype} of shape {tuple(threshold.shape)}")
    if threshold.device.type == "cpu":
        check_number(name, threshold.item())
    return threshold.detach().reshape(())
