"""``linear_logps``: per-token log-probabilities from hidden states and the head's weight, as registered torch operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as torch_once_differentiable
from torch.utils.flop_counter import register_flop_formula

from .backends.registry import Call, Work, choose_backend
from .core.checks import (
    check_head,
    check_ignore_index,
    check_label_range,
    check_labels,
    check_outputs,
    check_spec,
    compute_dtype,
)
from .core.dtypes import accumulate_dtype
from .core.head_spec import HeadSpec
from .core.settings import current_settings
from .core.stats import OPTIONAL_OUTPUTS, CoreOptions, RowStats, TokenStats
from .planner.plan import core_options
from .tile.head_gradient import HeadGradient
from .tile.rows import ScoredRows, scatter_rows

_library = torch.library.Library("logitless", "DEF")
_library.define(
    "logps_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor head, int ignore_index, int outputs, "
    "int unit_dhidden, str backend, str precision, int memory_budget, float grad_filter) "
    "-> (Tensor logps, Tensor entropy, Tensor mean_logits, "
    "Tensor is_top1, Tensor log_sum_sq_probs, Tensor k, Tensor sum_others, Tensor log_denom, Tensor target_offset, "
    "Tensor target_slope, Tensor unit)"
)
_library.define(
    "logps_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor head, int ignore_index, Tensor k, "
    "Tensor sum_others, Tensor log_denom, Tensor target_offset, Tensor target_slope, Tensor entropy, Tensor unit, "
    "Tensor? grad_logps, Tensor? grad_entropy, bool[] needs, str backend, str precision, int memory_budget, float grad_filter) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
#: Whether the forward operator returns d logps / d hidden, and of which rows. Dynamo wants sizes that do not depend on data.
_NO_UNIT, _SCORED_ROWS, _ALL_ROWS = range(3)
#: Statistics that the backward pass needs, in the order in which the operators hand them over.
_SAVED = ("k", "sum_others", "log_denom", "target_offset", "target_slope")
_PER_TOKEN = ("logps", *OPTIONAL_OUTPUTS, *_SAVED)


def _bits(outputs: Iterable[str]) -> int:
    names = set(outputs)
    return sum(1 << i for i, name in enumerate(OPTIONAL_OUTPUTS) if name in names)


def _names(bits: int) -> frozenset[str]:
    return frozenset(name for i, name in enumerate(OPTIONAL_OUTPUTS) if bits >> i & 1)


def _call(hidden: Tensor, weight: Tensor, num_tokens: int, work: Work, options: CoreOptions) -> Call:
    """What a backend is asked for. hidden (P, H), weight (V, H)."""
    return Call(
        hidden.device,
        hidden.dtype,
        weight.dtype,
        num_tokens=num_tokens,
        hidden_size=hidden.shape[1],
        vocab_size=len(weight),
        work=work,
        workspace=options.workspace,
        grad_filter=options.grad_filter,
    )


@torch.library.impl(_library, "logps_forward", "CompositeExplicitAutograd")
def _forward(
    hidden: Tensor,  # (P, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (P,) int64
    head: Tensor,  # HeadSpec.pack()
    ignore_index: int,
    outputs: int,
    unit_dhidden: int,  # _NO_UNIT, _SCORED_ROWS or _ALL_ROWS
    backend: str,
    precision: str,
    memory_budget: int,
    grad_filter: float,
) -> tuple[Tensor, ...]:
    spec = HeadSpec.unpack(head)
    check_label_range(labels, labels != ignore_index, len(weight), ignore_index)
    picked = ScoredRows.of(labels, ignore_index)
    rows, acc = picked.taken, accumulate_dtype(hidden.dtype)
    options = core_options(memory_budget, _names(outputs), precision, acc.itemsize, hidden.device, grad_filter)
    work: Work = "forward" if unit_dhidden == _NO_UNIT else "frozen"
    chosen = choose_backend(_call(hidden, weight, len(rows), work, options), backend)
    with torch.autocast(hidden.device.type, enabled=False):
        stats: RowStats = chosen.score(
            picked.hidden(hidden),
            weight,
            bias,
            picked.labels(labels, bias),
            spec,
            options,
            unit_dhidden=unit_dhidden != _NO_UNIT,
        )
    results = []
    for name in _PER_TOKEN:
        value = getattr(stats, name)
        dtype = torch.bool if name == "is_top1" else acc
        absent = name in OPTIONAL_OUTPUTS and name not in options.outputs
        full = torch.zeros(0 if absent else len(labels), dtype=dtype, device=hidden.device)
        if value is not None and picked.scored is not None and name not in _SAVED:
            value = value.masked_fill(~picked.scored, 0)
        results.append(full if value is None else full.index_copy_(0, rows, value))
    unit = stats.unit_dhidden
    if unit is None:
        unit = torch.empty((0, hidden.shape[1]), dtype=acc, device=hidden.device)
    elif unit_dhidden == _ALL_ROWS:
        unit = scatter_rows(hidden.shape, acc, rows, unit)
    return *results, unit


@torch.library.register_fake("logitless::logps_forward")
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: Tensor,
    ignore_index: int,
    outputs: int,
    unit_dhidden: int,
    backend: str,
    precision: str,
    memory_budget: int,
    grad_filter: float,
) -> tuple[Tensor, ...]:
    acc = accumulate_dtype(hidden.dtype)
    results = []
    for name in _PER_TOKEN:
        absent = name in OPTIONAL_OUTPUTS and name not in _names(outputs)
        results.append(hidden.new_empty(0 if absent else labels.shape[0], dtype=torch.bool if name == "is_top1" else acc))
    size: Any = 0 if unit_dhidden == _NO_UNIT else hidden.shape[0]
    if unit_dhidden == _SCORED_ROWS:
        size = torch.library.get_ctx().new_dynamic_size()
    return *results, hidden.new_empty((size, hidden.shape[1]), dtype=acc)


@torch.library.impl(_library, "logps_backward", "CompositeExplicitAutograd")
def _backward(
    hidden: Tensor,  # (P, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (P,)
    head: Tensor,
    ignore_index: int,
    k: Tensor,  # (P,), as are the next four
    sum_others: Tensor,
    log_denom: Tensor,
    target_offset: Tensor,
    target_slope: Tensor,
    entropy: Tensor,  # (P,) or (0,)
    unit: Tensor,  # d logps / d hidden of the scored rows (N, H) or of all (P, H), where the forward pass made it
    grad_logps: Tensor | None,  # (P,)
    grad_entropy: Tensor | None,  # (P,)
    needs: list[bool],  # of hidden, weight, bias
    backend: str,
    precision: str,
    memory_budget: int,
    grad_filter: float,
) -> tuple[Tensor, Tensor, Tensor]:
    spec = HeadSpec.unpack(head)
    picked = ScoredRows.of(labels, ignore_index)
    rows = picked.taken
    n, acc, deferred = len(rows), accumulate_dtype(hidden.dtype), needs[0] and not (needs[1] or needs[2])
    options = core_options(memory_budget, frozenset(), precision, acc.itemsize, hidden.device, grad_filter)
    call = _call(hidden, weight, n, "recompute", options)
    chosen = choose_backend(replace(call, train_hidden=needs[0], train_weight=needs[1]), backend)
    c = None if grad_logps is None else picked.values(grad_logps).to(acc)
    g = None if grad_entropy is None else picked.values(grad_entropy).to(acc)

    def empty() -> Tensor:
        return torch.empty(0, dtype=acc, device=hidden.device)

    with torch.autocast(hidden.device.type, enabled=False):
        recomputed = not deferred or g is not None
        dhidden = None
        if needs[0] and recomputed:
            dhidden = torch.empty((n, hidden.shape[1]), dtype=acc, device=hidden.device)
        head_gradient = None
        if needs[1] or needs[2]:
            # every block of dW is written once here, and the upstream gradient is in it: no float32 buffer is needed
            head_gradient = HeadGradient(weight, bias, need_weight=needs[1], need_bias=needs[2], accumulate=False)
        if recomputed:
            stats = RowStats(
                logps=empty(),
                k=k[rows],
                sum_others=sum_others[rows],
                log_denom=log_denom[rows],
                target_offset=target_offset[rows],
                target_slope=target_slope[rows] if spec.softcap is not None else None,
                entropy=entropy[rows] if g is not None else None,
            )
            chosen.recompute_gradients(
                picked.hidden(hidden),
                weight,
                bias,
                picked.labels(labels, bias),
                stats,
                None if deferred else c,
                g,
                spec,
                options,
                dhidden=dhidden,
                head_gradient=head_gradient,
            )
        dh, dw, db = empty(), empty(), empty()
        if needs[0]:
            if deferred:
                if picked.scored is not None and len(unit) != n:
                    raise RuntimeError(
                        "the forward pass of linear_logps ran outside of the CUDA graph that captures its backward"
                    )
                factor = torch.zeros_like(sum_others[rows]) if c is None else c
                unit = unit if len(unit) == n else unit[rows]
                dh = scatter_rows(hidden.shape, hidden.dtype, rows, unit, factor, dhidden)
            else:
                assert dhidden is not None
                dh = scatter_rows(hidden.shape, hidden.dtype, rows, dhidden)
        if head_gradient is not None:
            if head_gradient.weight is not None:
                dw = head_gradient.weight
            if head_gradient.bias is not None:
                assert bias is not None
                db = head_gradient.bias.to(bias.dtype)
    return dh, dw, db


@torch.library.register_fake("logitless::logps_backward")
def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Tensor, ignore_index: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[-5]

    def like(t: Tensor | None, needed: bool) -> Tensor:
        if needed and t is not None:
            return torch.empty_like(t, memory_format=torch.contiguous_format)
        return hidden.new_empty(0, dtype=accumulate_dtype(hidden.dtype))

    return like(hidden, needs[0]), like(weight, needs[1]), like(bias, needs[2])


@register_flop_formula(torch.ops.logitless.logps_forward, get_raw=True)
def _forward_flops(
    hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, head: Any, ignore_index: int, *rest: Any, **_: Any
) -> int:
    unit_dhidden = rest[1]
    scored = int((labels != ignore_index).sum())
    return 2 * scored * weight.numel() * (2 if unit_dhidden else 1)


@register_flop_formula(torch.ops.logitless.logps_backward, get_raw=True)
def _backward_flops(
    hidden: Tensor, weight: Tensor, bias: Any, labels: Tensor, head: Any, ignore_index: int, *rest: Any, **_: Any
) -> int:
    grad_entropy, needs = rest[-6], rest[-5]
    scored = int((labels != ignore_index).sum())
    if needs[0] and not (needs[1] or needs[2]) and grad_entropy is None:
        return 0  # deferred scale: the forward pass has done the work
    return 2 * scored * weight.numel() * (1 + int(needs[0]) + int(needs[1]))


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse ``create_graph=True``, whose graph would lack this node: torch's decorator of that name drops it silently
    when the incoming gradient does not require one.
    """
    first_order = torch_once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "logitless has first derivatives only: create_graph=True (a gradient penalty, a Hessian) is not supported; "
                "use reference_logps for that"
            )
        return first_order(ctx, *grads)

    return checked


