"""Measured configurations of the GEMM kernels, for ``LOGITLESS_AUTOTUNE=1`` and ``logitless tune``.

The first call with a shape measures some forty candidates on tensors of its own, random numbers of that shape: for some
minutes this takes the memory of the hidden states and of the weight once more, ``GRADIENT_BYTES`` for a gradient, and on a
GPU a buffer of some 256 MiB that empties the L2 cache between measurements. ``logitless tune`` does it before a job.

The winner goes to a file of :func:`configs.cache_folder`, one for each shape, and whoever finds that file takes what is in it.
Of processes that measure at one time, the first to finish decides for all that share the folder. Ranks of a distributed job
that do not share it (other machines) may choose differently, which changes the last bits of log-probabilities from rank to
rank: let ``LOGITLESS_CACHE_DIR`` name a shared folder, or tune beforehand and export into the table.

What is computed (a gradient or none, which statistics) is no part of the key: a policy and its reference get one
configuration for one number of tokens. Another number, rounded up to a power of 2, may get another: where a policy's tile
holds fewer tokens than the reference's batch, their last bits may differ.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources, PTXASError

from ....core.dtypes import tile_dtype
from ....core.head_spec import HeadSpec
from ....core.stats import OPTIONAL_OUTPUTS, CoreOptions
from ..compat import interpreted, on_device
from ..gemm.launch import STATS, gradient_block, input_precision, score_block
from ..rows import target_logit_and_slope
from .configs import GemmConfig, architecture_of, cache_folder, config_of, operand_bits, pick, table

log = logging.getLogger("logitless")

#: Fewer tokens are one block whatever they are; from the larger number on, all that changes is how often the same is done.
LEAST_TOKENS, MOST_TOKENS = 16, 16384
#: Of the gradient that is written while measuring. Where all tokens' would be larger, fewer take part and the time is scaled.
GRADIENT_BYTES = 512 << 20
#: Candidates of a shape. A search stops by itself after 20 to 40.
LIMIT = 48
#: A candidate must be faster by this part to replace another: measurements of one kernel differ by nearly as much.
GAIN = 0.01
#: By how much a candidate's log-probabilities may differ from the table's: rounding is far below it, a wrong block far above.
TOLERANCE = 1e-4
#: Milliseconds for which a kernel is run before, and while, it is measured.
WARM_UP, REPEAT = 25, 150
#: plan.py reckons with partial sums of no more tokens at a time.
MOST_BLOCK_N = 128
#: Elements of a block that a thread holds in registers; more would spill in the epilogue.
ELEMENTS = range(16, 129)
#: Whose code decides what is fast.
SOURCES = ("gemm/kernels.py", "gemm/epilogue.py", "math.py", "gemm/combine.py", "gemm/launch.py")


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen for: the sizes that decide how fast it is. Nothing of what is computed."""

    device: torch.device
    dtype: torch.dtype
    num_tokens: int  # see bucket
    hidden_size: int
    vocab_size: int
    softcap: bool

    @property
    def architecture(self) -> str:
        return architecture_of(self.device)

    def starts(self) -> list[GemmConfig]:
        """The table's configuration, and those that it has for other numbers of tokens."""
        configs = table()[self.architecture][operand_bits(self.dtype)]
        return list(dict.fromkeys(replace(c, max_tokens=None) for c in (pick(configs, self.num_tokens), *configs)))

    def key(self) -> dict[str, Any]:
        """What a cached configuration holds for."""
        return {
            "triton": triton.__version__,
            "kernels": _sources(),
            "device": device_name(self.device),
            "architecture": self.architecture,
            "operand_bits": operand_bits(self.dtype),
            # products of TF32 take other resources than single ones
            "precision": input_precision(self.dtype, self.device),
            "num_tokens": self.num_tokens,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "softcap": self.softcap,
        }

    def path(self) -> Path:
        """Of the file that caches its configuration."""
        key = self.key()
        folder = re.sub(r"[^\w.]+", "-", f"triton-{key['triton']}-{key['kernels']}-{key['device']}")
        name = f"{self.architecture}-{key['operand_bits']}-{key['precision']}-n{self.num_tokens}-h{self.hidden_size}"
        return cache_folder() / folder / f"{name}-v{self.vocab_size}{'-softcap' if self.softcap else ''}.json"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a configuration: the logits' pass alone, and with the gradient written."""

    config: GemmConfig
    forward: float
    gradient: float

    @property
    def total(self) -> float:
        return self.forward + self.gradient


