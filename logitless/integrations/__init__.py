"""Adapters for trainers, one file each. None is imported, nor its trainer, before it is asked for by name."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("liger", "trl")

__all__ = ["liger", "trl"]


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_MODULES)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
