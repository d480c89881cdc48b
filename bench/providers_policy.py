"""Providers of the suites ``policy``, ``policy-gpu`` and ``gae``: one update of policy training from hidden states.

A step is log-probs of the response tokens, the loss, and the gradients of hidden states and head. Who can take packed tokens
gets them; the others get sequences padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import logitless as ll

from . import policy_losses as losses
from .cases import Case, Inputs
from .policy_losses import POLICY_LOSSES, uses_entropy
from .registry import PROVIDERS, Result, Work, finish, not_installed, of_plan, provider

_TASKS = frozenset(POLICY_LOSSES)
#: Tokens of a chunk of verl's ``FusedLinearForPPO``.
_VERL_CHUNK = 512
#: Vocabulary tile of TRL's ``add_fused_lm_head``.
_TRL_CHUNK = 32768

#: hidden (N, H), weight (V, H), labels (N,) -> log-probs and, where the task asks, entropies, (N,) each.
TokenValues = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor | None]"]

provider("gemm:policy", tasks=_TASKS, roofline=True)(PROVIDERS["gemm"].build)


def _packed(inputs: Inputs) -> Inputs:
    assert inputs.rollouts is not None and inputs.rollouts.packed is not None
    return inputs.rollouts.packed


def _on_packed(case: Case, inputs: Inputs, fn: TokenValues) -> Work:
    """Response tokens cut out of the packed batch, their values, and the loss behind them."""
    packed = _packed(inputs)
    return _work(case, packed, packed.scored, fn)


def _work(case: Case, inputs: Inputs, chosen: Tensor, fn: TokenValues) -> Work:
    """The values at ``chosen`` positions, like labels, which hold all that are scored."""
    loss_fn = POLICY_LOSSES[case.task]
    labels = inputs.labels[chosen].clamp(min=0)

    def spread(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.new_zeros(chosen.shape).masked_scatter(chosen, values)

    def step() -> Result:
        logps, entropies = map(spread, fn(inputs.hidden[chosen], inputs.weight, labels))
        return finish(loss_fn(logps, inputs, entropies), inputs, token_logps=logps)

    return Work(step)


def _plain_values(case: Case) -> TokenValues:
    head, entropic = case.shape.head, uses_entropy(case.task)

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(hidden, weight).float()
        if head.softcap is not None:
            logits = head.apply(logits)
        log_p = torch.log_softmax(logits, dim=-1)
        entropies = -(log_p.exp() * log_p).sum(-1) if entropic else None
        return log_p.gather(-1, labels[:, None])[:, 0], entropies

    return fn


@provider("torch:policy", tasks=_TASKS)
def plain(case: Case, inputs: Inputs) -> Work:
    """Plain PyTorch on response tokens: logits in the model's dtype, log-softmax in float32."""
    return _on_packed(case, inputs, _plain_values(case))


@provider("torch:padded", tasks=_TASKS)
def padded(case: Case, inputs: Inputs) -> Work:
    """The same on sequences x the longest response, as trainers do that keep the last ``logits_to_keep`` positions."""
    chosen = torch.zeros_like(inputs.scored)
    chosen[:, case.shape.prompt :] = True
    return _work(case, inputs, chosen, _plain_values(case))


