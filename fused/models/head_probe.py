"""Measures what a model does to its logits: the :class:`HeadSpec` of its head's input, and of its backbone's output."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from logitless.kernels.core.blocking import VOCAB_BLOCK, blocks, weight_block
from logitless.kernels.core.checks import check_spec
from logitless.kernels.core.head_spec import HeadSpec, measure_with
from logitless.kernels.core.head_weight import LoRAWeight, Weight
from logitless.kernels.core.weight_rows import HeadRows, JoinedRows

from .attention import _evaluating, _probe_ids
from .causal_lm import causal_lm, first_tensor, head_layer, head_parameters
from .offload import loaded_head
from .wrappers import for_probes

#: Largest raw logits of the probed rows. Small ones show a bias, middle ones the scale, large ones saturate a soft-cap.
_PEAKS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 2e3, 2e4)
#: Entries of the vocabulary that the estimates of scale and soft-cap use.
_COLUMNS = 1 << 15
#: Logits below this, the same for every row, are masked.
_MASKED = -1e4
#: Measured specs of the head's input, by model and by :func:`_signature`.
_found: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], HeadSpec]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Seen:
    """One forward pass of a model: its head's input and output, with rows of the input rescaled to reach ``_PEAKS``."""

    hidden: Tensor  # (n, H) as the model computed it
    backbone: Tensor | None  # (n, H) last_hidden_state of the base model
    raw: Tensor  # (n, V) float64, rescaled hidden @ weight.T + bias
    logits: Tensor  # (n, V') float64, the model's, of the rescaled rows
    bias: bool
    eps: float  # relative rounding of raw and logits, the coarser of both


def model_head(
    model: nn.Module, lm: Any, head: HeadSpec | None, temperature: float | None, inputs: Mapping[str, Any]
) -> HeadSpec:
    """The head of a model for the hidden states that reach it: measured, or ``head`` after a comparison with the measured one.

    The probe is one forward pass of eight tokens in evaluation mode. It runs once per model, and again when the forward
    function, hooks or type of its head change. A model that does not run on token ids alone is probed with ``inputs``.

    Raises:
        TypeError, ValueError: ``head`` and ``temperature`` contradict each other, the model's logits, or no ``HeadSpec`` gives
            the model's logits.
    """
    spec = None if head is None else check_spec(head)
    if spec is not None and temperature is not None and spec.temperature not in (1.0, temperature):
        raise ValueError(f"temperature={temperature!r} contradicts head.temperature={spec.temperature!r}: pass one of them")
    model = for_probes(model)
    found = _found.setdefault(lm, {})
    key = _signature(model, lm)
    measured = found.get(key)
    if measured is None:
        fitted = _fit(_observe(model, lm, inputs), lm)
        if isinstance(fitted, str):
            raise ValueError(f"model cannot be used: {fitted}")
        if len(found) >= 16:  # hooks that change with every call
            found.clear()
        measured = found[key] = fitted
    if spec is None:
        spec = measured
    elif differences := _differences(spec, measured):
        right = replace(measured, temperature=spec.temperature)
        raise ValueError(
            f"head does not give the logits of {type(lm).__name__}: {'; '.join(differences)}. Pass head={right!r}, or None"
        )
    return spec if temperature is None else spec.with_temperature(temperature)


def measure_head(
    model: nn.Module,
    at: Literal["head", "backbone"] = "head",
    temperature: float = 1.0,
    inputs: Mapping[str, Any] | None = None,
) -> HeadSpec:
    """See :meth:`HeadSpec.from_model`."""
    if at not in ("head", "backbone"):
        raise ValueError(f'at must be "head" or "backbone", got {at!r}')
    lm, model = causal_lm(model), for_probes(model)
    seen = _observe(model, lm, inputs, given_only=inputs is not None)
    spec = _fit(seen, lm)
    if isinstance(spec, HeadSpec) and at == "backbone":
        spec = _behind(seen, spec, lm)
    if isinstance(spec, str):
        raise ValueError(f"no HeadSpec describes this model: {spec}")
    return spec.with_temperature(temperature)


