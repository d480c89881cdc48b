"""Measured configurations on disk: one file per problem."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path

from ..gemm.config import GemmConfig
from .configs import config_of
from .problem import Problem, Timing


def read(path: Path, problem: Problem) -> GemmConfig | None:
    """The configuration in a file of the cache; ``None`` if there is no file.

    Raises:
        ValueError: naming the file, when it is not what :func:`store` writes for the problem.
    """
    try:
        entry = json.loads(path.read_text())
        if not isinstance(entry, dict) or entry.get("key") != problem.key() or not isinstance(entry.get("config"), dict):
            raise ValueError(f"it has no configuration for {problem.key()}")
        return config_of(entry["config"])
    except FileNotFoundError:
        return None
    except ValueError as error:  # as are the errors of JSON and of UTF-8
        raise ValueError(
            f"{path} is not a configuration that logitless has cached ({error}): delete it, or let LOGITLESS_CACHE_DIR name "
            "another folder"
        ) from error


def store(path: Path, problem: Problem, best: Timing, *, overwrite: bool = False) -> GemmConfig:
    """Write a file of the cache atomically. Returns the valid configuration: another process's, if its file came first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    milliseconds = {"forward": best.forward, "gradient": best.gradient}
    entry = {"key": problem.key(), "config": asdict(best.config), "milliseconds": milliseconds}
    try:
        draft.write_text(json.dumps(entry, indent=2) + "\n")
        if overwrite:
            draft.replace(path)
            return best.config
        os.link(draft, path)  # unlike a rename, fails if the file exists: the first one counts
    except FileExistsError:
        found = read(path, problem)
        return best.config if found is None else found
    finally:
        draft.unlink(missing_ok=True)
    return best.config
