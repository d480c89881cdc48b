"""``linear_logps``: per-token log-probabilities from hidden states and the head's weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core.autograd import eagerly, once_differentiable
from .core.checks import (
    check_entries,
    check_head,
    check_ignore_index,
    check_labels,
    check_outputs,
    check_spec,
    check_temperature,
    compute_dtype,
)
from .core.head_spec import HeadSpec
from .core.head_weight import LoRAWeight, Weight, read_weight
from .core.settings import current_settings
from .core.stats import OPTIONAL_OUTPUTS, TokenStats
from .core.weight_rows import HeadRows, JoinedRows, trained_part
from .logps_operators import ALL_ROWS, NO_UNIT, SCORED_ROWS, logps_backward, logps_forward, output_bits
from .parallel.dtensor import from_dtensor
from .parallel.vocab_parallel import VocabParallel, enter


class _Options(NamedTuple):
    """The arguments of a call that are not tensors."""

    ignore_index: int
    outputs: int
    unit_dhidden: int
    backend: str
    precision: str
    memory_budget: int
    grad_filter: float
    batch_invariant: bool | None


class LinearLogps(torch.autograd.Function):
    """The autograd function over the two operators; with ``options.unit_dhidden`` backward does not read the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,  # whose gradient is made: the weight, or the trained part of ``rows``
        bias: Tensor | None,
        labels: Tensor,
        head: Tensor,
        temperature: Tensor | None,
        options: _Options,
        rows: HeadRows | None = None,
        inputs: Tensor | None = None,  # of an adapter: those of ``rows``
        parallel: VocabParallel | None = None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        if parallel is not None:
            assert weight is not None
            results = logps_forward(hidden, weight, bias, labels, head, temperature, *options, parallel)
        elif rows is None:
            results = torch.ops.logitless.logps_forward(hidden, weight, bias, labels, head, temperature, *options)
        else:  # operators take tensors alone
            results = logps_forward(hidden, rows, bias, labels, head, temperature, *options)
            rows.release()
        ctx.rows, ctx.parallel = rows, parallel
        logps, entropy, mean_logits, is_top1, log_sum_sq_probs, *saved, unit = results
        ctx.options = options
        sources = () if rows is None else rows.sources
        ctx.save_for_backward(hidden, weight, bias, labels, head, temperature, *saved, entropy, unit, *sources)
        ctx.mark_non_differentiable(mean_logits, is_top1, log_sum_sq_probs)
        return logps, entropy, mean_logits, is_top1, log_sum_sq_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_logps is None and grad_entropy is None:
            return (None,) * 10
        options, rows = ctx.options, ctx.rows
        hidden, weight, bias, labels, head, temperature, *saved = ctx.saved_tensors
        if rows is not None:
            saved = saved[: len(saved) - len(rows.sources)]
        needs = list(ctx.needs_input_grad[:3])
        needs_inputs = ctx.needs_input_grad[8]
        needs[0] |= needs_inputs
        # without an entropy output its gradient cannot exist; a stray empty tensor's is dropped
        grad_entropy = grad_entropy if options.outputs & 1 else None
        plain = rows is None and ctx.parallel is None
        run: Any = torch.ops.logitless.logps_backward if plain else logps_backward
        dh, dw, db = run(
            hidden,
            weight if rows is None else rows,
            bias,
            labels,
            head,
            temperature,
            options.ignore_index,
            *saved,
            grad_logps,
            grad_entropy,
            needs,
            options.backend,
            options.precision,
            options.memory_budget,
            options.grad_filter,
            options.batch_invariant,
            *(() if plain else (ctx.parallel,)),
        )
        du = None
        if rows is not None:
            rows.release()
            if isinstance(rows, JoinedRows) and needs[0]:
                size = hidden.shape[1]
                du = dh[:, size:].to(rows.inputs.dtype) if needs_inputs else None
                dh = dh[:, :size].to(hidden.dtype)
        dh = dh if ctx.needs_input_grad[0] else None
        return dh, dw if needs[1] else None, db if needs[2] else None, None, None, None, None, None, du, None