#: Called with a problem and candidates that are measured next.
Prepare = Callable[[Problem, Sequence[GemmConfig]], None]


def bucket(num_tokens: int) -> int:
    """The number of tokens that stands for so many: a power of 2."""
    return min(MOST_TOKENS, max(LEAST_TOKENS, triton.next_power_of_2(num_tokens)))


@functools.cache
def device_name(device: torch.device) -> str:
    return "interpreter" if interpreted() else torch.get_device_module(device).get_device_name(device)


@functools.cache
def _sources() -> str:
    """A digest of the kernels: a configuration measured with others means nothing."""
    folder = Path(__file__).parents[1]
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:12]


_lock = threading.Lock()
_known: dict[Path, GemmConfig] = {}


def tuned_config(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int, vocab_size: int, softcap: bool
) -> GemmConfig:
    """The best configuration for a shape: from this process, from the cache's file, or measured now.

    Raises:
        RuntimeError: when no candidate runs, one is miscompiled, or a CUDA graph is being captured.
        ValueError: naming the file, when the cache holds something else.
    """
    problem = Problem(device, dtype, bucket(num_tokens), hidden_size, vocab_size, softcap)
    path = problem.path()
    found = _known.get(path)
    if found is not None:
        return found
    with _lock:  # backward passes ask from threads of their own
        found = _known.get(path) or read(path, problem)
        if found is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{problem} has no cached configuration, and nothing can be measured while a CUDA graph is captured: run "
                    "the step once before, or `logitless tune`, or unset LOGITLESS_AUTOTUNE"
                )
            log.info("measuring configurations of the Triton kernels for %s", problem)
            best = search(Workload(problem))[0]
            found = store(path, problem, best)
        _known[path] = found
    return found


def read(path: Path, problem: Problem) -> GemmConfig | None:
    """The configuration in a file of the cache; ``None`` where there is no file.

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
    except ValueError as error:  # errors of JSON and of UTF-8 are such
        raise ValueError(
            f"{path} is not a configuration that logitless has cached ({error}): delete it, or let LOGITLESS_CACHE_DIR name "
            "another folder"
        ) from error


def store(path: Path, problem: Problem, best: Timing, *, overwrite: bool = False) -> GemmConfig:
    """Write a file of the cache, whole or not at all. Returns what holds from now on: what another process wrote before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    milliseconds = {"forward": best.forward, "gradient": best.gradient}
    entry = {"key": problem.key(), "config": asdict(best.config), "milliseconds": milliseconds}
    try:
        draft.write_text(json.dumps(entry, indent=2) + "\n")
        if overwrite:
            draft.replace(path)
            return best.config
        os.link(draft, path)  # unlike a rename, fails where the file is there: the first decides
    except FileExistsError:
        found = read(path, problem)
        return best.config if found is None else found
    finally:
        draft.unlink(missing_ok=True)
    return best.config


