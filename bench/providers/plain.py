"""Providers from torch: bare GEMMs, plain PyTorch, torch.compile, chunks that are recomputed, and its chunked cross-entropy."""

from __future__ import annotations

import shutil
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.cases import IGNORE, Case
from ..core.inputs import Inputs
from ..core.registry import Result, Work, provider
from ..losses import uses_entropy
from .common import POLICY_TASKS, TOKEN_TASKS, TokenValues, all_of, finish, no_softcap, on_positions

#: Tokens of a chunk of verl's ``FusedLinearForPPO``.
_VERL_CHUNK = 512


@provider("gemm", tasks=TOKEN_TASKS, roofline=True)
@provider("gemm:policy", tasks=POLICY_TASKS, roofline=True)
def gemm(case: Case, inputs: Inputs) -> Work:
    """The GEMMs alone, on scored tokens, into existing buffers: a lower bound for everything that uses the same GEMMs."""
    x = inputs.hidden.detach()[inputs.scored]  # (N, H)
    w = inputs.weight.detach()
    tile = torch.empty((len(x), len(w)), dtype=x.dtype, device=x.device)
    dx, dw = torch.empty_like(x), torch.empty_like(w) if case.gemms == 3 else None

    def step() -> Result:
        torch.mm(x, w.t(), out=tile)
        if case.gemms >= 2:
            torch.mm(tile, w, out=dx)
        if dw is not None:
            torch.mm(tile.t(), x, out=dw)
        return Result()

    return Work(step)


def plain_values(case: Case) -> TokenValues:
    """Logits in the model's dtype, log-softmax in float32."""
    head, entropic = case.shape.head, uses_entropy(case.task)

    def values(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(hidden, weight).float()
        if head.softcap is not None:
            logits = head.apply(logits)
        log_p = torch.log_softmax(logits, dim=-1)
        entropies = -(log_p.exp() * log_p).sum(-1) if entropic else None
        return log_p.gather(-1, labels[:, None])[:, 0], entropies

    return values


@provider("torch", tasks=TOKEN_TASKS)
def plain(case: Case, inputs: Inputs) -> Work:
    """Plain PyTorch on every position, as in trainers without a fused head."""
    return on_positions(case, inputs, plain_values(case), None)


@provider("torch-scored", tasks=TOKEN_TASKS)
def plain_scored(case: Case, inputs: Inputs) -> Work:
    """Plain PyTorch on scored positions only."""
    return on_positions(case, inputs, plain_values(case), inputs.scored)


def _no_compiler(case: Case, device: torch.device) -> list[str]:
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return ["torch.compile needs a C++ compiler, and none is on PATH"]
    return []


@provider("torch-compile", tasks=TOKEN_TASKS, why_not=_no_compiler, warm_up=True)
def compiled(case: Case, inputs: Inputs) -> Work:
    """``torch.compile`` of the plain log-probs, on scored positions."""
    torch._dynamo.reset()  # after 8 shapes of one function torch would run it uncompiled
    return on_positions(case, inputs, torch.compile(plain_values(case), dynamic=False), inputs.scored)


def _no_linear_cross_entropy(case: Case, device: torch.device) -> list[str]:
    has = hasattr(F, "linear_cross_entropy")
    return [] if has else [f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"]


@provider("torch-lce", tasks={"nll"}, why_not=all_of(_no_linear_cross_entropy, no_softcap))
def linear_cross_entropy(case: Case, inputs: Inputs) -> Work:
    """torch's chunked linear cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    labels = inputs.labels.reshape(-1)

    def step() -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns when it falls back to full logits, which is another provider
            loss = F.linear_cross_entropy(
                inputs.hidden.reshape(len(labels), -1), inputs.weight, labels, ignore_index=IGNORE, options=options
            )
        return finish(loss, inputs)

    return Work(step)


@provider("torch:policy", tasks=POLICY_TASKS)
def packed(case: Case, inputs: Inputs) -> Work:
    """Plain PyTorch on the response tokens of the packed batch."""
    return on_positions(case, inputs.packed, plain_values(case), inputs.packed.scored)


@provider("torch:padded", tasks=POLICY_TASKS)
def padded(case: Case, inputs: Inputs) -> Work:
    """The same on sequences x the longest response, as in trainers that keep the last ``logits_to_keep`` positions."""
    chosen = torch.zeros_like(inputs.scored)
    chosen[:, case.shape.prompt :] = True
    return on_positions(case, inputs, plain_values(case), chosen)


@provider("verl-style:policy", tasks=POLICY_TASKS)
def verl_style(case: Case, inputs: Inputs) -> Work:
    """Chunks of response tokens whose logits are recomputed in the backward pass, as in verl's ``FusedLinearForPPO``.

    verl always computes the entropy; here it is left out where the loss does not use it.
    """
    chunk_fn, entropic = plain_values(case), uses_entropy(case.task)

    def values(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        chunks = zip(hidden.split(_VERL_CHUNK), labels.split(_VERL_CHUNK), strict=True)
        parts = [checkpoint(chunk_fn, x, weight, y, use_reentrant=False) for x, y in chunks]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropic else None

    return on_positions(case, inputs.packed, values, inputs.packed.scored)
