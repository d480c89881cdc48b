"""``logitless env``: versions, devices and backends, with every reason why one is unavailable. Needs nothing but Python."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

#: Distribution and module of every package that the library, its integrations or its benchmark can use.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "transformers": "transformers",
    "trl": "trl",
    "liger-kernel": "liger_kernel",
    "cut-cross-entropy": "cut_cross_entropy",
    "quack-kernels": "quack",
    "flash-attn": "flash_attn",
    "peft": "peft",
    "datasets": "datasets",
    "matplotlib": "matplotlib",
    "rich": "rich",
}


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _package(distribution: str, module: str) -> str:
    """Its version; with the error, when it is installed but does not import."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    except Exception as error:  # a report must survive broken metadata too
        version = f"unknown version ({_one_line(error)})"
    try:
        importlib.import_module(module)
    except BaseException as error:  # an import may raise anything at all
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{version}, broken: {_one_line(error)}"
    return str(version)


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB"
    else:
        devices["cuda"] = f"unavailable (torch built for CUDA {torch.version.cuda})"
    return devices


def _backends() -> dict[str, str]:
    from logitless import available_backends
    from logitless.kernels.backends.triton.tuning.configs import autotuning, cache_folder
    from logitless.kernels.operators import loading

    states = {
        name: "available" if not reasons else "unavailable: " + "; ".join(reasons)
        for name, reasons in available_backends().items()
    }
    if not loading.why_no_cpu_extension():
        gemm = "bfloat16 by" if loading.has_bf16_gemm() else "no bfloat16 by"
        states["cpu"] += f" ({loading.cpu_instruction_set()}; {gemm} oneDNN's small GEMM)"
    if states["triton"] == "available":
        chosen = f"measured once, cached in {cache_folder()}" if autotuning() else "from the table, LOGITLESS_AUTOTUNE is not 1"
        states["triton"] += f" (configurations {chosen})"
    return states


def report() -> dict[str, Any]:
    """Everything that a bug report needs, by section. A section that fails is reported as failed; the others are kept."""
    sections: dict[str, Any] = {
        "python": f"{sys.version.split()[0]} on {platform.platform()}",
        "packages": {"logitless": _version(), **{d: _package(d, m) for d, m in PACKAGES.items()}},
    }
    for name, collect in (("devices", _devices), ("backends", _backends)):
        try:
            sections[name] = collect()
        except Exception as error:
            sections[name] = {"error": _one_line(error)}
    sections["variables"] = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("LOGITLESS_", "OMP_", "CUDA_VIS"))}
    return sections


def _version() -> str:
    try:
        return importlib.metadata.version("logitless")
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a distribution"


def render(sections: dict[str, Any]) -> str:
    """The report as text."""
    lines = []
    for section, content in sections.items():
        if isinstance(content, dict):
            lines.append(f"{section}:")
            width = max((len(k) for k in content), default=0)
            lines += [f"  {key:<{width}}  {value}" for key, value in content.items()]
        else:
            lines.append(f"{section}: {content}")
    return "\n".join(lines)