def linear_logps(
    hidden: Tensor,  # (..., H)
    weight: Weight,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    head: HeadSpec | None = None,
    outputs: str | Iterable[str] = ("logps",),
    ignore_index: int = -100,
    temperature: Tensor | None = None,  # (...)
    parallel: VocabParallel | None = None,
) -> TokenStats:
    """Log-probabilities of ``labels`` under ``softmax(head(hidden @ weight.T + bias))``, without the logits.

    Positions whose label is ``ignore_index`` never enter a GEMM. Costs ``2*N*H*V`` FLOP for N scored tokens without
    gradient; with a frozen head 4 in all, forward and backward; with a trained one 8. For a loss from this library use its
    module, which needs 6. In a CUDA graph every position enters, as zeros where it is ignored: replays may ignore others.

    Args:
        hidden: hidden states, float64, float32, bfloat16 or float16.
        weight: the head's weight, of the same dtype unless autocast is on. Also a :class:`logitless.LoRAWeight`, or a frozen
            quantised weight of torchao (``Int8Tensor``, ``Float8Tensor``) or bitsandbytes (``Params4bit``, ``Int8Params``),
            which is dequantised one block of the vocabulary at a time. Such weights run outside of compiled graphs.
        labels: int32 or int64, already shifted (:func:`logitless.shift`).
        bias: the head's bias.
        head: logit scale, soft-cap, temperature and number of entries; default none of them.
        outputs: which fields of the result to compute, of ``logitless.kernels.core.stats.OUTPUTS``.
        ignore_index: the label of positions to leave out.
        temperature: sampling temperature of each token, float32 or float64, positive, for samples of one batch that were drawn
            at different temperatures: ``head`` at ``temperature=1`` is divided by it. Not differentiable; values at ignored
            positions are not read.
        parallel: ``weight`` and ``bias`` are this rank's rows of a head sharded over its vocabulary, see
            :class:`logitless.VocabParallel`. Every rank of its group must make the same calls. Made here where ``weight`` is a
            DTensor sharded by rows over a mesh of one dimension that is named ``"tp"``.

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
    weight, bias, parallel, head = from_dtensor(weight, bias, parallel, head)
    head, wanted, weight = check_spec(head), check_outputs(outputs), read_weight("weight", weight)
    if parallel is not None:
        hidden, head = enter(parallel, hidden, weight, labels, head)
    check_head(hidden, weight, bias)
    check_entries(head, weight)
    check_labels(labels, hidden)
    check_ignore_index(ignore_index)
    check_temperature(temperature, labels, head)
    x = hidden.to(compute_dtype(hidden))
    return token_stats(x, weight, labels, bias, head, wanted, ignore_index, temperature=temperature, parallel=parallel)


def token_stats(
    hidden: Tensor,
    weight: Weight,
    labels: Tensor,
    bias: Tensor | None,
    head: HeadSpec,
    outputs: frozenset[str],
    ignore_index: int,
    function: type[LinearLogps] | None = None,
    temperature: Tensor | None = None,
    parallel: VocabParallel | None = None,
) -> TokenStats:
    """:func:`linear_logps` without its checks, computing in the dtype of ``hidden`` whatever that of ``weight``.

    An adapter may pass a subclass of :class:`LinearLogps` as ``function``, to do something around its backward pass.
    """
    current = current_settings()
    grad, flat_labels = torch.is_grad_enabled(), labels.reshape(-1).long()
    x = hidden.reshape(-1, hidden.shape[-1])
    read = read_weight("weight", weight)
    if isinstance(read, LoRAWeight):
        read = read.join(x, flat_labels != ignore_index)
    rows, trained = read if isinstance(read, HeadRows) else None, trained_part(read)
    inputs = read.inputs if isinstance(read, JoinedRows) else None
    trains_hidden = hidden.requires_grad or (inputs is not None and inputs.requires_grad)
    frozen_head = not read.requires_grad and (bias is None or not bias.requires_grad)
    unit = NO_UNIT
    if grad and trains_hidden and frozen_head:
        unit = ALL_ROWS if torch.compiler.is_compiling() and rows is None else SCORED_ROWS
    options = _Options(
        ignore_index=ignore_index,
        outputs=output_bits(outputs),
        unit_dhidden=unit,
        backend=current.backend,
        precision=current.precision,
        memory_budget=current.memory_budget,
        grad_filter=current.grad_filter,
        batch_invariant=current.batch_invariant,
    )
    apply = (function or LinearLogps).apply
    flat = (apply if rows is None and parallel is None else eagerly(apply))(
        x,
        trained,
        bias,
        flat_labels,
        head.pack(),
        None if temperature is None else temperature.reshape(-1),
        options,
        rows,
        inputs,
        parallel,
    )
    values = {
        name: value.view(labels.shape)
        for name, value in zip(("logps", *OPTIONAL_OUTPUTS), flat, strict=True)
        if name in outputs
    }
    return TokenStats(**values)
