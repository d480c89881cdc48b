"""Tests of Triton's kernels run on a GPU where there is one, and else in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import functools
import inspect
import sys
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
    from logitless.kernels.backends.triton.tuning import lookup
    from logitless.kernels.tile import factors, targets, unit

    modules = blockwise, factors, lookup, products, recompute, score, targets, tile_gradients, unit
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


@pytest.fixture(autouse=True, scope="session")
def languages_patched_once() -> Iterator[None]:
    """Triton's language is patched once per launch: the interpreter does it again for each call of a device function."""
    if DEVICE.type != "cpu":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    patch, patched = interpreter._patch_lang, set()

    @functools.cache
    def languages_of(module: str) -> set[int]:
        """Those that a module's functions see."""
        values = vars(sys.modules[module]).values()
        return {id(value) for value in values if inspect.ismodule(value) and value in (tl, tl.core)}

    class Nothing:
        def restore(self):
            pass

    def patch_once(fn):
        languages = languages_of(fn.__module__)
        if languages <= patched:
            return Nothing()
        outermost = not patched
        patched.update(languages)
        scope = patch(fn)
        if scope is None:  # older versions never restore
            return None
        restore = scope.restore

        def restored():
            restore()
            if outermost:
                patched.clear()

        scope.restore = restored
        return scope

    with pytest.MonkeyPatch.context() as m:
        m.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse=True, scope="module")
def products_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """``make test-blas`` runs the modules marked ``blas``: a matrix product that another one interprets is an error."""
    with pytest.MonkeyPatch.context() as m:
        if DEVICE.type == "cpu" and request.node.get_closest_marker("blas") is None:
            interpreter = pytest.importorskip("triton.runtime.interpreter")
            message = f"{request.node.name} multiplies matrices in the interpreter: mark it with pytest.mark.blas"
            m.setattr(interpreter.InterpreterBuilder, "create_dot", lambda *args: pytest.fail(message))
        yield
