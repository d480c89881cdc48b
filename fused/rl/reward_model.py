"""Reward models: the Bradley-Terry loss, and pooling of the hidden state that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitless.kernels.core.checks import check_cu_seqlens

from ..checks import check_number
from ..num_items import Counted, item_counts, over, read_num_items
from ..results import mean_or_zero
from .checks import check_float, check_like


@dataclass
class RewardModelOutput:
    """The result of :class:`BradleyTerryLoss`; only ``loss`` carries a gradient.

    Attributes:
        loss: 0-dim, float32 (float64 for float64 rewards).
        chosen_rewards, rejected_rewards: (P,).
        margins: (P,) ``chosen_rewards - rejected_rewards``.
        accuracy: 0-dim, the fraction of pairs whose chosen reward is the larger one.
        metrics: 0-dim, under the names that TRL's RewardTrainer logs: ``min_reward``, ``mean_reward``, ``max_reward``,
            ``accuracy`` and ``margin``; 0 without pairs.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class BradleyTerryLoss(nn.Module):
    """Loss of a reward model on preference pairs: ``-log sigmoid(chosen - rejected - margin)``, averaged over pairs.

    The Bradley-Terry likelihood (https://huggingface.co/papers/2203.02155 eq. 1), with the margin of Llama 2
    (https://huggingface.co/papers/2307.09288 eq. 2) and the centering of https://huggingface.co/papers/2312.09244; as TRL's
    RewardTrainer, but computed in float32 at least.

    Args:
        center_rewards_coefficient: weight of ``(chosen + rejected)**2``, which keeps rewards near 0. None: no such term.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> out = BradleyTerryLoss()(torch.tensor([2.0, 1.0, 0.0, 3.0]))  # pairs (2, 0) and (1, 3)
        >>> out.loss, out.accuracy
        (tensor(1.1269), tensor(0.5000))
    """

    def __init__(self, center_rewards_coefficient: float | None = None) -> None:
        super().__init__()
        if center_rewards_coefficient is not None:
            check_number("center_rewards_coefficient", center_rewards_coefficient, 0)
        self.center_rewards_coefficient = center_rewards_coefficient

    def extra_repr(self) -> str:
        return "" if (c := self.center_rewards_coefficient) is None else f"center_rewards_coefficient={c}"

    def forward(
        self,
        rewards: Tensor,  # (2P,) or (2P, 1), or (P,) with rejected_rewards
        rejected_rewards: Tensor | None = None,  # like rewards
        *,
        margin: Tensor | None = None,  # (P,)
        num_items_in_batch: Tensor | Sequence[Tensor | float] | float | None = None,  # 0-dim, or (2,)
    ) -> RewardModelOutput:
        """Compute the loss.

        Args:
            rewards: scores, floating point: chosen first, then rejected, as a model with one output returns them for a
                stacked batch; with ``rejected_rewards`` the chosen ones only.
            rejected_rewards: scores of the rejected sequences.
            margin: the least difference that each pair's rewards should have.
            num_items_in_batch: what to divide by if this call is one of several micro-batches: the pairs of all of them, or
                :meth:`count_items`, added over them. Their losses and gradients then add up to those of one batch.

        Returns:
            RewardModelOutput: the loss (0 without pairs), and detached rewards and metrics.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        rewards, rejected_rewards = _chosen_and_rejected(rewards, rejected_rewards)
        wide = torch.promote_types(torch.promote_types(rewards.dtype, rejected_rewards.dtype), torch.float32)
        chosen, rejected = rewards.to(wide), rejected_rewards.to(wide)
        margins = chosen - rejected
        h = margins
        if margin is not None:
            check_like("margin", margin, rewards, "the chosen rewards")
            h = h - margin.to(wide)
        losses = -F.logsigmoid(h)
        if self.center_rewards_coefficient is not None:
            losses = losses + self.center_rewards_coefficient * (chosen + rejected).square()
        some = len(h) > 0
        items = read_num_items(num_items_in_batch, Counted("pairs", None)).checked(some, some, h.device, wide)
        loss = over(losses.sum(), len(h) if items.units is None else items.units)
        chosen, rejected, margins = chosen.detach(), rejected.detach(), margins.detach()
        accuracy = mean_or_zero((margins > 0).to(wide))
        scores = torch.cat([chosen, rejected]) if some else chosen.new_zeros(1)
        metrics = {"min_reward": scores.min(), "mean_reward": scores.mean(), "max_reward": scores.max()}
        metrics |= {"accuracy": accuracy, "margin": mean_or_zero(margins)}
        return RewardModelOutput(loss, chosen, rejected, margins, accuracy, metrics)

    def count_items(
        self,
        rewards: Tensor,  # (2P,) or (2P, 1), or (P,) with rejected_rewards
        rejected_rewards: Tensor | None = None,  # like rewards
    ) -> Tensor:
        """What the loss of these rewards divides by: ``(pairs, 0)``, (2,) float64 on the device of the rewards.

        Add the counts of all micro-batches and data-parallel ranks of an optimiser step, and pass the sum to each call as
        ``num_items_in_batch``.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        chosen, _ = _chosen_and_rejected(rewards, rejected_rewards)
        return item_counts(len(chosen), 0, chosen.device)


