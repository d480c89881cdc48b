"""Batches of token ids with the lengths of a profile, their tensors, and the inputs of TRL's collators."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import logitless as ll

from ..core.cases import IGNORE
from ..losses import LossInputs
from ..losses.inputs import UNUSED

#: Smaller token ids are special.
_FIRST_ID = 3


class Profile(NamedTuple):
    """Lengths of prompts and responses, as shares of the longest sequence; log-normal where ``sigma`` is more than 0.

    The medians and spreads are this benchmark's own choice of typical data; the JSON of a run has the actual lengths.
    """

    about: str
    prompt: float
    response: float
    sigma: float


PROFILES: dict[str, Profile] = {
    "fixed": Profile("sequences of equal length, a quarter of it prompt: no padding", 0.25, 0.75, 0.0),
    "chat": Profile("short prompts, answers of very different lengths", 0.10, 0.25, 0.7),
    "summary": Profile("long prompts, short answers", 0.60, 0.10, 0.4),
    "balanced": Profile("prompt and answer of about equal length: a shared prefix saves most", 0.45, 0.45, 0.1),
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
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [len(s) for s in self.sequences]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return sum(self.lengths)

    @property
    def scored(self) -> int:
        """Tokens of the completions."""
        return sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def rotated(self) -> Batch:
        """Completions shifted by one sequence: the mismatched pairs of KTO's KL term, as TRL's trainer makes them."""
        return Batch(self.prompts, (self.completions[-1], *self.completions[:-1]))

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """ids, attention mask and unshifted labels: (S, T) each, padded on the right."""
        ids, mask, labels = (torch.full((len(self), self.longest), fill) for fill in (0, 0, IGNORE))
        for i, (sequence, start) in enumerate(zip(self.sequences, self.prompt_lengths, strict=True)):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
            labels[i, start : len(sequence)] = ids[i, start : len(sequence)]
        return ids.to(device), mask.to(device), labels.to(device)


def _lengths(count: int, median: float, longest: int, sigma: float, g: torch.Generator) -> list[int]:
    drawn = median * (sigma * torch.randn(count, generator=g)).exp() if sigma else torch.full((count,), median)
    return [min(longest, max(2, round(n))) for n in drawn.tolist()]


def _ids(vocab: int, count: int, power: float, g: torch.Generator) -> list[int]:
    """Token ids, of which the first are the most frequent; the more so, the smaller ``power`` is."""
    drawn = torch.rand(count, generator=g, dtype=torch.float64).clamp(min=1e-9).pow(-power) - 1
    return (_FIRST_ID + (drawn % (vocab - _FIRST_ID)).long()).tolist()


def make_batch(profile: str, *, pairs: int, length: int, vocab: int, seed: int) -> Batch:
    """P pairs of at most ``length`` tokens each. One is exactly as long, so that there is as much padding as in training."""
    p, g = PROFILES[profile], torch.Generator().manual_seed(seed)
    prompt_lengths = _lengths(pairs, p.prompt * length, max(2, math.ceil(0.8 * length)), p.sigma, g)
    prompts = [_ids(vocab, n, 3.0, g) for n in prompt_lengths] * 2
    room = [length - len(prompt) for prompt in prompts]
    answers = [min(r, n) for r, n in zip(room, _lengths(2 * pairs, p.response * length, length, p.sigma, g), strict=True)]
    answers[0] = room[0]
    # chosen answers have frequent tokens, so that a model can learn to prefer them
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
    parts = zip(batch.prompts, batch.completions, kl.completions, strict=True)
    names = ("prompt_ids", "completion_ids", "KL_completion_ids")
    return [{**dict(zip(names, ids, strict=True)), "label": i < len(batch) // 2} for i, ids in enumerate(parts)]


def concatenated_examples(batch: Batch) -> list[dict[str, list[int]]]:
    """For the collator of TRL's CPOTrainer and ORPOTrainer."""
    half, found = len(batch) // 2, []
    for i, prompt in enumerate(batch.prompts[:half]):
        features = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name, completion in (("chosen", batch.completions[i]), ("rejected", batch.completions[half + i])):
            features[f"{name}_input_ids"] = prompt + completion
            features[f"{name}_attention_mask"] = [1] * len(prompt + completion)
            features[f"{name}_labels"] = [IGNORE] * len(prompt) + completion
        found.append(features)
    return found


def rollout_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Rollouts as TRL's GRPOTrainer holds them: prompts padded on the left, completions on the right."""
    found: dict[str, Tensor] = {}
    for name, sequences in (("prompt", batch.prompts), ("completion", batch.completions)):
        width = max(map(len, sequences))
        ids, mask = (torch.zeros(len(batch), width, dtype=torch.int64) for _ in range(2))
        for i, sequence in enumerate(sequences):
            place = slice(width - len(sequence), None) if name == "prompt" else slice(len(sequence))
            ids[i, place], mask[i, place] = torch.tensor(sequence), 1
        found |= {f"{name}_ids": ids.to(device), f"{name}_mask": mask.to(device)}
    return found


@dataclass
class Data:
    """A batch on the device, in the forms that the arms take.

    Attributes:
        packed: sequences in one row, prompts not scored. packed_kl: the mismatched pairs of KTO.
        every_label: (N,) shifted labels of all of ``packed``'s tokens.
        ids, mask, labels: (S, T), padded on the right; labels unshifted, -100 outside of the completions.
        desirable, advantages: (S,).
        old_logps: (S, T) float32, at the position that predicts.
        exact_ref: (S,) float64 sums of the reference, by an exact head. exact_kl: 0-dim.
        trl: arguments of TRL's ``compute_loss``.
    """

    batch: Batch
    packed: ll.PackedSequences
    packed_kl: ll.PackedSequences
    every_label: Tensor
    ids: Tensor
    mask: Tensor
    labels: Tensor
    desirable: Tensor
    advantages: Tensor
    old_logps: Tensor
    exact_ref: Tensor = UNUSED
    exact_kl: Tensor = UNUSED
    trl: dict[str, Any] = field(default_factory=dict)

    @property
    def scored(self) -> Tensor:
        """(S, T - 1): positions that predict a token of a completion."""
        return self.labels[:, 1:] != IGNORE

    @property
    def present(self) -> Tensor:
        """(S, T - 1): positions that predict a token that is not padding."""
        return self.mask[:, 1:] != 0

    @property
    def loss_inputs(self) -> LossInputs:
        """Of the losses in plain torch, for log-probs (S, T - 1)."""
        rollouts = {"old_logps": self.old_logps[:, :-1], "advantages": self.advantages[:, None]}
        return LossInputs(self.scored, self.exact_ref, self.desirable, self.exact_kl, **rollouts)
