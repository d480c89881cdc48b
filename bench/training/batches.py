"""Batches of token ids with the lengths of a profile, and what each of TRL's collators is fed of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
#: Token ids below are special.
_FIRST_ID = 3


@dataclass(frozen=True)
class Profile:
    """Lengths of prompts and responses, as shares of the longest sequence; log-normal where ``sigma`` is more than 0.

    The medians and spreads are this benchmark's own choice of what the field's data look like; the raw figures of a run
    hold the lengths that came out.
    """

    about: str
    prompt: float
    response: float
    sigma: float


PROFILES: dict[str, Profile] = {
    "fixed": Profile("every sequence as long, a quarter of it prompt: no padding", 0.25, 0.75, 0.0),
    "chat": Profile("short prompts, answers of very different lengths", 0.10, 0.25, 0.7),
    "summary": Profile("long prompts, short answers", 0.60, 0.10, 0.4),
    "balanced": Profile("prompt and answer about as long: what a shared prefix saves most on", 0.45, 0.45, 0.1),
    "reasoning": Profile("short prompts, long chains of thought", 0.05, 0.45, 0.6),
}


@dataclass(frozen=True)
class Batch:
    """S sequences; of pairs the P chosen ones first, then the P rejected ones, which have the same prompts.

    Attributes:
        prompts, completions: token ids of each sequence.
    """

    prompts: tuple[list[int], ...]
    completions: tuple[list[int], ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sequences(self) -> list[list[int]]:
        return [p + c for p, c in zip(self.prompts, self.completions, strict=True)]

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(p) for p in self.prompts]

    @property
    def tokens(self) -> int:
        """Of all sequences, padding left out."""
        return sum(map(len, self.sequences))

    @property
    def scored(self) -> int:
        """Tokens of the completions."""
        return sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        return max(map(len, self.sequences))

    def rotated(self) -> Batch:
        """Completions moved on by one: the mismatched pairs of KTO's KL term, as TRL's trainer makes them."""
        return Batch(self.prompts, (self.completions[-1], *self.completions[:-1]))

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, attention mask and labels, not shifted: (S, T) each, padded on the right."""
        shape = len(self), self.longest
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE)
        for i, (sequence, start) in enumerate(zip(self.sequences, self.prompt_lengths, strict=True)):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
            labels[i, start : len(sequence)] = ids[i, start : len(sequence)]
        return ids.to(device), mask.to(device), labels.to(device)


def _lengths(count: int, median: float, longest: int, sigma: float, g: torch.Generator) -> list[int]:
    drawn = median * (sigma * torch.randn(count, generator=g)).exp() if sigma else torch.full((count,), median)
    return [min(longest, max(2, round(n))) for n in drawn.tolist()]


def _ids(vocab: int, count: int, power: float, g: torch.Generator) -> list[int]:
    """Token ids, the first ones the most frequent: the fewer ids take most of the places, the smaller ``power`` is."""
    drawn = torch.rand(count, generator=g, dtype=torch.float64).clamp(min=1e-9).pow(-power) - 1
    return (_FIRST_ID + (drawn % (vocab - _FIRST_ID)).long()).tolist()


def make_batch(profile: str, *, pairs: int, length: int, vocab: int, seed: int) -> Batch:
    """P pairs of at most ``length`` tokens each. At least one is as long, so that padding is what it would be in training."""
    p, g = PROFILES[profile], torch.Generator().manual_seed(seed)
    prompt_lengths = _lengths(pairs, p.prompt * length, max(2, math.ceil(0.8 * length)), p.sigma, g)
    prompts = [_ids(vocab, n, 3.0, g) for n in prompt_lengths] * 2
    room = [length - len(prompt) for prompt in prompts]
    answers = [min(r, n) for r, n in zip(room, _lengths(2 * pairs, p.response * length, length, p.sigma, g), strict=True)]
    answers[0] = room[0]
    # chosen answers are of frequent tokens, so that preferring them can be learnt
    completions = [_ids(vocab, n, 2.0 if i < pairs else 6.0, g) for i, n in enumerate(answers)]
    return Batch(tuple(prompts), tuple(completions))


def paired_examples(batch: Batch) -> list[dict[str, list[int]]]:
    """For the collator of TRL's DPOTrainer."""
    half = len(batch) // 2
    return [
        {"prompt_ids": batch.prompts[i], "chosen_ids": batch.completions[i], "rejected_ids": batch.completions[half + i]}
        for i in range(half)
    ]


def unpaired_examples(batch: Batch) -> list[dict[str, object]]:
    """For the collator of TRL's KTOTrainer: chosen ones are desirable."""
    kl = batch.rotated()
    return [
        {"prompt_ids": p, "completion_ids": c, "KL_completion_ids": k, "label": i < len(batch) // 2}
        for i, (p, c, k) in enumerate(zip(batch.prompts, batch.completions, kl.completions, strict=True))
    ]


def concatenated_examples(batch: Batch) -> list[dict[str, list[int]]]:
    """For the collator of TRL's CPOTrainer and ORPOTrainer."""
    half, found = len(batch) // 2, []
    for i in range(half):
        features: dict[str, list[int]] = {"prompt_input_ids": batch.prompts[i]}
        features["prompt_attention_mask"] = [1] * len(batch.prompts[i])
        for name, at in (("chosen", i), ("rejected", half + i)):
            prompt, completion = batch.prompts[at], batch.completions[at]
            features[f"{name}_input_ids"] = prompt + completion
            features[f"{name}_attention_mask"] = [1] * len(prompt + completion)
            features[f"{name}_labels"] = [IGNORE] * len(prompt) + completion
        found.append(features)
    return found


def rollout_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What TRL's GRPOTrainer makes of rollouts: prompts padded on the left, completions on the right."""
    width = {"prompt": max(map(len, batch.prompts)), "completion": max(map(len, batch.completions))}
    found = {}
    rows: tuple[tuple[str, tuple[list[int], ...], Callable[[list[int], list[int]], list[int]]], ...] = (
        ("prompt", batch.prompts, lambda padding, ids: padding + ids),
        ("completion", batch.completions, lambda padding, ids: ids + padding),
    )
    for name, sequences, join in rows:
        padding = [[0] * (width[name] - len(ids)) for ids in sequences]
        found[f"{name}_ids"] = [join(p, ids) for p, ids in zip(padding, sequences, strict=True)]
        found[f"{name}_mask"] = [join(p, [1] * len(ids)) for p, ids in zip(padding, sequences, strict=True)]
    return {name: torch.tensor(values, device=device) for name, values in found.items()}
