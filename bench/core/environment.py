"""What a run was made with: versions, machine and commit."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import logitless as ll

_PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "numpy")


def _installed(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of this machine."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _cores() -> int | None:
    """Physical cores, where psutil can tell."""
    with contextlib.suppress(ImportError):
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count()
    return os.cpu_count()


def _output(*command: str) -> str | None:
    """What a command prints; ``None`` where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git(*arguments: str) -> str | None:
    return _output("git", *arguments)


def nvidia_smi(query: str) -> str | None:
    """One property of the first GPU from the driver's tool, without its unit; ``None`` where it reports none."""
    value = (_output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits") or "").split("\n")[0].strip()
    return None if not value or value.startswith("[") else value  # [N/A], [Not Supported]


def driver_version() -> str | None:
    """Of NVIDIA's driver, from its tool or else from Linux's account of the module; ``None`` if neither is there."""
    account = Path("/proc/driver/nvidia/version")
    if (found := nvidia_smi("driver_version")) is None and account.exists():
        match = re.search(r"Module.*?\s(\d+\.\d[\d.]*)\s", account.read_text())
        found = match[1] if match else None
    return found


def where(device: torch.device) -> str:
    """The device in a few words, for figures."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
        "sm_count": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit: git's, or ``LOGITLESS_COMMIT`` where the sources are not a checkout."""
    status = _git("status", "--porcelain")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("LOGITLESS_COMMIT"),
        "uncommitted_changes": None if status is None else bool(status),
        "device": device.type,
        "machine": {
            "cpu": _cpu_model(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "memory_bytes": _memory(),
            "gpu": _gpu(device) if device.type == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "logitless": ll.__version__,
            **{name: _installed(name) for name in _PACKAGES},
            "torch": torch.__version__,  # with its build variant, which a package's metadata may leave out
        },
    }
