"""Operators of the compiled extension: one schema each, served by a C++ and a CUDA implementation from ``csrc/``.

All write into tensors of the caller, allocate none and never synchronise. n tokens, w vocabulary entries
``first..first+w``, acc = float32 (float64 for float64 inputs).

``indexed_dot``
    ``out[i] = x[i] . weight[labels[i]] + bias[labels[i]]``. x (n, H), weight (V, H), bias (V,), labels (n,) int64, out (n,)
    acc. The weight is rounded to x's dtype first; ``rounded`` rounds the result to it.

``tile_pass``
    Element-wise over raw logits ``source`` (n, w), rows of any stride: ``r = source + bias`` (rounded by ``rounding``: 0
    not, 1 to bfloat16, 2 to float16), ``z = T(r)`` as in HeadSpec (softcap 0: none), times ``inverse_temperature`` (n,) acc
    where each token has a temperature of its own, ``e = exp(z - k)``. ``destination``
    (n, w), which may share memory with ``source`` (a 16-bit one may start where a row of 32-bit logits starts), gets ``e *
    (1 - tanh^2)``, and ``at_target`` (n,) acc (or 0) at the label. With ``sums`` (7, n) float64 (rows: SUMS), adds this
    block to them, the label's entry left out of e, ez and ee; ``z`` has all entries, ``target`` is the label's logit,
    ``before`` and ``after`` the largest on its left and right. Which rows of ``sums`` are wanted: bits of ``outputs`` (1
    ez, 2 z, 4 target, before and after, 8 ee); the others are left as they are. 16, with ``sums``, leaves ``1 - tanh^2`` out
    of the destination. Where ``z - k`` is too large, ``k`` (n,) acc is raised to the row's maximum, the sums so far are
    brought to it, and so is the row written. Without ``sums``,
    ``k`` is final, and the entries are multiplied by ``mix[0] + mix[1] * max(z - k, -1000)``; mix (2, n) acc. Entries that a
    float16 destination cannot hold are infinite: nothing here uses one.

``pair_loss``
    Sequences lie pair by pair, chosen then rejected: sequence j has tokens ``offsets[j]:offsets[j+1]`` of ``logps`` (N,)
    acc, offsets (2p+1,) int64. ``sequence_logps[j]`` (2p,) float64 = sum of weights * logps (0 where a weight is 0),
    divided by the length if ``mean``. delta = chosen - rejected, minus the same of ``ref_logps`` (2p,) float64. ``losses``
    (p,) float64: the function of delta that ``kind`` says, see MARGIN_FUNCTIONS. ``coefficients`` (N,) acc = ``scale`` *
    dlosses / dlogps.

``scale_scatter``
    ``out[rows[i]] = values[i] * factor`` for distinct rows, in out's dtype. values (n, H) acc, factor (1,) or (n,) acc, out
    (P, H).

``scaled_convert``
    ``out = source * factor`` in out's dtype. source, out of one shape, contiguous; factor (1,) acc.

``finish_tile``
    Block j of row i, columns ``j * width`` and on, is multiplied by ``factors[j, i]``, and not even read where that is 1.
    Then ``tile[i, labels[i]] = at_target[i]``. tile (n, V), rows of any stride, factors (ceil(V / width), n) acc, labels
    (n,) int64, at_target (n,) acc.

On CPUs only, for bfloat16 x with an even H, built on oneDNN's small GEMM (bfloat16 in, float32 out). A weight of another
dtype is rounded to bfloat16, block by block in the cache:

``pack_tokens``, ``pack_rows``
    Bring x (n, H) into the order in which the GEMM reads it: for ``score_block``, and multiplied by ``scale`` (n,) for
    ``grad_weight``. out: packed_tokens_size, packed_rows_size elements.

``score_block``
    ``tile_pass`` on the logits of packed tokens and weight rows ``first..first+w`` (w, H), float32 and never in memory.
    ``gradient`` (w, n) bfloat16 is the transposed destination, 0 at the label. ``start`` (n,) is what k was before the
    first block: with it a sum does not depend, to the bit, on how the vocabulary is cut into blocks that are multiples of
    SPAN.

``grad_hidden``
    ``dhidden += gradient.T @ weight``. gradient (w, n), weight (w, H) bfloat16, dhidden (n, H) float32.

``finish_rows``
    ``values = values * scale + target * weight[labels]``, row by row. values (n, H) float32, scale, target (n,) float32.

``grad_weight``
    ``dweight = gradient @ (scale * x)`` plus ``values[i] * x[i]`` at row ``labels[i] - first``, which is exact; float32
    dweight (w, H) is added to where ``accumulate``, float32 or bfloat16 written otherwise. ``dbias`` (w,) float32 gets
    ``gradient @ scale`` and the values added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

#: Vocabulary entries whose sums ``score_block`` keeps together.
SPAN = 256
#: Rows of ``sums``.
SUMS = ("e", "ez", "ee", "z", "target", "before", "after")
#: Kinds of ``pair_loss``: smoothed -logsigmoid of beta * delta - gamma; relu(1 - beta * delta); (delta - 1 / (2 beta))^2.
MARGIN_FUNCTIONS = ("log_sigmoid", "hinge", "square")

SCHEMAS = {
    "indexed_dot": "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, bool rounded, Tensor(a!) out) -> ()",
    "tile_pass": (
        "(Tensor source, Tensor(a!)? destination, Tensor? bias, Tensor labels, Tensor(b!) k, Tensor(c!)? sums, Tensor? mix, "
        "Tensor? at_target, Tensor? inverse_temperature, float logit_scale, float softcap, float temperature, int first, "
        "int outputs, int rounding) -> ()"
    ),
    "pair_loss": (
        "(Tensor logps, Tensor? weights, Tensor offsets, Tensor? ref_logps, int kind, bool mean, float beta, float gamma, "
        "float label_smoothing, float scale, Tensor(a!) losses, Tensor(b!) sequence_logps, Tensor(c!)? coefficients) -> ()"
    ),
    "scale_scatter": "(Tensor values, Tensor rows, Tensor factor, Tensor(a!) out) -> ()",
    "scaled_convert": "(Tensor source, Tensor factor, Tensor(a!) out) -> ()",
    "finish_tile": "(Tensor(a!) tile, Tensor? factors, Tensor labels, Tensor? at_target, int width) -> ()",
    "pack_tokens": "(Tensor x, Tensor(a!) out) -> ()",
    "pack_rows": "(Tensor x, Tensor scale, Tensor(a!) out) -> ()",
    "score_block": (
        "(Tensor packed, Tensor weight, Tensor? bias, Tensor labels, Tensor? start, Tensor(a!) k, Tensor(b!)? sums, "
        "Tensor? mix, Tensor? inverse_temperature, Tensor(c!)? gradient, float logit_scale, float softcap, float temperature, "
        "int first, int outputs, int rounding) -> ()"
    ),
    "grad_hidden": "(Tensor gradient, Tensor weight, Tensor(a!) dhidden) -> ()",
    "finish_rows": "(Tensor(a!) values, Tensor scale, Tensor target, Tensor weight, Tensor labels) -> ()",
    "grad_weight": (
        "(Tensor gradient, Tensor? packed, Tensor x, Tensor scale, Tensor values, Tensor labels, int first, int width, "
        "bool accumulate, Tensor(a!)? dweight, Tensor(b!)? dbias) -> ()"
    ),
}

#: The shapes that a tracing compiler can check: a letter for each dimension; equal letters are equal sizes.
_SHAPES = {
    "indexed_dot": "x:nh weight:vh bias:v labels:n out:n",
    "tile_pass": "source:nw destination:nw labels:n k:n sums:7n mix:2n at_target:n inverse_temperature:n",
    "pair_loss": "logps:n weights:n ref_logps:s losses:p sequence_logps:s coefficients:n",
    "scale_scatter": "values:nh rows:n out:ph",
    "scaled_convert": "",
    "finish_tile": "tile:nv factors:bn labels:n at_target:n",
    "pack_tokens": "x:nh",
    "pack_rows": "x:nh scale:n",
    "score_block": "weight:wh labels:n start:n k:n sums:7n mix:2n inverse_temperature:n",
    "grad_hidden": "weight:wh dhidden:nh",
    "finish_rows": "values:nh scale:n target:n weight:vh labels:n",
    "grad_weight": "x:nh scale:n values:n labels:n dweight:wh dbias:w",
}


def _fake(name: str, arguments: list[str]) -> Callable[..., None]:
    """The implementation for tensors without data, which checks devices and shapes."""
    shapes = dict(shape.split(":") for shape in _SHAPES[name].split())

    def check(*values: Any) -> None:
        tensors = {argument: t for argument, t in zip(arguments, values, strict=True) if isinstance(t, Tensor)}
        devices = {argument: str(t.device) for argument, t in tensors.items()}
        if len(set(devices.values())) > 1:
            raise ValueError(f"{name}: all tensors must be on one device, got {devices}")
        sizes: dict[str, Any] = {}
        for argument, letters in shapes.items():
            if argument not in tensors:
                continue
            t = tensors[argument]
            wrong = functools.partial(_wrong_shape, name, argument, letters, t.shape, dict(sizes))
            torch._check(t.dim() == len(letters), wrong)
            for letter, size in zip(letters, t.shape, strict=True):
                wanted = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
                torch._check(size == wanted, wrong)  # sizes that depend on data are compared when the compiled code runs

    return check


def _wrong_shape(name: str, argument: str, letters: str, shape: torch.Size, sizes: dict[str, Any]) -> str:
    return f"{name}: {argument} must have shape ({', '.join(letters)}), got {tuple(shape)} where {sizes}"


_library = torch.library.Library("logitless", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _operator = getattr(torch.ops.logitless, _name).default
    _arguments = [argument.name for argument in _operator._schema.arguments]
    torch.library.register_fake(f"logitless::{_name}", _fake(_name, _arguments), lib=_library)


@register_flop_formula(torch.ops.logitless.score_block, get_raw=True)
def _score_flops(packed: Tensor, weight: Tensor, bias: object, labels: Tensor, *_: object, **__: object) -> int:
    return 2 * labels.numel() * weight.numel()


@register_flop_formula(torch.ops.logitless.grad_hidden, get_raw=True)
def _grad_hidden_flops(gradient: Tensor, weight: Tensor, dhidden: Tensor, **_: object) -> int:
    return 2 * gradient.numel() * weight.shape[1]


@register_flop_formula(torch.ops.logitless.grad_weight, get_raw=True)
def _grad_weight_flops(gradient: Tensor, packed: Tensor | None, x: Tensor, *_: object, **__: object) -> int:
    return 0 if packed is None else 2 * gradient.numel() * x.shape[1]


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def packed_tokens_size(tokens: int, hidden: int) -> int:
    """Elements of ``pack_tokens``' output."""
    return _round_up(tokens, 16) * hidden


def packed_rows_size(tokens: int, hidden: int) -> int:
    """Elements of ``pack_rows``' output."""
    return _round_up(tokens, 2) * _round_up(hidden, 64)


def new_sums(tokens: int, device: torch.device) -> Tensor:
    """Sums of nothing (7, n)."""
    sums = torch.zeros((len(SUMS), tokens), dtype=torch.float64, device=device)
    sums[SUMS.index("target") :] = -torch.inf
    return sums