measure_with(measure_head)


def _signature(model: nn.Module, lm: Any) -> tuple[Any, ...]:
    """What the probe's result depends on, without the values of the weights."""
    head = head_layer(lm)
    parts = tuple(
        (type(part), type(part).forward, id(vars(part).get("forward")), *part._forward_hooks, None, *part._forward_pre_hooks)
        for part in (model, lm, *head.modules())
    )
    return (*parts, tuple(getattr(head, "weight", torch.empty(0)).shape), *_numbers(lm.config))


def _numbers(config: Any) -> Iterator[float]:
    """Positive numbers of a config and of the configs inside it: candidates for scales and soft-caps."""
    values = [*vars(config).values(), getattr(config, "logits_scaling", None)]
    for value in values:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
            yield float(value)
        elif callable(getattr(value, "get_text_config", None)):
            yield from _numbers(value)


def _observe(model: nn.Module, lm: Any, inputs: Mapping[str, Any] | None, given_only: bool = False) -> _Seen:
    """Run the model on eight token ids. Where it needs more than ids, or ``given_only``: on ``inputs``."""
    with torch.no_grad(), _evaluating(model):
        if not given_only:
            try:
                return _run(model, lm, {"input_ids": _probe_ids(lm, 1)})
            except Exception:  # a model that needs images, positions or masks says so in many ways
                if inputs is None:
                    raise
        return _run(model, lm, inputs or {})


