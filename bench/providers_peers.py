"""Providers from other projects, each called as its own users call it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import losses
from .cases import IGNORE, Case, Inputs
from .losses import LOSSES, loss_of
from .registry import Result, Work, finish, not_installed, provider

_TOKEN_TASKS = frozenset({"logps", *LOSSES})


def _no_softcap(case: Case) -> list[str]:
    return [f"has no soft-cap, and the shape asks for {case.shape.softcap:g}"] if case.shape.softcap else []


def _no_linear_cross_entropy(case: Case, device: torch.device) -> list[str]:
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        return _no_softcap(case)
    return [f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"]


@provider("torch-lce", tasks={"nll"}, why_not=_no_linear_cross_entropy)
def linear_cross_entropy(case: Case, inputs: Inputs) -> Work:
    """torch's chunked linear cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    labels = inputs.labels.reshape(-1)

    def step() -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it warns when it falls back to full logits, which would be another row
            loss = torch.nn.functional.linear_cross_entropy(
                inputs.hidden.reshape(len(labels), -1), inputs.weight, labels, ignore_index=IGNORE, options=options
            )
        return finish(loss, inputs)

    return Work(step)


def _no_trl(case: Case, device: torch.device) -> list[str]:
    return not_installed("trl") or not_installed("transformers")


#: Vocabulary tile of TRL's ``add_fused_lm_head``.
_TRL_CHUNK = 32768


@provider("trl", tasks=_TOKEN_TASKS, why_not=_no_trl)
def trl(case: Case, inputs: Inputs) -> Work:
    """TRL's log-prob function as its trainers call it: on a CPU every position, elsewhere the scored ones."""
    from trl.kernels import ChunkedLogProbFunction  # type: ignore[attr-defined,unused-ignore]

    loss_fn = loss_of(case.task)
    compact = inputs.hidden.device.type in ("cuda", "xpu")

    def step() -> Result:
        mask = inputs.scored
        if compact:
            hidden, labels = inputs.hidden[mask], inputs.labels[mask]
        else:
            hidden, labels = inputs.hidden.reshape(-1, inputs.hidden.shape[-1]), inputs.labels.clamp(min=0).reshape(-1)
        head = (1.0, _TRL_CHUNK, case.shape.head.softcap, 1.0)  # temperature, tile, soft-cap, scale
        values = ChunkedLogProbFunction.apply(hidden, inputs.weight, None, labels, *head, ())[0]
        if compact:
            logps = values.new_zeros(mask.shape).masked_scatter(mask, values)
        else:
            logps = torch.where(mask, values.view(mask.shape), 0)
        return finish(loss_fn(logps, inputs), inputs, token_logps=logps)

    return Work(step)


def _liger_modules() -> dict[str, Callable[..., Any]]:
    from liger_kernel.chunked_loss import (
        LigerFusedLinearCPOLoss,
        LigerFusedLinearDPOLoss,
        LigerFusedLinearKTOLoss,
        LigerFusedLinearORPOLoss,
        LigerFusedLinearSimPOLoss,
    )

    return {
        "dpo": lambda **k: LigerFusedLinearDPOLoss(beta=losses.DPO_BETA, use_ref_model=False, **k),
        "simpo": lambda **k: LigerFusedLinearSimPOLoss(
            beta=losses.SIMPO_BETA, gamma=losses.SIMPO_GAMMA, compute_nll_loss=False, **k
        ),
        "cpo": lambda **k: LigerFusedLinearCPOLoss(beta=losses.CPO_BETA, alpha=losses.CPO_ALPHA, **k),
        "orpo": lambda **k: LigerFusedLinearORPOLoss(beta=losses.ORPO_BETA, **k),
        "kto": lambda **k: LigerFusedLinearKTOLoss(beta=losses.KTO_BETA, use_ref_model=False, **k),
    }


def _no_liger(case: Case, device: torch.device) -> list[str]:
    return not_installed("liger_kernel") + _no_softcap(case)


@provider("liger", tasks={"dpo", "simpo", "cpo", "orpo", "kto"}, why_not=_no_liger)
def liger(case: Case, inputs: Inputs) -> Work:
    """Liger's fused losses without ``torch.compile``, which recompiles on every call (its closure is new each time).

    Liger takes no reference log-probabilities: see :class:`~.cases.Inputs` on how its loss comes out the same.
    """
    module = _liger_modules()[case.task](compiled=False)
    # The loss adds up over sequences of one token, many at a time: only for token_logps.
    by_token = _liger_modules()[case.task](compiled=False, chunk_size=64)
    if case.task == "kto":
        offset = inputs.ref_logps[0] + inputs.kl.clamp(min=0)

        def kto_step() -> Result:
            out = module(inputs.hidden, inputs.weight, inputs.labels, preference_labels=inputs.desirable, kl=offset)
            return finish(out[0], inputs)

        return Work(kto_step)

    def sequences(out: Any) -> Tensor:
        return torch.cat([out[1][0], out[1][1]])

    def step() -> Result:
        out = module(inputs.weight, inputs.hidden, inputs.labels)
        return finish(out[0], inputs, sequence_logps=sequences(out))

    def token_logps() -> Tensor:
        labels = inputs.labels.reshape(-1, 1)
        with torch.no_grad():
            out = by_token(inputs.weight.detach(), inputs.hidden.detach().reshape(len(labels), 1, -1), labels)
        return sequences(out).reshape(inputs.labels.shape)

    return Work(step, token_logps)


def _needs_gpu(package: str) -> Callable[[Case, torch.device], list[str]]:
    def why_not(case: Case, device: torch.device) -> list[str]:
        reasons = [] if device.type == "cuda" else ["needs a CUDA device"]
        if case.shape.dtype == "fp32":
            reasons.append("takes bf16 and fp16 only")
        return reasons + not_installed(package)

    return why_not


@provider("cce", tasks=_TOKEN_TASKS, why_not=_needs_gpu("cut_cross_entropy"))
def cut_cross_entropy(case: Case, inputs: Inputs) -> Work:
    """Cut Cross-Entropy, whose per-token form takes any loss behind it."""
    from cut_cross_entropy import linear_cross_entropy as function

    loss_fn = loss_of(case.task)

    def step() -> Result:
        options = {"softcap": case.shape.head.softcap, "reduction": "none", "ignore_index": IGNORE}
        logps = -function(inputs.hidden, inputs.weight, inputs.labels, **options).float()
        return finish(loss_fn(logps, inputs), inputs, token_logps=logps)

    return Work(step)


@provider("quack", tasks={"nll"}, why_not=lambda case, device: _needs_gpu("quack")(case, device) + _no_softcap(case))
def quack(case: Case, inputs: Inputs) -> Work:
    """QuACK's chunked linear cross-entropy, a mean over tokens."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    mask = inputs.scored

    def step() -> Result:
        loss = chunked_linear_cross_entropy(inputs.hidden[mask], inputs.weight, inputs.labels[mask], reduction="mean")
        return finish(loss, inputs)

    return Work(step)
