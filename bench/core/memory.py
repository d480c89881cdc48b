"""Peak extra memory of one step. On a CPU a process of its own measures it: ``python -m logitless.bench.core.memory``."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .cases import Case
from .inputs import make_inputs
from .registry import PROVIDERS, Provider
from .rows import shorten

_TIMEOUT_S = 600
_MARK = "logitless-bench-memory "
_CLEAR_REFS, _STATUS, _MEMINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")


class Memory(NamedTuple):
    """Bytes above the inputs at the peak of one step, gradients included, or why there is no figure.

    ``fatal``: the step itself failed (out of memory, an error), so it is not timed.
    """

    extra_bytes: int | None
    message: str = ""
    fatal: bool = False


def measure(provider: Provider, case: Case, device: torch.device) -> Memory:
    """Run one step in a new process and read its peak."""
    spec = {
        "provider": provider.name,
        "module": provider.build.__module__,
        "case": asdict(case),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", __name__, json.dumps(spec)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Memory(None, f"memory: no result in {_TIMEOUT_S} s", fatal=True)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return Memory(**json.loads(line.removeprefix(_MARK)))
    if done.returncode < 0:
        return Memory(None, f"the process was killed by signal {-done.returncode}: most likely out of memory", fatal=True)
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Memory(None, f"memory: the process ended with {done.returncode}: {last}")


def _kilobytes(account: Path, key: str) -> int:
    """A size from one of Linux's accounts, in bytes."""
    found = next(line for line in account.read_text().splitlines() if line.startswith(key))
    return int(found.split()[1]) * 1024


def _limit_address_space() -> None:
    """Make an allocation that is too large for the machine fail in this process, before Linux kills another one for it."""
    if _STATUS.exists():
        limit = _kilobytes(_STATUS, "VmSize") + _kilobytes(_MEMINFO, "MemAvailable")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _peak_of_linux(step: Callable[[], object]) -> int:
    """By the kernel's high-water mark of resident memory, which was just reset.

    ``getrusage`` has no reset, and its value survives ``exec``: a small child of a large parent starts at the parent's peak.
    """
    before = _kilobytes(_STATUS, "VmRSS")
    step()
    return _kilobytes(_STATUS, "VmHWM") - before


def _peak_of_samples(step: Callable[[], object]) -> int:
    """By a thread that samples resident memory every millisecond, where the kernel's mark cannot be reset."""
    import psutil  # not needed on GPUs and most Linux machines

    process, stop = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not stop.wait(0.001):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        step()
    finally:
        stop.set()
        thread.join()
    return max(seen) - seen[0]


def _peak_of_cuda(step: Callable[[], object]) -> int:
    """By the allocator's own account."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Extra bytes at the peak of a step that has run before."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # without glibc
        ctypes.CDLL(None).malloc_trim(0)  # else the step could reuse freed memory unseen
    if device.type == "cuda":
        return _peak_of_cuda(step)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return max(0, _peak_of_samples(step))
    return max(0, _peak_of_linux(step))


def measure_here(provider: Provider, case: Case, device: torch.device) -> int:
    """Extra bytes of one step, in this process."""
    if not provider.warm_up:  # imports, threads and the GEMM library's start-up are not part of a step
        tiny = replace(case, shape=replace(case.shape, pairs=1, tokens=4, hidden=16, vocab=64))
        provider.build(tiny, make_inputs(tiny, device)).step()
    work = provider.build(case, make_inputs(case, device))
    if provider.warm_up:
        work.step()
    work.prepare()
    return peak_bytes(work.step, device)


def main() -> None:
    """The child process: takes a JSON object of what to run, prints one marked JSON line with the result."""
    spec = json.loads(sys.argv[1])
    importlib.import_module(spec["module"])  # registers the provider
    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    if device.type == "cpu":
        _limit_address_space()
    result: dict[str, Any]
    try:
        result = {"extra_bytes": measure_here(PROVIDERS[spec["provider"]], Case.from_dict(spec["case"]), device)}
    except (Exception, MemoryError) as error:
        result = {"extra_bytes": None, "message": shorten(error), "fatal": True}
    print(_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
