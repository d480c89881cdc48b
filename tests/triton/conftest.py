"""Tests of Triton's kernels run on a GPU where there is one, and else in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(t: Tensor | None) -> Tensor | None:
    """On the device, with its strides, and what lies beside it in memory."""
    if t is None or t.device == DEVICE:
        return t
    memory = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).to(DEVICE)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def replace_in_backend(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    """Replaces a name in the modules of the backend, of torch's blockwise algorithm, and of the mathematics that both share."""
    from logitless.kernels.backends.torch import blockwise
    from logitless.kernels.backends.triton import products, recompute, score, tile_gradients
    from logitless.kernels.tile import factors, targets, unit

    modules = blockwise, factors, products, recompute, score, targets, tile_gradients, unit
    having = [module for module in modules if hasattr(module, name)]
    assert having
    for module in having:
        monkeypatch.setattr(module, name, value)


@pytest.fixture(autouse=True, scope="session")
def rounding_to_bfloat16() -> Iterator[None]:
    """The interpreter cuts float32 off where hardware rounds to bfloat16."""
    if DEVICE.type != "cpu":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    cut_off = builder.cast_impl

    def cast(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cut_off(self, source, to)
        bits = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
        return interpreter.TensorHandle(bits, tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", cast)
        yield