class _Options(NamedTuple):
    """Everything of a call that is not a tensor."""

    ignore_index: int
    outputs: int
    unit_dhidden: int
    backend: str
    precision: str
    memory_budget: int
    grad_filter: float


class LinearLogps(torch.autograd.Function):
    """The autograd function over the two operators; ``options.unit_dhidden`` says that backward will not read the head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Tensor, options: _Options
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        results = torch.ops.logitless.logps_forward(hidden, weight, bias, labels, head, *options)
        logps, entropy, mean_logits, is_top1, log_sum_sq_probs, *saved, unit = results
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, labels, head, *saved, entropy, unit)
        ctx.mark_non_differentiable(mean_logits, is_top1, log_sum_sq_probs)
        return logps, entropy, mean_logits, is_top1, log_sum_sq_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_logps is None and grad_entropy is None:
            return (None,) * 6
        hidden, weight, bias, labels, head, *saved = ctx.saved_tensors
        options = ctx.options
        needs = list(ctx.needs_input_grad[:3])
        # without an entropy output its gradient cannot exist; a stray empty tensor's is dropped
        grad_entropy = grad_entropy if options.outputs & 1 else None
        dh, dw, db = torch.ops.logitless.logps_backward(
            hidden,
            weight,
            bias,
            labels,
            head,
            options.ignore_index,
            *saved,
            grad_logps,
            grad_entropy,
            needs,
            options.backend,
            options.precision,
            options.memory_budget,
            options.grad_filter,
        )
        return dh if needs[0] else None, dw if needs[1] else None, db if needs[2] else None, None, None, None


def linear_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    head: HeadSpec | None = None,
    outputs: str | Iterable[str] = ("logps",),
    ignore_index: int = -100,
) -> TokenStats:
    """Log-probabilities of ``labels`` under ``softmax(head(hidden @ weight.T + bias))``, without the logits.

    Positions whose label is ``ignore_index`` never enter a GEMM. Costs ``2*N*H*V`` FLOP for N scored tokens without
    gradient; with a frozen head 4 in all, forward and backward; with a trained one 8. For a loss from this library use its
    module, which needs 6. In a CUDA graph every position enters, as zeros where it is ignored: replays may ignore others.

    Args:
        hidden: hidden states, float64, float32, bfloat16 or float16.
        weight: the head's weight, of the same dtype unless autocast is on.
        labels: int32 or int64, already shifted (:func:`logitless.shift`).
        bias: the head's bias.
        head: logit scale, soft-cap and temperature; default none of them.
        outputs: which fields of the result to compute, of :data:`logitless.OUTPUTS`.
        ignore_index: the label of positions to leave out.

    Returns:
        TokenStats: tensors shaped like ``labels``, float32 (float64 for float64 input); ``logps`` and ``entropy`` carry
        gradients to hidden, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> x, w = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> linear_logps(x, w, torch.randint(100, (2, 5))).logps.shape
        torch.Size([2, 5])
    """
    head, wanted = check_spec(head), check_outputs(outputs)
    check_head(hidden, weight, bias)
    check_labels(labels, hidden)
    check_ignore_index(ignore_index)
    x = hidden.to(compute_dtype(hidden))
    return token_stats(x, weight, labels, bias, head, wanted, ignore_index)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    head: HeadSpec,
    outputs: frozenset[str],
    ignore_index: int,
    function: type[LinearLogps] | None = None,
) -> TokenStats:
    """:func:`linear_logps` without its checks, computing in the dtype of ``hidden`` whatever that of ``weight``.

    An adapter may pass a subclass of :class:`LinearLogps` as ``function``, to do something around its backward pass.
    """
    current = current_settings()
    grad = torch.is_grad_enabled()
    frozen_head = not weight.requires_grad and (bias is None or not bias.requires_grad)
    unit = _NO_UNIT
    if grad and hidden.requires_grad and frozen_head:
        unit = _ALL_ROWS if torch.compiler.is_compiling() else _SCORED_ROWS
    options = _Options(
        ignore_index=ignore_index,
        outputs=_bits(outputs),
        unit_dhidden=unit,
        backend=current.backend,
        precision=current.precision,
        memory_budget=current.memory_budget,
        grad_filter=current.grad_filter,
    )
    flat = (function or LinearLogps).apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1).long(), head.pack(), options
    )
    values = {
        name: value.view(labels.shape)
        for name, value in zip(("logps", *OPTIONAL_OUTPUTS), flat, strict=True)
        if name in outputs
    }
    return TokenStats(**values)