def _chosen_and_rejected(rewards: Tensor, rejected_rewards: Tensor | None) -> tuple[Tensor, Tensor]:
    """The checked rewards of each pair, (P,) each."""
    check_float("rewards", rewards)
    if rejected_rewards is not None:
        check_like("rejected_rewards", rejected_rewards, rewards, "rewards")
    if rewards.dim() == 2 and rewards.shape[1] == 1:
        rewards = rewards[:, 0]
        rejected_rewards = None if rejected_rewards is None else rejected_rewards[:, 0]
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have one score per sequence, shape [S] or [S, 1], got {tuple(rewards.shape)}")
    if rejected_rewards is None:
        if len(rewards) % 2:
            raise ValueError(
                f"rewards must hold an even number of scores, chosen first and then rejected, got {len(rewards)}; or pass "
                f"rejected_rewards"
            )
        rewards, rejected_rewards = rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :]
    return rewards, rejected_rewards


def last_token_pool(
    hidden: Tensor,  # (N, H) with cu_seqlens, or (S, T, H)
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    attention_mask: Tensor | None = None,  # (S, T)
) -> Tensor:
    """The hidden state of each sequence's last token, which reward models score. Differentiable.

    Args:
        hidden: hidden states, floating point; padded ``[S, T, H]``, or packed ``[N, H]`` with ``cu_seqlens``.
        cu_seqlens: int32 or int64, where each packed sequence starts and ends.
        attention_mask: bool or integers, 0 at padding, which may be on the right, on the left, or on both sides. None: no
            sequence is padded.

    Returns:
        Tensor: (S, H), in the dtype of ``hidden``.

    Raises:
        TypeError, ValueError: naming the argument; for a sequence without tokens, with its index.

    Example:
        >>> hidden = torch.arange(6.0).view(1, 3, 2)
        >>> last_token_pool(hidden, attention_mask=torch.tensor([[1, 1, 0]]))
        tensor([[2., 3.]])
    """
    check_float("hidden", hidden)
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("cu_seqlens and attention_mask are given: packed tokens have no padding, pass one of them")
        if hidden.dim() != 2:
            raise ValueError(f"hidden must have shape [N, H] with cu_seqlens, got {tuple(hidden.shape)}")
        bounds = check_cu_seqlens(cu_seqlens, len(hidden), hidden.device)
        empty = [j for j, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)) if start == stop]
        if empty:
            raise ValueError(f"cu_seqlens must give each sequence a token, got none for sequence {empty[0]}")
        return hidden[torch.tensor(bounds[1:], dtype=torch.long, device=hidden.device) - 1]
    if hidden.dim() != 3:
        raise ValueError(f"hidden must have shape [S, T, H], or [N, H] with cu_seqlens, got {tuple(hidden.shape)}")
    count, length = hidden.shape[:2]
    if attention_mask is None:
        if count and not length:
            raise ValueError(f"hidden must give each sequence a token, got shape {tuple(hidden.shape)}")
        return hidden[:, -1] if length else hidden.new_zeros(0, hidden.shape[2])
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a torch.Tensor, got {type(attention_mask).__name__}")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool or integers, got {attention_mask.dtype}")
    if tuple(attention_mask.shape) != (count, length):
        raise ValueError(f"attention_mask must have shape {(count, length)} like hidden, got {tuple(attention_mask.shape)}")
    if attention_mask.device != hidden.device:
        raise ValueError(f"attention_mask is on {attention_mask.device} but hidden is on {hidden.device}: move one of them")
    places = torch.arange(1, length + 1, device=hidden.device)
    last = F.pad((attention_mask != 0) * places, (1, 0)).amax(1)  # 0 where there is none
    if bool((last == 0).any()):
        raise ValueError(
            f"attention_mask must leave each sequence a token, got none for sequence {int((last == 0).nonzero()[0])}"
        )
    return hidden[torch.arange(count, device=hidden.device), last - 1]
