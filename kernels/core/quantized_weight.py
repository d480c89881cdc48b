"""Frozen quantised weights of torchao and bitsandbytes, dequantised a few rows at a time.

Neither library is imported here: whoever has such a weight has imported it. Every row has the bits of the library's own
dequantisation of the whole weight.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .weight_rows import HeadRows

_READ = (
    "accepted are torchao's weight-only Int8Tensor and Float8Tensor and bitsandbytes' Params4bit and Int8Params; of any other "
    "pass the dequantised weight"
)


class TorchaoRows(HeadRows):
    """``torchao.quantization.Int8Tensor`` or ``Float8Tensor``, of any granularity."""

    def __init__(self, weight: Any) -> None:
        super().__init__(tuple(weight.shape), weight.dtype, weight.device)
        self.weight, self.sources = weight, (weight.qdata, weight.scale)
        self.rows_per_scale = -(-weight.shape[0] // weight.scale.shape[0])

    def _dequantize(self, qdata: Tensor, rows: Tensor) -> Tensor:
        w, at = self.weight, rows // self.rows_per_scale
        scale = w.scale.index_select(0, at)
        options = {"block_size": [1, w.shape[1] // scale.shape[1]], "dtype": w.dtype}
        if getattr(w, "zero_point", None) is not None:
            options["zero_point"] = w.zero_point.index_select(0, at)
        return type(w)(qdata, scale, **options).dequantize()

    def write(self, v0: int, v1: int, out: Tensor) -> None:
        out.copy_(self._dequantize(self.weight.qdata[v0:v1], torch.arange(v0, v1, device=self.device)))

    def take(self, rows: Tensor) -> Tensor:
        data = self.weight.qdata
        # index_select has no kernel for float8 on every device
        picked = data.view(torch.int8).index_select(0, rows).view(data.dtype)
        return self._dequantize(picked, rows)


class Int8Rows(HeadRows):
    """``bitsandbytes.nn.Int8Params``: int8 rows and the largest magnitude of each."""

    input_rounding = 1 / 127  # Linear8bitLt quantises its input too

    def __init__(self, data: Tensor, absmax: Tensor) -> None:
        super().__init__((data.shape[0], data.shape[1]), torch.float32, data.device)
        self.data, self.absmax = self.sources = data, absmax

    def write(self, v0: int, v1: int, out: Tensor) -> None:
        out.copy_(_int8_vectorwise_dequant(self.data[v0:v1], self.absmax[v0:v1]))

    def take(self, rows: Tensor) -> Tensor:
        return _int8_vectorwise_dequant(self.data.index_select(0, rows), self.absmax.index_select(0, rows))


def _int8_vectorwise_dequant(data: Tensor, absmax: Tensor) -> Tensor:
    return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(data, absmax)


class FourBitRows(HeadRows):
    """``bitsandbytes.nn.Params4bit``: two codes per byte, one scale per ``blocksize`` elements of the flattened weight.

    A scale's block may begin and end within a row. Scales may be quantised themselves (``compress_statistics``).
    """

    def __init__(self, data: Tensor, state: Any) -> None:
        super().__init__((state.shape[0], state.shape[1]), state.dtype, data.device)
        # Linear4bit changes the state in place when it rearranges the weight (CpuFourBitRows), perhaps before the backward pass
        self.data, self.state = data.contiguous().view(torch.uint8).reshape(-1), copy.copy(state)
        self.sources = (data,)
        self.size, self.code, self.total = state.blocksize, state.code.to(data.device), self.shape.numel()

    def _scales(self, first: int, last: int) -> Tensor:
        """Scales ``first:last``."""
        state = self.state
        if not state.nested:
            return state.absmax[first:last].float()
        inner = state.state2
        start = first // inner.blocksize * inner.blocksize
        part = copy.copy(inner)
        part.absmax = inner.absmax[start // inner.blocksize : -(-last // inner.blocksize)]
        functional = sys.modules["bitsandbytes"].functional
        values = functional.dequantize_blockwise(state.absmax[start:last], part)[first - start :]
        return (values + state.offset).float()

    def write(self, v0: int, v1: int, out: Tensor) -> None:
        first, last = v0 * self.shape[1], v1 * self.shape[1]
        start, stop = first // self.size * self.size, min(-(-last // self.size) * self.size, self.total)
        values = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.data[start // 2 : -(-stop // 2)],
            self._scales(start // self.size, -(-stop // self.size)),
            self.size,
            self.state.quant_type,
            [stop - start],
            self.dtype,
        )
        out.copy_(values.reshape(-1)[first - start : last - start].view(out.shape))

    def take(self, rows: Tensor) -> Tensor:
        at = rows[:, None] * self.shape[1] + torch.arange(self.shape[1], device=self.device)
        codes = self.data[at // 2] >> (4 * (1 - at % 2)).to(torch.uint8) & 15
        return (self.code[codes.int()] * self._scales_at(at // self.size)).to(self.dtype)

    def _scales_at(self, blocks: Tensor) -> Tensor:
        """The scale of each of the given blocks."""
        state = self.state
        values = state.absmax[blocks]
        if not state.nested:
            return values.float()
        inner = state.state2
        return (inner.code[values.int()] * inner.absmax[blocks // inner.blocksize] + state.offset).float()


class CpuFourBitRows(HeadRows):
    """``Params4bit`` as ``Linear4bit`` rearranges it on CPUs with AVX512-BF16, in its first forward pass without gradient.

    Groups of 32 rows; a byte holds an element of a row in its lower half and of the row 16 below in its upper half.
    """

    def __init__(self, data: Tensor, state: Any) -> None:
        super().__init__((state.shape[0], state.shape[1]), state.dtype, data.device)
        self.data = data.reshape(-1, self.shape[1] // 2, 32)
        self.state, self.sources = copy.copy(state), (data,)

    def _values(self, codes: Tensor, rows: Tensor) -> Tensor:
        scales = self.state.absmax.index_select(1, rows).t().float().repeat_interleave(self.state.blocksize, dim=1)
        return (self.state.code[codes.int()] * scales).to(self.dtype)

    def write(self, v0: int, v1: int, out: Tensor) -> None:
        first, last = v0 // 32, -(-v1 // 32)
        data = self.data[first:last]
        codes = torch.cat((data & 15, data >> 4), dim=-1).view(last - first, -1, 32, 2).transpose(1, 2)
        codes = codes.reshape((last - first) * 32, -1)[v0 - 32 * first : v1 - 32 * first]
        out.copy_(self._values(codes, torch.arange(v0, v1, device=self.device)))

    def take(self, rows: Tensor) -> Tensor:
        within = rows % 32
        byte = (2 * (within % 16))[:, None, None] + torch.arange(2, device=self.device)
        codes = self.data[rows // 32].gather(2, byte.expand(-1, self.shape[1] // 2, 2))
        codes = codes >> torch.where(within < 16, 0, 4).to(torch.uint8)[:, None, None] & 15
        return self._values(codes.reshape(len(rows), -1), rows)


def quantized_rows(name: str, weight: Any) -> Any:
    """A quantised weight as :class:`HeadRows`; any other tensor as it is. See ``read_weight``."""
    kind = type(weight)
    library, full = kind.__module__.split(".")[0], f"{kind.__module__}.{kind.__name__}"
    if library not in ("torchao", "bitsandbytes"):
        # DTensors have errors of their own, and FakeTensors and functional tensors are torch's
        if is_traceable_wrapper_subclass(weight) and library != "torch":
            raise TypeError(f"{name} is a {full}, a tensor subclass that is not accepted: {_READ}")
        return weight
    if weight.requires_grad:
        raise ValueError(
            f"{name} is a {full} that requires a gradient: quantised weights are frozen, call requires_grad_(False)"
        )
    if library == "torchao":
        return TorchaoRows(_checked_torchao(name, full, weight))
    if kind.__name__ == "Params4bit":
        return four_bit_rows(name, weight.data, weight.quant_state)
    if kind.__name__ == "Int8Params":
        return int8_rows(name, weight.data, weight.SCB)
    raise TypeError(f"{name} is a {full}, which is not accepted: {_READ}")


def _checked_torchao(name: str, full: str, weight: Any) -> Any:
    if type(weight).__name__ not in ("Int8Tensor", "Float8Tensor") or weight.dim() != 2:
        raise TypeError(f"{name} is a {full}, which is not accepted: {_READ}")
    for attribute in ("act_quant_kwargs", "act_quant_scale", "act_pre_scale"):
        if getattr(weight, attribute, None) is not None:
            raise TypeError(f"{name} quantises or scales activations too ({full}.{attribute} is set): {_READ}")
    return weight


def four_bit_rows(name: str, data: Tensor, state: Any) -> HeadRows:
    """The weight of a ``Linear4bit``: its data and its ``QuantState``."""
    if state is None:
        raise ValueError(f"{name} is a Params4bit that is not quantised yet: move its module to a device first")
    if len(state.shape) != 2:
        raise ValueError(f"{name} must have shape [vocab, hidden], got {tuple(state.shape)}")
    return (CpuFourBitRows if getattr(state, "packing_format_for_cpu", False) else FourBitRows)(data, state)


def int8_rows(name: str, data: Tensor, absmax: Tensor | None) -> HeadRows:
    """The weight of a ``Linear8bitLt``: its data (V, H) and its ``SCB`` (V,)."""
    if data.dtype != torch.int8:  # has_fp16_weights, or not quantised yet
        raise ValueError(f"{name} is an Int8Params with {data.dtype} data, not quantised: move its module to a device first")
    if absmax is None:
        raise ValueError(f"{name} is an Int8Params without SCB, which Linear8bitLt took: set weight.SCB = module.state.SCB")
    return Int8Rows(data, absmax)
