"""Runs a Hugging Face model on packed sequences, and a function or loss of the caller's in place of its head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from logitless.kernels.core.head_spec import HeadSpec
from logitless.kernels.core.head_weight import Weight

from ..policy.base import FusedLinearPolicyLoss, PolicyOutput
from ..preference.base import FusedLinearPreferenceLoss, KTOOutput, PreferenceOutput
from ..preference.modules import FusedLinearKTOLoss
from ..preference.objectives import FusedLinearMultiObjectiveLoss, MultiObjectiveOutput
from .causal_lm import causal_lm
from .packing import PackedSequences
from .runner import HeadCall, RunOptions, place_packed, run_packed

Result = TypeVar("Result")


@dataclass(frozen=True)
class AtHead:
    """The call of a model's head, on packed sequences; the argument of ``fn`` in :func:`at_head`.

    Attributes:
        hidden: (N, H) input of the head, one row per packed token, differentiable.
        weight: (V, H) of the head: a tensor; with LoRA on the head a :class:`logitless.LoRAWeight`; of a quantised head an
            object with ``shape``, ``dtype`` and ``device``, which :func:`logitless.linear_logps` and the loss modules take.
        bias: (V,) of the head, or ``None``.
        head: logit scale and soft-cap of the model, and the temperature.
        labels: (N,) shifted labels of the packed sequences.
        cu_seqlens: (S + 1,) where each sequence starts and ends.
        ignore_index: the label of positions that are not scored.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
        >>> def mean_nll(at: AtHead) -> torch.Tensor:
        ...     return -linear_logps(at.hidden, at.weight, at.labels, at.bias, at.head).logps.sum() / (at.labels >= 0).sum()
        >>> at_head(model, pack([[5, 6, 7, 8], [9, 10]]), mean_nll).shape
        torch.Size([])
    """

    hidden: Tensor
    weight: Weight
    bias: Tensor | None
    head: HeadSpec
    labels: Tensor
    cu_seqlens: Tensor
    ignore_index: int


@overload
def at_head(
    model: nn.Module,
    packed: PackedSequences,
    fn: Callable[[AtHead], Result],
    *,
    head: HeadSpec | None = None,
    temperature: float | None = None,
    padding_free: bool | None = None,
    aux_loss: Literal[False] = False,
    **model_kwargs: Any,
) -> Result: ...


@overload
def at_head(
    model: nn.Module,
    packed: PackedSequences,
    fn: Callable[[AtHead], Result],
    *,
    head: HeadSpec | None = None,
    temperature: float | None = None,
    padding_free: bool | None = None,
    aux_loss: Literal[True],
    **model_kwargs: Any,
) -> tuple[Result, Tensor | None]: ...


@torch.compiler.disable
def at_head(
    model: nn.Module,
    packed: PackedSequences,
    fn: Callable[[AtHead], Any],
    *,
    head: HeadSpec | None = None,
    temperature: float | None = None,
    padding_free: bool | None = None,
    aux_loss: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Run a model on packed sequences, with ``fn`` in place of its head; returns the result of ``fn``.

    ``fn`` runs inside the model's forward pass, so autocast, gradient checkpointing, wrappers and adapters apply. Use it for
    losses, value heads and other functions of the hidden states of packed tokens.

    Args:
        model, head, temperature, padding_free, model_kwargs: as for :func:`logitless.model_logps`.
        packed: see :func:`logitless.pack`.
        fn: a function of :class:`logitless.models.AtHead`.
        aux_loss: return ``(result, aux_loss)``, where ``aux_loss`` is the load-balancing loss of the model's routers: 0-dim,
            differentiable, as the model computes it with ``output_router_logits``; ``None`` where the model returns none.

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
    if aux_loss not in (True, False):
        raise TypeError(f"aux_loss must be True or False, got {aux_loss!r}")
    if model_kwargs.get("output_router_logits") and not aux_loss:
        raise ValueError("output_router_logits=True: pass aux_loss=True as well, or the loss of the routers is lost")

    def call(at: HeadCall) -> Any:
        rows, device = at.hidden.reshape(-1, at.hidden.shape[-1]), at.weight.device
        rows = rows if len(at.where) == len(rows) else rows.index_select(0, at.where.to(rows.device))
        labels = at.labels.reshape(-1)[at.where.to(at.labels.device)]
        return fn(
            AtHead(rows.to(device), at.weight, at.bias, at.head, labels.to(device), packed.cu_seqlens, packed.ignore_index)
        )

    options = RunOptions(head, temperature, padding_free, model_kwargs)
    result, output = run_packed(model, place_packed(packed), call, options)
    if not aux_loss:
        return result
    aux = getattr(output, "aux_loss", None)
    if not isinstance(aux, Tensor):
        return result, None
    return result, aux if len(packed.input_ids) else 0 * aux  # without tokens, the model ran on one that does not count


@overload
def model_loss(model: nn.Module, loss: FusedLinearPolicyLoss, packed: PackedSequences, **options: Any) -> PolicyOutput: ...


@overload
def model_loss(model: nn.Module, loss: FusedLinearKTOLoss, packed: PackedSequences, **options: Any) -> KTOOutput: ...


@overload
def model_loss(
    model: nn.Module, loss: FusedLinearMultiObjectiveLoss, packed: PackedSequences, **options: Any
) -> MultiObjectiveOutput: ...


@overload
def model_loss(
    model: nn.Module, loss: FusedLinearPreferenceLoss, packed: PackedSequences, **options: Any
) -> PreferenceOutput: ...


def model_loss(
    model: nn.Module,
    loss: FusedLinearPreferenceLoss | FusedLinearPolicyLoss,
    packed: PackedSequences,
    *,
    head: HeadSpec | None = None,
    temperature: float | None = None,
    padding_free: bool | None = None,
    aux_loss_coef: float | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> PreferenceOutput | KTOOutput | MultiObjectiveOutput | PolicyOutput:
    """A loss module applied to a model's packed sequences; see :func:`at_head`.

    **Mixture-of-experts models.** ``out.aux_loss`` is the load-balancing loss of the routers, if ``aux_loss_coef`` is given or
    the model's config or ``model_kwargs`` ask for ``output_router_logits``. It is the value that the model itself returns, with
    its gradient. Padding does not count where the model is right-padded and masks it in this loss, as transformers' models do.
    ``out.loss`` contains it only where ``aux_loss_coef`` is given: ``out.loss = loss + aux_loss_coef * out.aux_loss``, as in
    TRL's trainers. Over several micro-batches, divide the coefficient by their number.

    Args:
        model, head, temperature, padding_free: as for :func:`logitless.model_logps`.
        loss: any loss module of this library.
        packed: see :func:`logitless.pack`; for losses of pairs the chosen sequences first, then the rejected ones.
        aux_loss_coef: the factor of the routers' loss (TRL's ``router_aux_loss_coef``). ``None``: it is not added.
        model_kwargs: further arguments of the model's forward.
        inputs: further arguments of the loss: ``ref_logps``, ``desirable``, ``advantages``, ``old_logps`` ...; values per
            token are aligned with ``packed.labels``.

    Raises:
        TypeError, ValueError: as :func:`logitless.model_logps` and the loss; for ``aux_loss_coef`` of a model without routers.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2))
        >>> packed = pack([[5, 6, 7, 8], [5, 9]], prompt_lengths=[1, 1])
        >>> model_loss(model, FusedLinearGRPOLoss(), packed, advantages=torch.tensor([1.0, -1.0])).logps.shape
        torch.Size([6])
        >>> model_loss(model, FusedLinearDPOLoss(), packed, ref_logps=torch.tensor([-9.0, -5.0])).chosen_logps.shape
        torch.Size([1])
    """
    if not isinstance(loss, (FusedLinearPreferenceLoss, FusedLinearPolicyLoss)):
        raise TypeError(
            f"loss must be a loss module such as FusedLinearDPOLoss or FusedLinearGRPOLoss, got {type(loss).__name__}"
        )
    if inputs.get("sequence_group") is not None:
        raise ValueError(
            "sequence_group cannot be used with model_loss, which runs whole sequences on each rank: run the model on this "
            "rank's positions, and call the loss on the hidden states"
        )
    if isinstance(packed, PackedSequences) and packed.ignore_index != loss.ignore_index:
        raise ValueError(f"loss has ignore_index={loss.ignore_index}, but packed has {packed.ignore_index}: give both the same")

    def fn(at: AtHead) -> Any:
        arguments = {"bias": at.bias, "head": at.head, "cu_seqlens": at.cu_seqlens}
        return loss(at.hidden, at.weight, at.labels, **arguments, **inputs)

    kwargs = dict(model_kwargs or {})
    if aux_loss_coef is not None:
        _check_aux_loss(model, aux_loss_coef, kwargs)
        kwargs["output_router_logits"] = True
    out: PreferenceOutput | KTOOutput | MultiObjectiveOutput | PolicyOutput
    out, aux = at_head(
        model, packed, fn, head=head, temperature=temperature, padding_free=padding_free, aux_loss=True, **kwargs
    )
    if aux_loss_coef is None:
        return out if aux is None else replace(out, aux_loss=aux)
    if aux is None:
        raise ValueError(f"aux_loss_coef={aux_loss_coef!r}: {type(causal_lm(model)).__name__} returned no aux_loss")
    return replace(out, loss=out.loss + aux_loss_coef * aux.to(out.loss), aux_loss=aux)


def _check_aux_loss(model: nn.Module, coef: Any, kwargs: Mapping[str, Any]) -> None:
    if isinstance(coef, bool) or not isinstance(coef, (int, float)):
        raise TypeError(f"aux_loss_coef must be a number or None, got {coef!r}")
    if not math.isfinite(coef):
        raise ValueError(f"aux_loss_coef must be finite, got {coef!r}")
    if kwargs.get("output_router_logits") not in (None, True):
        raise ValueError(f"aux_loss_coef={coef!r} contradicts output_router_logits={kwargs['output_router_logits']!r}")
    lm = causal_lm(model)
    if not hasattr(lm.config.get_text_config(), "output_router_logits"):
        raise ValueError(f"aux_loss_coef={coef!r}: {type(lm).__name__} has no routers whose loss could be added")
