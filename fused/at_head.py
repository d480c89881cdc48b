"""Runs a Hugging Face model on packed sequences, and a function of your own where the model would have called its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from logitless.kernels.spec import HeadSpec

from .model_logps import HeadCall, run_packed
from .packing import PackedSequences
from .policy.modules import FusedLinearPolicyLoss, PolicyOutput

Result = TypeVar("Result")


@dataclass(frozen=True)
class AtHead:
    """What there is where a model calls its head.

    Attributes:
        hidden: (N, H) hidden states, one row a packed token, differentiable.
        weight: (V, H) of the head.
        bias: (V,), or ``None``.
        head: what the model does to its logits, and the temperature.
        labels: (N,) shifted labels of the packed sequences.
        cu_seqlens: (S + 1,) where each of them starts and ends.
        ignore_index: the label of positions that are not scored.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: HeadSpec
    labels: Tensor
    cu_seqlens: Tensor
    ignore_index: int


@torch.compiler.disable
def at_head(
    model: nn.Module,
    packed: PackedSequences,
    fn: Callable[[AtHead], Result],
    *,
    head: HeadSpec | None = None,
    temperature: float | None = None,
    padding_free: bool | None = None,
    **model_kwargs: Any,
) -> Result:
    """Run a model on packed sequences, and ``fn`` in place of its head; returns what ``fn`` returns.

    ``fn`` runs within the model's forward pass, so autocast, gradient checkpointing, wrappers and adapters are in force: the
    place for losses, value heads and whatever else wants hidden states of packed tokens.

    Args:
        model, head, temperature, padding_free, model_kwargs: as for :func:`logitless.model_logps`.
        packed: see :func:`logitless.pack`.
        fn: takes :class:`AtHead`.

    Raises:
        TypeError, ValueError: as :func:`logitless.model_logps`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
        >>> at_head(model, pack([[5, 6, 7, 8], [9, 10]]), lambda at: at.hidden.shape)
        torch.Size([6, 16])
    """
    if not isinstance(packed, PackedSequences):
        raise TypeError(f"packed must be PackedSequences, see logitless.pack, got {type(packed).__name__}")
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {fn!r}")

    def call(at: HeadCall) -> Result:
        rows, device = at.hidden.reshape(-1, at.hidden.shape[-1]), at.weight.device
        rows = rows if len(at.where) == len(rows) else rows.index_select(0, at.where.to(rows.device))
        labels = at.labels.reshape(-1)[at.where.to(at.labels.device)]
        return fn(
            AtHead(rows.to(device), at.weight, at.bias, at.head, labels.to(device), packed.cu_seqlens, packed.ignore_index)
        )

    options: dict[str, Any] = {
        "head": head,
        "temperature": temperature,
        "padding_free": padding_free,
        "model_kwargs": model_kwargs,
    }
    result: Result = run_packed(model, packed, call, **options)
    return result


def model_loss(
    model: nn.Module,
    loss: FusedLinearPolicyLoss,
    packed: PackedSequences,
    *,
    head: HeadSpec | None = None,
    temperature: float | None = None,
    padding_free: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> PolicyOutput:
    """A policy loss of a model on packed sequences; see :func:`at_head`.

    Args:
        model, head, temperature, padding_free: as for :func:`logitless.model_logps`.
        loss: a policy-loss module.
        packed: see :func:`logitless.pack`.
        model_kwargs: further arguments of the model's forward.
        inputs: further arguments of the loss: ``advantages``, ``old_logps`` ..., aligned with ``packed.labels``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
        >>> packed = pack([[5, 6, 7, 8], [9, 10]], prompt_lengths=[2, 1])
        >>> model_loss(model, FusedLinearGRPOLoss(), packed, advantages=torch.tensor([1.0, -1.0])).logps.shape
        torch.Size([6])
    """
    if not isinstance(loss, FusedLinearPolicyLoss):
        raise TypeError(f"loss must be a policy-loss module such as FusedLinearGRPOLoss, got {type(loss).__name__}")

    if isinstance(packed, PackedSequences) and packed.ignore_index != loss.ignore_index:
        raise ValueError(f"loss has ignore_index={loss.ignore_index}, but packed has {packed.ignore_index}: give both the same")

    def fn(at: AtHead) -> PolicyOutput:
        out: PolicyOutput = loss(at.hidden, at.weight, at.labels, at.bias, at.head, cu_seqlens=at.cu_seqlens, **inputs)
        return out

    kwargs = dict(model_kwargs or {})
    return at_head(model, packed, fn, head=head, temperature=temperature, padding_free=padding_free, **kwargs)