@provider("verl-style:policy", tasks=_TASKS)
def verl_style(case: Case, inputs: Inputs) -> Work:
    """Chunks of response tokens whose logits are made again in the backward pass, as verl's ``FusedLinearForPPO`` does.

    verl computes the entropy in any case; here it is left out where the loss does not use it.
    """
    chunk_fn, entropic = _plain_values(case), uses_entropy(case.task)

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        chunks = zip(hidden.split(_VERL_CHUNK), labels.split(_VERL_CHUNK), strict=True)
        parts = [checkpoint(chunk_fn, x, weight, y, use_reentrant=False) for x, y in chunks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropic else None

    return _on_packed(case, inputs, fn)


def _no_trl(case: Case, device: torch.device) -> list[str]:
    return not_installed("trl") + not_installed("transformers")


def _trl_values(case: Case, outputs: tuple[str, ...]) -> TokenValues:
    from trl.kernels import ChunkedLogProbFunction  # type: ignore[attr-defined,unused-ignore]

    head = (1.0, _TRL_CHUNK, case.shape.head.softcap, 1.0)  # temperature, tile, soft-cap, scale

    def fn(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logps, entropies, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, *head, outputs)
        return logps, entropies

    return fn


@provider("trl:policy", tasks=_TASKS, why_not=_no_trl)
def trl(case: Case, inputs: Inputs) -> Work:
    """TRL's log-prob function as its ``GRPOTrainer`` calls it: with the entropy, which it logs; on a CPU on every position of
    the padded batch, elsewhere on the scored ones; and the trainer's loss behind it.
    """
    compact = inputs.hidden.device.type in ("cuda", "xpu")
    return _work(case, inputs, inputs.scored if compact else torch.ones_like(inputs.scored), _trl_values(case, ("entropy",)))


@provider("trl:policy-scored", tasks=_TASKS, why_not=_no_trl)
def trl_scored(case: Case, inputs: Inputs) -> Work:
    """TRL's function at its best: response tokens alone, and the entropy only where the loss uses it."""
    return _on_packed(case, inputs, _trl_values(case, ("entropy",) if uses_entropy(case.task) else ()))


def _no_liger(case: Case, device: torch.device) -> list[str]:
    softcap = case.shape.softcap
    return not_installed("liger_kernel") + ([f"has no soft-cap, and the shape asks for {softcap:g}"] if softcap else [])


@provider("liger:policy", tasks={"dapo"}, why_not=_no_liger)
def liger(case: Case, inputs: Inputs) -> Work:
    """Liger's fused GRPO loss: padded sequences, one advantage each; it has no entropy and no packed form.

    Without ``torch.compile``, which recompiles on every call (its closure is new each time).
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=losses.EPSILON_LOW,
        epsilon_high=losses.EPSILON_HIGH,
        loss_type="dapo",
    )
    rollouts = inputs.rollouts
    assert rollouts is not None
    responses = (slice(None), slice(case.shape.prompt, None))
    labels, mask = inputs.labels[responses].clamp(min=0), inputs.scored[responses].float()
    old_logps = rollouts.old_logps[responses]

    def step() -> Result:
        loss, _ = module(
            inputs.hidden[responses],
            inputs.weight,
            labels,
            mask,
            rollouts.sequence_advantages,
            old_per_token_logps=old_logps,
        )
        return finish(loss, inputs)

    def token_logps() -> Tensor:
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

        with torch.no_grad():
            values = LigerFusedLinearPPOBase.chunk_forward(inputs.hidden[responses], inputs.weight, labels)
        return torch.cat([values.new_zeros(len(values), case.shape.prompt), values], dim=1)

    return Work(step, token_logps)


def _modules(case: Case) -> Any:
    if case.task == "ppo":
        return ll.FusedLinearPPOLoss(losses.PPO_CLIP)
    return ll.FusedLinearGRPOLoss(
        "dapo",
        epsilon_low=losses.EPSILON_LOW,
        epsilon_high=losses.EPSILON_HIGH,
        entropy_coef=losses.ENTROPY_COEF if uses_entropy(case.task) else 0.0,
    )


def _module(case: Case, inputs: Inputs, **settings: Any) -> Work:
    """The loss module on the packed batch, prompts and all: their labels say that they are not scored."""
    module, packed = _modules(case), _packed(inputs)
    rollouts = packed.rollouts
    assert rollouts is not None
    by_token = case.task == "ppo"
    arguments = {
        "head": case.shape.head,
        "advantages": rollouts.advantages if by_token else rollouts.sequence_advantages,
        "old_logps": rollouts.old_logps,
        "cu_seqlens": rollouts.cu_seqlens,
    }

    def step() -> Result:
        with ll.settings(**settings):
            out = module(packed.hidden, packed.weight, packed.labels, **arguments)
            return finish(out.loss, packed, token_logps=out.logps, **of_plan(out.plan))

    return Work(step)


def _op(case: Case, inputs: Inputs, **settings: Any) -> Work:
    """``linear_logps`` and the loss in plain torch behind it."""
    loss_fn, packed = POLICY_LOSSES[case.task], _packed(inputs)
    outputs = ("logps", "entropy") if uses_entropy(case.task) else ("logps",)

    def step() -> Result:
        with ll.settings(**settings):
            stats = ll.linear_logps(packed.hidden, packed.weight, packed.labels, head=case.shape.head, outputs=outputs)
            return finish(loss_fn(stats.logps, packed, stats.entropy), packed, token_logps=stats.logps)

    return Work(step)


def _register(suffix: str, **settings: Any) -> None:
    """The module and the op under some settings, on the backend that these name."""

    def why_not(case: Case, device: torch.device) -> list[str]:
        from logitless.kernels.backends.interface import Call
        from logitless.kernels.backends.registry import get_backend

        if "backend" not in settings:
            return []
        backend, dtype = get_backend(settings["backend"]), case.shape.torch_dtype
        if backend.name == "triton" and device.type == "cpu":
            return ["Triton's interpreter is no kernel to time"]
        return [*backend.why_unavailable(), *backend.why_not(Call(device, dtype, dtype))]

    options: dict[str, Any] = {"tasks": _TASKS, "why_not": why_not, "quick": not settings}
    provider("logitless:policy" + suffix, **options)(lambda case, inputs: _module(case, inputs, **settings))
    provider("logitless:policy-op" + suffix, **options)(lambda case, inputs: _op(case, inputs, **settings))


_register("")
for _backend in ll.available_backends():
    _register(f"@{_backend}", backend=_backend)


@provider("copy:gae", tasks={"gae"}, roofline=True)
def copy(case: Case, inputs: Inputs) -> Work:
    """A copy of rewards and values: the reads and writes that no scan can do without."""
    rollouts = _packed(inputs).rollouts
    assert rollouts is not None
    pairs = [(t, torch.empty_like(t)) for t in (rollouts.rewards, rollouts.values)]

    def step() -> Result:
        for source, destination in pairs:
            destination.copy_(source)
        return Result()

    return Work(step)


def _packed_gae(inputs: Inputs, fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    """``fn`` of rewards (P,), values (P,) and cu_seqlens (S + 1,)."""
    rollouts = _packed(inputs).rollouts
    assert rollouts is not None
    return Work(lambda: Result(token_logps=fn(rollouts.rewards, rollouts.values, rollouts.cu_seqlens)))


def _no_launch_a_token(case: Case, device: torch.device) -> list[str]:
    return [] if device.type == "cpu" else [f"would take minutes a step: several launches for each token, on {device.type}"]


@provider("loop:gae", tasks={"gae"}, why_not=_no_launch_a_token)
def gae_by_token(case: Case, inputs: Inputs) -> Work:
    """A loop over tokens, on the tensors."""

    def fn(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        return losses.loop_over_tokens(rewards, values, cu_seqlens.tolist(), torch.empty_like(rewards))

    return _packed_gae(inputs, fn)


@provider("floats:gae", tasks={"gae"})
def gae_by_float(case: Case, inputs: Inputs) -> Work:
    """The same loop on Python's floats, converted on the way in and out."""

    def fn(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        found = losses.loop_over_tokens(rewards.tolist(), values.tolist(), cu_seqlens.tolist(), [0.0] * len(rewards))
        return torch.tensor(found, dtype=rewards.dtype, device=rewards.device)

    return _packed_gae(inputs, fn)


@provider("padded:gae", tasks={"gae"})
def gae_by_step(case: Case, inputs: Inputs) -> Work:
    """A loop over the steps of the longest sequence, all sequences side by side, as PPO trainers have it."""
    rollouts = inputs.rollouts
    assert rollouts is not None

    def step() -> Result:
        rewards, values = rollouts.rewards, rollouts.values  # 0 in the padding
        advantage = following = torch.zeros_like(values[:, 0])
        found = []
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + losses.GAMMA * following - values[:, t]
            advantage = delta + losses.GAMMA * losses.LAMBDA * advantage
            following = values[:, t]
            found.append(advantage)
        return Result(token_logps=torch.stack(found[::-1], dim=1))

    return Work(step)


@provider("logitless:gae", tasks={"gae"})
def gae(case: Case, inputs: Inputs) -> Work:
    """``gae`` on the packed tokens."""

    def fn(rewards: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
        return ll.gae(rewards, values, cu_seqlens=cu_seqlens, gamma=losses.GAMMA, lam=losses.LAMBDA).advantages

    return _packed_gae(inputs, fn)