def candidates(config: GemmConfig, tma: bool) -> Iterator[GemmConfig]:
    """What differs from a configuration in one respect; ``tma``: whether the architecture has it.

    BLOCK_V, BLOCK_H and the PARTs stay: the order in which exponentials are added depends on them, and what plan.py sets
    aside for partial sums.
    """
    for block_n in (config.BLOCK_N // 2, config.BLOCK_N, 2 * config.BLOCK_N):
        for num_warps in (4, 8):
            if 16 <= block_n <= MOST_BLOCK_N and block_n * config.BLOCK_V // (32 * num_warps) in ELEMENTS:
                yield replace(config, BLOCK_N=block_n, num_warps=num_warps)
    for by_descriptor in (False, True) if tma else (False,):
        for flatten in (False, True):
            yield replace(config, tma=by_descriptor, flatten=flatten)
    for num_stages in (config.num_stages - 1, config.num_stages + 1):
        if 2 <= num_stages <= 6:
            yield replace(config, num_stages=num_stages)
    for programs in (config.programs_per_sm - 1, config.programs_per_sm + 1):
        if 1 <= programs <= 3:
            yield replace(config, programs_per_sm=programs)
    for group in (config.GROUP // 2, 2 * config.GROUP):
        if 1 <= group <= 64:
            yield replace(config, GROUP=group)


class Workload:
    """Random tensors of a problem's shape, and the kernels on them. Leaves torch's generators alone."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n, hidden, vocab = problem.num_tokens, problem.hidden_size, problem.vocab_size
        device, dtype = problem.device, problem.dtype
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn((n, hidden), dtype=dtype, device=device, generator=generator)
        # logits of standard deviation 1: how much a GPU is throttled depends on the numbers
        self.weight = torch.randn((vocab, hidden), dtype=dtype, device=device, generator=generator).mul_(hidden**-0.5)
        self.labels = torch.randint(vocab, (n,), device=device, generator=generator)
        self.head = HeadSpec(softcap=30.0 if problem.softcap else None)
        self.zy, self.k, _ = target_logit_and_slope(self.x, self.weight, None, self.labels, "auto", self.head)
        tile = tile_dtype(dtype, device)
        fit = GRADIENT_BYTES // (vocab * tile.itemsize) // MOST_BLOCK_N * MOST_BLOCK_N
        self.rows = min(n, max(MOST_BLOCK_N, fit))
        self.tile = torch.empty((self.rows, vocab), dtype=tile, device=device)
        self.expected: Tensor | None = None

    def _score(self, config: GemmConfig, gradient: Tensor | None) -> Tensor:
        """logps (N,), with a gradient those of its rows."""
        n = len(self.x if gradient is None else gradient)
        stats = torch.empty((len(STATS), n), dtype=torch.float32, device=self.x.device)
        score_block(
            self.x[:n], self.weight, None, self.labels[:n], self.zy[:n], self.k[:n].clone(), None, stats, None,
            self.head, CoreOptions(), config, first=0, vocab_size=len(self.weight), gradient=gradient,
        )  # fmt: skip
        return stats[0]

    def _milliseconds(self, run: Callable[[], Any]) -> float:
        """The median of several runs, each with an empty L2 cache; one run in the interpreter, which times nothing real."""
        if self.x.device.type == "cpu":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        with on_device(self.x):
            return float(triton.testing.do_bench(run, warmup=WARM_UP, rep=REPEAT, return_mode="median"))

    def measure(self, config: GemmConfig) -> Timing | None:
        """``None`` where it does not compile, or takes more than the GPU has.

        Raises:
            RuntimeError: when its log-probabilities are wrong.
        """
        try:
            self._check(config, self._score(config, None))
            self._check(config, self._score(config, self.tile))
            forward = self._milliseconds(lambda: self._score(config, None))
            gradient = self._milliseconds(lambda: self._score(config, self.tile))
        except (TritonError, RuntimeError) as error:
            if not _is_unusable(error):
                raise
            _log_skipped(config, error)
            return None
        log.debug("%s takes %.3f ms, with a gradient of %d tokens %.3f ms", config, forward, self.rows, gradient)
        return Timing(config, forward, gradient * len(self.x) / self.rows)

    def _check(self, config: GemmConfig, logps: Tensor) -> None:
        if self.expected is None:  # of the table's configuration, where a search starts
            self.expected = logps
        error = (logps - self.expected[: len(logps)]).abs().max().item()
        if not error <= TOLERANCE:  # nor NaN
            raise RuntimeError(f"{config} is miscompiled: its log-probabilities differ from the table's by {error:.2g}")

    def serves(self, config: GemmConfig) -> bool:
        """Whether the kernels fit with everything that they can be asked for, which takes more than what is measured."""
        n, device = self.rows, self.x.device
        options = CoreOptions(frozenset(OPTIONAL_OUTPUTS), grad_filter=1e-9)
        stats = torch.empty((len(STATS), n), dtype=torch.float32, device=device)
        is_top1 = torch.empty(n, dtype=torch.bool, device=device)
        bias = torch.zeros(len(self.weight), dtype=self.x.dtype, device=device)
        k, ones = self.k[:n].clone(), torch.ones((2, n), dtype=torch.float32, device=device)
        x, labels, zy = self.x[:n], self.labels[:n], self.zy[:n]
        try:
            for tile in (None, self.tile):
                score_block(
                    x, self.weight, bias, labels, zy, k, None, stats, is_top1, self.head, options, config,
                    first=0, vocab_size=len(self.weight), gradient=tile,
                )  # fmt: skip
            gradient_block(
                x, self.weight, bias, labels, k, ones, ones[0], ones[1], self.tile, self.head, options, config, first=0
            )
        except (TritonError, RuntimeError) as error:
            if not _is_unusable(error):
                raise
            _log_skipped(config, error)
            return False
        return True

    def mm_milliseconds(self) -> float:
        """Of the vendor's GEMM that makes the same logits, and writes them."""
        out = torch.empty((len(self.x), len(self.weight)), dtype=self.x.dtype, device=self.x.device)
        torch.mm(self.x, self.weight.t(), out=out)
        return self._milliseconds(lambda: torch.mm(self.x, self.weight.t(), out=out))


def _is_unusable(error: Exception) -> bool:
    """Whether Triton can make no kernel of a configuration. Any other error is one."""
    if isinstance(error, (OutOfResources, CompilationError, PTXASError)):
        return True
    # a pass of the compiler that fails has no error of its own
    return type(error) is RuntimeError and "PassManager::run failed" in str(error)


def _log_skipped(config: GemmConfig, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    log.debug("%s is skipped: %s: %s", config, type(error).__name__, lines[0])


def compile_for(problem: Problem, config: GemmConfig) -> None:
    """Compile what :meth:`Workload.measure` runs of a configuration into Triton's cache, on tensors too small to matter.

    Nothing of the number of tokens and of entries goes into a kernel, so those for fewer of them are the same.
    """
    workload = Workload(replace(problem, num_tokens=MOST_BLOCK_N, vocab_size=2 * config.BLOCK_V + problem.vocab_size % 16))
    for gradient in (None, workload.tile):
        workload._score(config, gradient)


def _compile_quietly(task: tuple[Problem, GemmConfig]) -> None:
    with contextlib.suppress(Exception):  # whoever measures it meets the error, and says so
        compile_for(*task)


@contextlib.contextmanager
def compilers(jobs: int) -> Iterator[Prepare]:
    """Processes that compile candidates side by side before one process measures them: a kernel takes seconds to compile, and a
    search needs some eighty.
    """
    # a forked process would inherit CUDA in whatever state it is
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:

        def prepare(problem: Problem, configs: Sequence[GemmConfig]) -> None:
            list(pool.map(_compile_quietly, [(problem, config) for config in configs]))

        yield prepare


def search(workload: Workload, deadline: float | None = None, prepare: Prepare | None = None) -> list[Timing]:
    """Every candidate that runs; the first is the one to take, the others follow from fast to slow.

    Starts from the table's configurations, and goes on from the best so far until nothing near it is better.

    Args:
        workload: what is measured.
        deadline: of ``time.monotonic()``, after which the best so far is taken.
        prepare: told of candidates before they are measured, see :func:`compilers`.

    Raises:
        RuntimeError: when none runs.
    """
    problem = workload.problem
    starts = problem.starts()
    tma = any(c.tma for configs in table()[problem.architecture].values() for c in configs)
    done: dict[GemmConfig, Timing | None] = {}
    best: Timing | None = None
    queue = [*starts, *candidates(starts[0], tma)]
    prepared: set[GemmConfig] = set()
    while queue and len(done) < LIMIT:
        if best is not None and deadline is not None and time.monotonic() > deadline:
            break
        config = queue.pop(0)
        if config in done:
            continue
        if prepare is not None and config not in prepared:
            wave = [c for c in dict.fromkeys((config, *queue)) if c not in prepared and c not in done]
            prepare(problem, wave)
            prepared.update(wave)
        timing = done[config] = workload.measure(config)
        if timing is not None and (best is None or timing.total < (1 - GAIN) * best.total):
            best = timing
            queue = [*starts, *candidates(config, tma)]
    ranked = sorted((t for t in done.values() if t is not None), key=lambda t: t.total)
    for timing in [best, *ranked] if best is not None else []:
        if workload.serves(timing.config):
            return [timing, *(t for t in ranked if t is not timing)]
    raise RuntimeError(f"none of {len(done)} configurations runs for {problem}; DEBUG lines of the logger 'logitless' say why")
