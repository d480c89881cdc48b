"""Fixtures of the tests of preference losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """A trainer of TRL for a task and a model, made once; tests set its attributes."""
    from .trl_trainers import trainers

    yield from trainers(tmp_path_factory)
