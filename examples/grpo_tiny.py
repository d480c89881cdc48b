"""GRPO on a tiny language model, from random weights to a programmatic reward, in under two minutes on a CPU.

    python examples/grpo_tiny.py [--seed 0] [--steps 80] [--loss-type dapo]

The prompt is a digit, and the response should repeat it: the reward is the share of the ``LENGTH`` response tokens that equal
the digit. It rises from about 0.07, which is chance, to above 0.9. The loop has all parts of a large run: sampled groups of
responses of different lengths, log-probabilities of the sampling policy and of a reference, group-relative advantages, and
several epochs of updates on packed sequences.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import logitless as ll
from logitless.fused.policy.losses.grpo import GRPO_LOSSES

DIGITS, EOS, PAD, BOS = 10, 10, 11, 12
LENGTH = 8


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def make_prompts(count: int) -> Tensor:
    """Random prompts ``[BOS, digit]``. (count, 2)."""
    return torch.stack((torch.full((count,), BOS), torch.randint(DIGITS, (count,))), dim=1)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor) -> list[Tensor]:
    """Sample a response to each prompt. Returns prompt and response, up to and including the end-of-sequence token."""
    model.eval()
    rows = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=LENGTH, do_sample=True, top_k=0, use_cache=True
    )
    model.train()
    ended = (rows[:, 2:] == EOS).cumsum(dim=1)
    lengths = 2 + ((ended - (rows[:, 2:] == EOS).long()) == 0).sum(dim=1)  # tokens after the first EOS are padding
    return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]


def reward(sequence: Tensor) -> float:
    """The number of response tokens that repeat the prompt's digit, divided by ``LENGTH``."""
    return float((sequence[2:] == sequence[1]).sum()) / LENGTH


def train(
    seed: int = 0,
    steps: int = 80,
    loss_type: str = "dapo",
    *,
    prompts_per_step: int = 16,
    group_size: int = 8,
    epochs: int = 2,
    micro_batches: int = 2,
    beta: float = 0.001,
    verbose: bool = True,
) -> list[float]:
    """Train the policy. Returns the mean reward of the samples of each step."""
    model = make_model(seed)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    length = {"max_completion_length": LENGTH} if loss_type == "dr_grpo" else {}
    bound = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    options = {**level, **length, **bound}
    loss = ll.FusedLinearGRPOLoss(loss_type=loss_type, beta=beta, entropy_coef=0.01, metrics=True, **options)
    history = []
    for step in range(steps):
        prompts = make_prompts(prompts_per_step).repeat_interleave(group_size, dim=0)
        sequences = sample(model, prompts)
        rewards = torch.tensor([reward(s) for s in sequences])
        advantages = ll.group_advantages(rewards, group_size=group_size)
        history.append(float(rewards.mean()))

        batches = []
        for part in torch.randperm(len(sequences)).chunk(micro_batches):
            packed = ll.pack([sequences[i] for i in part], prompt_lengths=[2] * len(part))
            with torch.no_grad():
                old = ll.model_logps(model, packed).logps
                ref = ll.model_logps(reference, packed).logps
            batches.append((packed, {"advantages": advantages[part], "old_logps": old, "ref_logps": ref}))
        items = sum(loss.count_items(packed.labels, packed.cu_seqlens) for packed, _ in batches)
        for _ in range(epochs):
            for packed, inputs in batches:
                out = ll.model_loss(model, loss, packed, num_items_in_batch=items, **inputs)
                out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if verbose and step % 10 == 0:
            shown = ("kl", "entropy", "approx_kl")
            print(f"step {step:3d}  reward {history[-1]:.3f}", *(f"{name} {out.metrics[name].item():.3f}" for name in shown))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--loss-type", default="dapo", choices=GRPO_LOSSES)
    args = parser.parse_args()
    history = train(args.seed, args.steps, args.loss_type)
    last = history[-5:]
    print(f"reward: {history[0]:.3f} at the start, {math.fsum(last) / len(last):.3f} over the last {len(last)} steps")


if __name__ == "__main__":
    main()
