"""PPO with a value head on a tiny language model, from random weights to a programmatic reward, in under two minutes on a CPU.

    python examples/ppo_tiny.py [--seed 0] [--steps 80]

The task is that of grpo_tiny.py: repeat the prompt's digit. The reward rises from about 0.07 to above 0.8. A value function on
the policy's hidden states replaces the groups. The KL penalty is part of the token rewards, GAE computes advantages and
returns, and each epoch of updates trains policy and value function on minibatches of packed sequences.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from grpo_tiny import make_model, make_prompts, reward, sample
from torch import Tensor, nn

import logitless as ll


def train(
    seed: int = 0,
    steps: int = 80,
    *,
    prompts_per_step: int = 128,
    epochs: int = 2,
    minibatches: int = 2,
    kl_coef: float = 0.001,
    verbose: bool = True,
) -> list[float]:
    """Train policy and value function. Returns the mean reward of the samples of each step."""
    model = make_model(seed)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    value_head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    parameters = [*model.parameters(), *value_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    policy_loss = ll.FusedLinearPPOLoss(clip_low=0.2, clip_high=0.28, dual_clip=3.0, entropy_coef=0.005, metrics=True)

    def values_of(hidden: Tensor) -> Tensor:
        return value_head(hidden)[:, 0]

    def score(at: ll.models.AtHead) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of the sampling policy."""
        logps = ll.linear_logps(at.hidden, at.weight, at.labels, at.bias, at.head).logps
        assert logps is not None
        return logps, values_of(at.hidden)

    history = []
    for step in range(steps):
        sequences = sample(model, make_prompts(prompts_per_step))
        rewards = torch.tensor([reward(s) for s in sequences])
        history.append(float(rewards.mean()))

        batches = []
        for part in torch.randperm(len(sequences)).chunk(minibatches):
            packed = ll.pack([sequences[i] for i in part], prompt_lengths=[2] * len(part))
            where = {"cu_seqlens": packed.cu_seqlens, "mask": packed.mask}
            with torch.no_grad():
                old_logps, old_values = ll.at_head(model, packed, score)
                ref_logps = ll.model_logps(reference, packed).logps
            shaped = ll.rl.kl_shaped_rewards(rewards[part], old_logps, ref_logps, kl_coef=kl_coef, **where)
            advantages, returns = ll.gae(shaped, old_values, gamma=1.0, lam=0.95, **where)
            advantages = ll.rl.masked_whiten(advantages, where["mask"])
            batches.append((packed, where, old_logps, old_values, advantages, returns))
        for _ in range(epochs):
            for packed, where, old_logps, old_values, advantages, returns in batches:

                def losses(at: ll.models.AtHead, batch=(where, old_logps, old_values, advantages, returns)):
                    where, old_logps, old_values, advantages, returns = batch
                    policy = policy_loss(
                        at.hidden, at.weight, at.labels, at.bias, at.head,
                        cu_seqlens=where["cu_seqlens"], old_logps=old_logps, advantages=advantages,
                    )  # fmt: skip
                    value = ll.value_loss(values_of(at.hidden), returns, old_values=old_values, clip_range=0.2, **where)
                    return policy, value

                policy, value = ll.at_head(model, packed, losses)
                (policy.loss + 0.5 * value.loss).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
        if verbose and step % 10 == 0:
            shown = {**policy.metrics, "value loss": value.loss}
            names = ("clip_fraction", "approx_kl", "entropy", "value loss")
            print(f"step {step:3d}  reward {history[-1]:.3f}", *(f"{name} {shown[name].item():.3f}" for name in names))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    history = train(args.seed, args.steps)
    last = history[-5:]
    print(f"reward: {history[0]:.3f} at the start, {math.fsum(last) / len(last):.3f} over the last {len(last)} steps")


if __name__ == "__main__":
    main()
