"""Peak extra memory of one step; on a CPU in a process of its own, which ``python -m logitless.bench.memory`` is."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from .cases import Case, make_inputs
from .registry import PROVIDERS, Provider, Work

_TIMEOUT_S = 600
_MARK = "logitless-bench-memory "
_CLEAR_REFS, _STATUS, _MEMINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes above the inputs at the peak of one step, gradients included, or why there is no figure.

    ``fatal``: the step itself failed (out of memory, an error), so there is no point in timing it.
    """

    extra_bytes: int | None
    message: str = ""
    fatal: bool = False


def measure(provider: Provider, case: Case, device: torch.device) -> Memory:
    """Run one step in a new process and read its peak."""
    spec = {
        "provider": provider.name,
        "module": provider.build.__module__,
        "case": case.as_dict(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "logitless.bench.memory", json.dumps(spec)]
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


def _limit_address_space() -> None:
    """Make an allocation that the machine cannot hold fail in here, before the kernel kills something else for it."""
    if not _STATUS.exists():
        return
    limit = _kilobytes(_STATUS, "VmSize") + _kilobytes(_MEMINFO, "MemAvailable")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _kilobytes(account: Path, key: str) -> int:
    """A size from one of Linux's accounts, in bytes."""
    for line in account.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{account} has no {key}")


class _LinuxPeak:
    """The kernel's high-water mark of resident memory, reset at the start.

    ``getrusage`` has no reset, and its value survives ``exec``: a small child of a large parent starts at the parent's peak.
    """

    def __enter__(self) -> _LinuxPeak:
        _CLEAR_REFS.write_text("5")
        self.before = _kilobytes(_STATUS, "VmRSS")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.extra = max(0, _kilobytes(_STATUS, "VmHWM") - self.before)


class _SampledPeak:
    """Where the kernel's mark cannot be reset: resident memory sampled every millisecond by a thread."""

    def __enter__(self) -> _SampledPeak:
        import psutil  # GPUs and most Linux machines do without

        self._process, self._stop = psutil.Process(), threading.Event()
        self.before = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.extra = max(0, self._peak - self.before)


class _CudaPeak:
    """The allocator's own account."""

    def __enter__(self) -> _CudaPeak:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        torch.cuda.synchronize()
        self.extra = torch.cuda.max_memory_allocated() - self.before


def _peak(device: torch.device) -> _CudaPeak | _LinuxPeak | _SampledPeak:
    if device.type == "cuda":
        return _CudaPeak()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return _SampledPeak()
    return _LinuxPeak()


def _return_freed_memory() -> None:
    """Give freed memory back to the system, so that the step cannot take it from the allocator unseen."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc


def measure_here(provider: Provider, case: Case, device: torch.device) -> int:
    """Extra bytes of one step, in this process."""
    if not provider.warm_up:  # imports, threads and the GEMM library's own start-up are no part of a step
        tiny = replace(case, shape=replace(case.shape, pairs=1, tokens=4, hidden=16, vocab=64))
        provider.build(tiny, make_inputs(tiny, device)).step()
    inputs = make_inputs(case, device)
    work: Work = provider.build(case, inputs)
    if provider.warm_up:
        work.step()
    work.prepare()
    return measure_work(work, device)


def measure_work(work: Work, device: torch.device) -> int:
    """Extra bytes of one step of what has been made ready, and has run before."""
    _return_freed_memory()
    with _peak(device) as peak:
        work.step()
    return peak.extra


def main(argv: list[str] | None = None) -> int:
    """The child process: a JSON object of what to run in, one marked JSON line of what came out."""
    spec = json.loads((sys.argv[1:] if argv is None else argv)[0])
    from . import register_all

    register_all()
    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    if spec["provider"] not in PROVIDERS:
        importlib.import_module(spec["module"])
    provider, case = PROVIDERS[spec["provider"]], Case.from_dict(spec["case"])
    if device.type == "cpu":
        _limit_address_space()
    try:
        result = {"extra_bytes": measure_here(provider, case, device)}
    except (Exception, MemoryError) as error:
        from .runner import shorten

        result = {"extra_bytes": None, "message": shorten(error), "fatal": True}  # type: ignore[dict-item]
    print(_MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
