"""Single-stream policy optimisation: a baseline per prompt that persists across batches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_number
from .checks import check_float, check_one_each
from .masked import masked_whiten


class ValueTracker:
    """Value of each prompt, tracked over training steps, https://huggingface.co/papers/2509.13232 (SPO).

    For each prompt, the tracker keeps an estimate ``v`` of the policy's reward and an effective number ``n`` of observations.
    In the paper, for rewards in [0, 1], this is a Beta distribution with ``alpha = n * v`` and ``beta = n * (1 - v)``. A reward
    updates it with ``rho = 2 ** (-kl / half_life)`` clamped to ``[rho_min, rho_max]``:

        alpha <- rho * alpha + reward        beta <- rho * beta + 1 - reward

    This is ``v <- v + (reward - v) / (rho * n + 1)``, ``n <- rho * n + 1``: a moving average whose memory shortens with the
    policy's KL divergence on this prompt since its last use. In this form it accepts rewards of any range. A prompt starts
    with ``n = 1 / (1 - rho_min)``. The advantage is ``reward - v``, whitened over the batch, with the ``v`` from before it.

    Choices that the paper leaves open: without ``kl``, ``rho`` is ``rho_max``; a prompt that occurs several times in a batch is
    discounted once, by the mean of its ``kl``, and then each of its rewards is added; whitening is that of
    :func:`logitless.rl.masked_whiten`, with the unbiased variance; a reward of NaN (no score) leaves its prompt unchanged and
    has advantage 0.

    Args:
        half_life: the KL divergence, in nats, at which the weight of past observations halves.
        rho_min, rho_max: bounds of the factor ``rho``; 0.875 and 0.96 are windows of 8 and 25 observations.
        initial_value: ``v`` of a prompt that was not passed to :meth:`initialize`.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> tracker = ValueTracker()
        >>> tracker.initialize(["easy", "hard"], torch.tensor([0.9, 0.1]))
        >>> tracker.advantages(["easy", "hard"], torch.tensor([1.0, 1.0]), whiten=False)
        tensor([0.1000, 0.9000])
        >>> tracker.values(["easy", "hard"])
        tensor([0.9115, 0.2037])
    """

    def __init__(
        self, *, half_life: float = 0.06, rho_min: float = 0.875, rho_max: float = 0.96, initial_value: float = 0.5
    ) -> None:
        self.half_life = check_number("half_life", half_life, 0, open_low=True)
        self.rho_min = check_number("rho_min", rho_min, 0, 1)
        self.rho_max = check_number("rho_max", rho_max, self.rho_min, 1)
        if self.rho_min == 1:
            raise ValueError("rho_min must be below 1: a prompt starts with 1 / (1 - rho_min) observations")
        self.initial_value = check_number("initial_value", initial_value)
        self._table: dict[Hashable, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._table

    def _get(self, key: Hashable) -> tuple[float, float]:
        return self._table.get(key, (self.initial_value, 1 / (1 - self.rho_min)))

    def initialize(self, keys: Sequence[Hashable] | Tensor, values: Tensor) -> None:
        """Set the estimates of prompts, for example to mean rewards of a few samples before training. values: (S,)."""
        names = _names(keys)
        check_one_each("values", values, len(names), values.device if isinstance(values, Tensor) else torch.device("cpu"))
        for name, value in zip(names, values.tolist(), strict=True):
            self._table[name] = (check_number("values", value), 1 / (1 - self.rho_min))

    def values(self, keys: Sequence[Hashable] | Tensor) -> Tensor:
        """Estimates of the prompts' rewards. (S,) float32."""
        return torch.tensor([self._get(name)[0] for name in _names(keys)], dtype=torch.float32)

    def counts(self, keys: Sequence[Hashable] | Tensor) -> Tensor:
        """Effective number of observations of each estimate. (S,) float32."""
        return torch.tensor([self._get(name)[1] for name in _names(keys)], dtype=torch.float32)

    @torch.no_grad()
    def advantages(
        self,
        keys: Sequence[Hashable] | Tensor,
        rewards: Tensor,  # (S,)
        *,
        kl: Tensor | None = None,  # (S,)
        whiten: bool = True,
        update: bool = True,
    ) -> Tensor:
        """Advantages of a batch; then updates the estimates of its prompts.

        Args:
            keys: the prompt of each sequence: strings, numbers or other hashable values, or a tensor of integers. Pass the
                whole batch, of all processes: whitening uses its statistics.
            rewards: one per sequence, floating point. NaN: the sequence has no score.
            kl: divergence in nats of the current policy from the policy at the prompt's last use; not negative.
            whiten: False returns ``rewards - values``.
            update: False leaves the tracker unchanged (evaluation).

        Returns:
            Tensor: (S,) in the rewards' dtype, at least float32.

        Raises:
            TypeError, ValueError: naming the argument; for fewer than two rewards to whiten.
        """
        check_float("rewards", rewards)
        check_bool("whiten", whiten)
        check_bool("update", update)
        names = _names(keys)
        check_one_each("rewards", rewards, len(names), rewards.device)
        divergences = [0.0] * len(names)
        if kl is not None:
            if not update:
                raise ValueError("kl is given, but update=False uses none")
            check_one_each("kl", kl, len(names), rewards.device)
            divergences = kl.double().tolist()
            if any(not d >= 0 for d in divergences):
                raise ValueError(f"kl must not be negative or NaN, got {min(divergences)}")
        scores = rewards.double().tolist()
        above = [score - self._get(name)[0] for name, score in zip(names, scores, strict=True)]
        differences = torch.tensor(above, dtype=torch.float64)
        scored = ~differences.isnan()
        if whiten and int(scored.sum()) < 2:
            raise ValueError(f"rewards must hold at least 2 values that are not NaN for whiten=True, got {int(scored.sum())}")
        found = masked_whiten(differences, scored) if whiten else torch.where(scored, differences, 0)
        if update:
            self._observe(names, scores, divergences)
        return found.to(rewards.device, torch.promote_types(rewards.dtype, torch.float32))

    def _observe(self, names: list[Hashable], scores: list[float], divergences: list[float]) -> None:
        seen: dict[Hashable, list[tuple[float, float]]] = {}
        for name, score, divergence in zip(names, scores, divergences, strict=True):
            if score == score:
                seen.setdefault(name, []).append((score, divergence))
        for name, observed in seen.items():
            value, count = self._get(name)
            divergence = sum(d for _, d in observed) / len(observed)
            rho = min(self.rho_max, max(self.rho_min, 2 ** (-divergence / self.half_life)))
            total = rho * count + len(observed)
            self._table[name] = (value + sum(score - value for score, _ in observed) / total, total)

    def state_dict(self) -> dict[str, Any]:
        """The state, for ``torch.save`` and :meth:`load_state_dict`."""
        pairs = torch.tensor(list(self._table.values()), dtype=torch.float64).reshape(-1, 2)
        return {"keys": list(self._table), "values": pairs[:, 0].clone(), "counts": pairs[:, 1].clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace all prompts by those of a state. The constructor's settings stay."""
        missing = {"keys", "values", "counts"}.symmetric_difference(state_dict)
        if missing:
            raise ValueError(f"state_dict must have exactly keys, values and counts, got {sorted(map(str, state_dict))}")
        names = list(state_dict["keys"])
        for key in ("values", "counts"):
            check_one_each(f"state_dict[{key!r}]", state_dict[key], len(names), state_dict[key].device)
        self._table = dict(zip(names, zip(state_dict["values"].tolist(), state_dict["counts"].tolist()), strict=True))


def _names(keys: Sequence[Hashable] | Tensor) -> list[Hashable]:
    if isinstance(keys, Tensor):
        if keys.dim() != 1 or keys.is_floating_point():
            raise TypeError(
                f"keys must be a sequence, or a tensor of integers of shape [S], got {keys.dtype} {tuple(keys.shape)}"
            )
        return list(keys.tolist())
    if isinstance(keys, str) or not isinstance(keys, Sequence):
        raise TypeError(f"keys must be a sequence of hashable keys, one per sequence of the batch, got {type(keys).__name__}")
    names = [k.item() if isinstance(k, Tensor) and k.dim() == 0 and not k.is_floating_point() else k for k in keys]
    for name in names:
        if isinstance(name, Tensor):  # hashed by identity, not by value
            raise TypeError(f"keys must be hashable by value, got a tensor of {name.dtype} {tuple(name.shape)}")
    return names
