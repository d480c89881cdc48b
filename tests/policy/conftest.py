"""Fixtures of the tests of policy losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """TRL's ``GRPOTrainer`` of a small model; tests set its attributes."""
    from .trl_trainer import new_trainer

    yield from new_trainer(tmp_path_factory)