def _run(model: nn.Module, lm: Any, inputs: Mapping[str, Any]) -> _Seen:
    owner, name = threading.get_ident(), type(lm).__name__
    calls: list[tuple[Tensor, Tensor, bool, float]] = []
    outputs: list[Tensor] = []

    def replace_rows(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != owner:
            return None
        if not args:
            raise ValueError(f"model must pass its head the hidden states as its first argument, but {name} passes keywords")
        hidden, *rest = args
        hidden = _probed_rows(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        rescaled, raw, bias, eps = _rescale(lm, flat)
        calls.append((flat, raw, bias, eps))
        return (rescaled.view_as(hidden), *rest)

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == owner and (states := first_tensor(output, "last_hidden_state")) is not None:
            outputs.append(states)

    handles = [head_layer(lm).register_forward_pre_hook(replace_rows)]
    inner = [part for part in lm.modules() if part is not lm and hasattr(part, "config") and hasattr(part, "base_model")]
    handles += [part.register_forward_hook(keep_output) for part in inner]  # models without a head
    try:
        result = model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != 1:
        raise ValueError(f"model must call its head once in a forward pass, but {name} did {len(calls)} times")
    hidden, raw, bias, eps = calls[0]
    logits = first_tensor(result, "logits")
    if logits is None:
        raise ValueError(f"model must return logits, but {name}.forward returned {type(result).__name__}")
    logits = logits.reshape(-1, logits.shape[-1])
    rows = [_probed_rows(states) for states in outputs]
    fitting = [states.reshape(hidden.shape) for states in rows if states.numel() == hidden.numel()]
    backbone = fitting[-1] if fitting else None  # the outermost
    eps = max(eps, torch.finfo(raw.dtype).eps, torch.finfo(logits.dtype).eps)
    return _Seen(hidden, backbone, raw.double(), logits.to(raw.device).double(), bias, eps)


def _probed_rows(states: Tensor) -> Tensor:
    """The first tokens of a batch (S, T, H), repeated where there are too few; other shapes as they are."""
    if states.dim() != 3:
        return states
    return states[:1, torch.arange(len(_PEAKS), device=states.device) % states.shape[1]]


def _rescale(lm: Any, hidden: Tensor) -> tuple[Tensor, Tensor, bool, float]:
    """Hidden states (n, H) multiplied so that raw logits reach ``_PEAKS``, these raw logits, whether there is a bias, and the
    rounding of the input that the model's own head does."""
    with loaded_head(lm):
        weight, bias = head_parameters(lm)
    raw = _raw_logits(hidden, weight, bias)
    largest = raw.float().abs().amax(-1)
    bound = min(1e30, torch.finfo(raw.dtype).max / 16)  # float16 overflows
    peaks = torch.tensor([min(peak, bound) for peak in _PEAKS], device=raw.device)
    peaks = peaks[torch.arange(len(raw), device=raw.device) % len(_PEAKS)]
    factors = torch.where(largest > 0, peaks / largest, 1.0).to(hidden.device)
    bounds = bound / hidden.float().abs().amax(-1).clamp(min=1e-6)
    rescaled = hidden * factors.minimum(bounds).to(hidden.dtype)[:, None]
    base = weight.base if isinstance(weight, LoRAWeight) else weight
    eps = base.input_rounding if isinstance(base, HeadRows) else 0.0
    return rescaled, _raw_logits(rescaled, weight, bias), bias is not None and bool(bias.any()), eps


def _raw_logits(hidden: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias``, (n, V), for any weight of a head; a quantised one is read a block at a time."""
    hidden = hidden.to(weight.device)
    rows: Tensor | HeadRows
    if isinstance(weight, LoRAWeight):
        rows = weight.join(hidden, torch.ones(len(hidden), dtype=torch.bool, device=hidden.device))
    else:
        rows = weight
    if isinstance(rows, JoinedRows):
        hidden = rows.extend(hidden, rows.inputs)
    parts = [
        nn.functional.linear(hidden, weight_block(rows, v0, v1, hidden.dtype)) for v0, v1 in blocks(len(rows), VOCAB_BLOCK)
    ]
    raw = torch.cat(parts, dim=1)
    return raw if bias is None else raw + bias.to(raw.dtype)


def _fit(seen: _Seen, lm: Any) -> HeadSpec | str:
    """The spec that turns raw logits into the model's logits, or why there is none."""
    raw, logits, name = seen.raw, seen.logits, type(lm).__name__
    if len(logits) != len(raw) or logits.shape[1] > raw.shape[1]:
        return f"{name} gives its head {tuple(raw.shape)} raw logits and returns {tuple(logits.shape)} logits"
    masked = (logits == logits[0]).all(0) & (logits[0] < _MASKED)
    real = len(masked) - int(masked.sum())  # masked entries at the end are padding
    if not real or bool(masked[:real].any()):
        first = int(masked.nonzero()[0])
        return f"{name} masks {len(masked) - real} of its {len(masked)} logits after the head, the first at {first}"
    vocab_size = None if real == raw.shape[1] else real
    raw, logits = raw[:, :real], logits[:, :real]
    if not bool(raw.isfinite().all() and logits.isfinite().all()):
        return f"logits of {name} are not finite, so its weights may not be either"

    some = slice(None, None, max(1, real // _COLUMNS))
    spec = _estimate(raw[:, some], logits[:, some], seen.eps, set(_numbers(lm.config)) | {1.0})
    spec = replace(spec, vocab_size=vocab_size)
    return _wrong(spec, raw, logits, seen.eps, name) or spec


def _estimate(raw: Tensor, logits: Tensor, eps: float, numbers: set[float]) -> HeadSpec:
    """Scale and soft-cap by least squares, or numbers of the config that are as close as the rounding of the logits allows."""
    rows = (raw != 0).any(1)  # of a head whose weight is 0 there are none
    scales = (raw * logits)[rows].sum(1) / (raw * raw)[rows].sum(1)
    if not len(scales):
        return HeadSpec()
    scale, error, cap = float(scales.mean()), float(scales.std(correction=0)) / math.sqrt(len(scales)), None
    if float(scales.max() - scales.min()) > 0.05 * float(scales.abs().max()):
        cap = _nearest(float(logits.abs().max()), numbers, max(eps / 2, 1e-4))
        x = logits / cap
        unsaturated = (x.abs() < 0.9) & (x.abs() > 0.02)
        x, y = raw[unsaturated], cap * torch.atanh(x[unsaturated])
        scale = float((x * y).sum() / (x * x).sum())
        for _ in range(3):  # Gauss-Newton: rounding of the logits biases their atanh
            z = torch.tanh(raw * (scale / cap))
            slope, left = raw * (1 - z * z), logits - cap * z
            scale += float((slope * left).sum() / (slope * slope).sum())
        error = float((slope * left).norm() / (slope * slope).sum())
        if not math.isfinite(scale):
            return HeadSpec(softcap=cap)
    tolerance = min(max(4 * error / abs(scale), 1e-5), max(eps / 2, 1e-5)) if scale else 0.0
    return HeadSpec(_nearest(scale, numbers | {1 / n for n in numbers}, tolerance), cap)


def _nearest(value: float, candidates: set[float], tolerance: float) -> float:
    """The closest candidate, or the value itself where none is within the relative tolerance."""
    best = min(candidates, key=lambda number: abs(number - value))
    return best if abs(best - value) <= tolerance * abs(value) else value


def _wrong(spec: HeadSpec, raw: Tensor, logits: Tensor, eps: float, name: str) -> str:
    """How the logits differ from those of the spec; empty when they do not."""
    difference = logits - replace(spec, vocab_size=None).apply(raw)
    # rounding of a few operations; in half precision, as a root mean square over the row
    if bool((difference.norm(dim=1) <= max(2 * eps, 1e-4) * logits.norm(dim=1)).all()):
        return ""
    # a bias shows in the rows of small logits, its scale in those of large ones
    sizes = raw.norm(dim=1)
    largest, small = sizes.argmax(), sizes <= 6 * sizes.min()
    scale = (raw[largest] * logits[largest]).sum() / (raw[largest] * raw[largest]).sum()
    offsets = logits[small] - scale * raw[small]
    bias = offsets.mean(0)
    if int(small.sum()) > 1 and float((offsets - bias).norm()) < 0.1 * float(offsets.norm()):
        return f"{name} adds a bias of up to {float(bias.abs().max()):.3g} to its logits after the head"
    return (
        f"the logits of {name} are no scale and soft-cap of hidden @ weight.T + bias: {spec!r}, which comes closest, is up to "
        f"{float(difference.abs().max()):.3g} off at logits up to {float(logits.abs().max()):.3g}"
    )


def _behind(seen: _Seen, spec: HeadSpec, lm: Any) -> HeadSpec | str:
    """The spec for the backbone's output, of which the head's input must be a multiple."""
    name = type(lm).__name__
    if seen.backbone is None:
        return f"{name} has no backbone whose last_hidden_state has the shape of the head's input, {tuple(seen.hidden.shape)}"
    after, before = seen.hidden.double(), seen.backbone.to(seen.hidden.device).double()
    factor = float((after * before).sum() / (before * before).sum())
    off = float((after - factor * before).norm() / after.norm())
    if not off <= max(4 * seen.eps, 1e-4):
        return (
            f"{name} transforms its backbone's output before the head, by more than a factor ({off:.0%} off): use the head's "
            'input, as model_logps does, with at="head"'
        )
    numbers = set(_numbers(lm.config)) | {1.0}
    factor = _nearest(factor, numbers | {1 / n for n in numbers}, max(seen.eps / 16, 1e-5))
    if factor != 1.0 and seen.bias:
        return f"{name} multiplies its backbone's output by {factor:.6g} before a head with a bias, which is not multiplied"
    return replace(spec, logit_scale=spec.logit_scale * factor)


def _differences(given: HeadSpec, measured: HeadSpec) -> list[str]:
    """What a given spec contradicts. It may leave out further rows of the head, as padding that the model does not cut off."""
    out = []
    for name, a, b in (
        ("logit_scale", given.logit_scale, measured.logit_scale),
        ("softcap", given.softcap, measured.softcap),
    ):
        if a != b and (a is None or b is None or not math.isclose(a, b, rel_tol=5e-3)):
            out.append(f"{name} is {a!r}, but the model's logits have {b!r}")
    if measured.vocab_size is not None and (given.vocab_size is None or given.vocab_size > measured.vocab_size):
        out.append(f"vocab_size is {given.vocab_size!r}, but the model returns {measured.vocab_size} logits")
    return out
