"""The registered operators behind :func:`logitless.linear_logps`: forward, backward, their shapes and their FLOP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends.interface import Call, Work
from .backends.registry import choose_backend, choose_elementwise
from .core.blocking import core_options, real_rows
from .core.checks import check_label_range, check_temperature_range
from .core.dtypes import accumulate_dtype
from .core.head_spec import HeadSpec
from .core.row_head import with_temperatures
from .core.stats import OPTIONAL_OUTPUTS, CoreOptions, RowStats
from .core.weight_rows import HeadRows, JoinedRows
from .parallel.backend import sharded_backend
from .parallel.vocab_parallel import Shard, VocabParallel
from .tile.head_gradient import HeadGradient
from .tile.rows import ScoredRows

_library = torch.library.Library("logitless", "DEF")
_library.define(
    "logps_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor head, Tensor? temperature, "
    "int ignore_index, int outputs, int unit_dhidden, str backend, str precision, int memory_budget, float grad_filter, "
    "bool? batch_invariant) -> (Tensor logps, Tensor entropy, Tensor mean_logits, "
    "Tensor is_top1, Tensor log_sum_sq_probs, Tensor k, Tensor sum_others, Tensor log_denom, Tensor target_offset, "
    "Tensor target_slope, Tensor unit)"
)
_library.define(
    "logps_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor head, Tensor? temperature, "
    "int ignore_index, Tensor k, Tensor sum_others, Tensor log_denom, Tensor target_offset, Tensor target_slope, "
    "Tensor entropy, Tensor unit, Tensor? grad_logps, Tensor? grad_entropy, bool[] needs, str backend, str precision, "
    "int memory_budget, float grad_filter, "
    "bool? batch_invariant) -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
_library.define("segment_sum(Tensor values, Tensor offsets, str backend) -> Tensor")
#: Whether the forward operator returns d logps / d hidden, and of which rows. Dynamo needs sizes that do not depend on data.
NO_UNIT, SCORED_ROWS, ALL_ROWS = range(3)
#: Statistics that the backward pass needs, in the order in which the operators hand them over.
_SAVED = ("k", "sum_others", "log_denom", "target_offset", "target_slope")
_PER_TOKEN = ("logps", *OPTIONAL_OUTPUTS, *_SAVED)


def output_bits(outputs: Iterable[str]) -> int:
    names = set(outputs)
    return sum(1 << i for i, name in enumerate(OPTIONAL_OUTPUTS) if name in names)


def _names(bits: int) -> frozenset[str]:
    return frozenset(name for i, name in enumerate(OPTIONAL_OUTPUTS) if bits >> i & 1)


def _call(hidden: Tensor, weight: Tensor | HeadRows, num_tokens: int, work: Work, options: CoreOptions) -> Call:
    """What a backend is asked for. hidden (P, H), weight (V, H)."""
    return Call(
        hidden.device,
        hidden.dtype,
        weight.dtype,
        num_tokens=num_tokens,
        hidden_size=_columns(hidden, weight),
        vocab_size=len(weight),
        outputs=options.outputs,
        work=work,
        workspace=options.workspace,
        grad_filter=options.grad_filter,
        by_rows=isinstance(weight, HeadRows),
        batch_invariant=options.batch_invariant,
    )


def _columns(hidden: Tensor, weight: Tensor | HeadRows) -> int:
    """K of :func:`_inputs`. A frozen weight that the backward pass does not read may be released until then (ZeRO-3)."""
    return weight.shape[1] if isinstance(weight, HeadRows) else hidden.shape[1]


def _inputs(picked: ScoredRows, hidden: Tensor, weight: Tensor | HeadRows) -> Tensor:
    """What the weight is multiplied by, (N, K): hidden states, with an adapter ``[h, u]``."""
    x = picked.hidden(hidden)
    return weight.extend(x, picked.hidden(weight.inputs)) if isinstance(weight, JoinedRows) else x


@torch.library.impl(_library, "logps_forward", "CompositeExplicitAutograd")
def logps_forward(
    hidden: Tensor,  # (P, H)
    weight: Tensor | HeadRows,  # (V, H); the operator's is a tensor
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (P,) int64
    head: Tensor,  # HeadSpec.pack()
    temperature: Tensor | None,  # (P,)
    ignore_index: int,
    outputs: int,
    unit_dhidden: int,  # NO_UNIT, SCORED_ROWS or ALL_ROWS
    backend: str,
    precision: str,
    memory_budget: int,
    grad_filter: float,
    batch_invariant: bool | None,
    parallel: VocabParallel | None = None,  # not of the operator
) -> tuple[Tensor, ...]:
    spec = HeadSpec.unpack(head)
    whole_weight = weight
    weight, bias = real_rows(weight, bias, spec)
    entries = len(weight) if parallel is None else parallel.vocab_size
    check_label_range(labels, labels != ignore_index, entries, ignore_index)
    picked = ScoredRows.of(labels, ignore_index)
    rows, acc = picked.taken, accumulate_dtype(hidden.dtype)
    if parallel is not None:
        Shard.agree(parallel, len(whole_weight), len(rows), (unit_dhidden != NO_UNIT,), hidden.device)
    if temperature is not None:
        own = picked.temperatures(temperature)
        check_temperature_range(own)
        spec = with_temperatures(spec, own, acc)
    given = memory_budget, _names(outputs), precision, acc.itemsize, hidden.device, grad_filter
    options = core_options(*given, batch_invariant)
    work: Work = "forward" if unit_dhidden == NO_UNIT else "frozen"
    call = _call(hidden, weight, len(rows), work, options)
    chosen = choose_backend(replace(call, sharded=parallel is not None), backend)
    if parallel is not None:
        chosen = sharded_backend(chosen, parallel)
    with torch.autocast(hidden.device.type, enabled=False):
        stats: RowStats = chosen.score(
            _inputs(picked, hidden, weight),
            weight,
            bias,
            picked.labels(labels, bias),
            spec,
            options,
            unit_dhidden=unit_dhidden != NO_UNIT,
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
        unit = torch.empty((0, _columns(hidden, weight)), dtype=acc, device=hidden.device)
    elif unit_dhidden == ALL_ROWS:
        unit = chosen.elementwise.scatter_rows(hidden.shape, acc, rows, unit)
    return *results, unit


@torch.library.register_fake("logitless::logps_forward")
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: Tensor,
    temperature: Tensor | None,
    ignore_index: int,
    outputs: int,
    unit_dhidden: int,
    backend: str,
    precision: str,
    memory_budget: int,
    grad_filter: float,
    batch_invariant: bool | None,
) -> tuple[Tensor, ...]:
    acc = accumulate_dtype(hidden.dtype)
    results = []
    for name in _PER_TOKEN:
        absent = name in OPTIONAL_OUTPUTS and name not in _names(outputs)
        results.append(hidden.new_empty(0 if absent else labels.shape[0], dtype=torch.bool if name == "is_top1" else acc))
    size: Any = 0 if unit_dhidden == NO_UNIT else hidden.shape[0]
    if unit_dhidden == SCORED_ROWS:
        size = torch.library.get_ctx().new_dynamic_size()
    return *results, hidden.new_empty((size, hidden.shape[1]), dtype=acc)


@torch.library.impl(_library, "logps_backward", "CompositeExplicitAutograd")
def logps_backward(
    hidden: Tensor,  # (P, H)
    weight: Tensor | HeadRows,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (P,)
    head: Tensor,
    temperature: Tensor | None,  # (P,)
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
    batch_invariant: bool | None,
    parallel: VocabParallel | None = None,  # not of the operator
) -> tuple[Tensor, Tensor, Tensor]:
    spec = HeadSpec.unpack(head)
    whole_weight, whole_bias = weight, bias
    picked = ScoredRows.of(labels, ignore_index)
    rows = picked.taken
    n, acc, deferred = len(rows), accumulate_dtype(hidden.dtype), needs[0] and not (needs[1] or needs[2])
    if not deferred or grad_entropy is not None:
        weight, bias = real_rows(weight, bias, spec)
    if temperature is not None:
        spec = with_temperatures(spec, picked.temperatures(temperature), acc)
    acc_size, device = acc.itemsize, hidden.device
    options = core_options(memory_budget, frozenset(), precision, acc_size, device, grad_filter, batch_invariant)
    call = _call(hidden, weight, n, "recompute", options)
    call = replace(call, train_hidden=needs[0], train_weight=needs[1], sharded=parallel is not None)
    chosen = choose_backend(call, backend)
    if parallel is not None:
        chosen = sharded_backend(chosen, parallel)
    c = None if grad_logps is None else picked.values(grad_logps).to(acc)
    g = None if grad_entropy is None else picked.values(grad_entropy).to(acc)

    def empty() -> Tensor:
        return torch.empty(0, dtype=acc, device=hidden.device)

    with torch.autocast(hidden.device.type, enabled=False):
        recomputed = not deferred or g is not None
        dhidden = None
        if needs[0] and recomputed:
            dhidden = torch.empty((n, _columns(hidden, weight)), dtype=acc, device=hidden.device)
        head_gradient = None
        if needs[1] or needs[2]:
            # every block of dW is written once here, and the upstream gradient is in it: no float32 buffer is needed
            head_gradient = HeadGradient(
                whole_weight,
                whole_bias,
                need_weight=needs[1],
                need_bias=needs[2],
                accumulate=False,
                entries=spec.vocab_size,
            )
            if isinstance(whole_weight, JoinedRows):
                head_gradient.adapter_inputs = picked.hidden(whole_weight.inputs)
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
                _inputs(picked, hidden, weight),
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
        # with an adapter the gradient of [h, u] is returned, not rounded: u may be wider than h
        shape = len(hidden), _columns(hidden, weight)
        dtype = acc if isinstance(weight, JoinedRows) else hidden.dtype
        if needs[0]:
            if deferred:
                if picked.scored is not None and len(unit) != n:
                    raise RuntimeError(
                        "the forward pass of linear_logps ran outside of the CUDA graph that captures its backward"
                    )
                factor = torch.zeros_like(sum_others[rows]) if c is None else c
                unit = unit if len(unit) == n else unit[rows]
                dh = chosen.elementwise.scatter_rows(shape, dtype, rows, unit, factor, dhidden)
            else:
                assert dhidden is not None
                dh = chosen.elementwise.scatter_rows(shape, dtype, rows, dhidden)
        if head_gradient is not None:
            if head_gradient.whole_weight is not None:
                dw = head_gradient.whole_weight
            if head_gradient.whole_bias is not None:
                assert bias is not None
                db = head_gradient.whole_bias.to(bias.dtype)
    return dh, dw, db


@torch.library.register_fake("logitless::logps_backward")
def _backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Tensor, temperature: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[-6]

    def like(t: Tensor | None, needed: bool) -> Tensor:
        if needed and t is not None:
            return torch.empty_like(t, memory_format=torch.contiguous_format)
        return hidden.new_empty(0, dtype=accumulate_dtype(hidden.dtype))

    return like(hidden, needs[0]), like(weight, needs[1]), like(bias, needs[2])


def _products(weight: Tensor, labels: Tensor, head: Tensor, ignore_index: int) -> int:
    """N * H * V of the scored tokens and the real entries."""
    entries = HeadSpec.unpack(head).entries_of(weight.shape[0])
    return int((labels != ignore_index).sum()) * entries * weight.shape[1]


@register_flop_formula(torch.ops.logitless.logps_forward, get_raw=True)
def _forward_flops(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    labels: Tensor,
    head: Tensor,
    temperature: Any,
    ignore_index: int,
    *rest: Any,
    **_: Any,
) -> int:
    unit_dhidden = rest[1]
    return 2 * _products(weight, labels, head, ignore_index) * (2 if unit_dhidden else 1)


@register_flop_formula(torch.ops.logitless.logps_backward, get_raw=True)
def _backward_flops(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    labels: Tensor,
    head: Tensor,
    temperature: Any,
    ignore_index: int,
    *rest: Any,
    **_: Any,
) -> int:
    grad_entropy, needs = rest[-7], rest[-6]
    if needs[0] and not (needs[1] or needs[2]) and grad_entropy is None:
        return 0  # deferred scale: the forward pass has done the work
    return 2 * _products(weight, labels, head, ignore_index) * (1 + int(needs[0]) + int(needs[1]))


@torch.library.impl(_library, "segment_sum", "CompositeExplicitAutograd")
def _segment_sum(values: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return choose_elementwise(values.device, "segment_sum", backend).segment_sum(values, offsets)


@torch.library.register_fake("logitless::segment_sum")
def _segment_sum_fake(values: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)
