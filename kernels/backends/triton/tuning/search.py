"""The search for the fastest configuration of a problem."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from ..gemm.config import GemmConfig
from .configs import table
from .problem import Problem, Timing
from .workload import MOST_BLOCK_N, Workload

#: The most candidates per problem. A search usually ends after 20 to 40.
LIMIT = 48
#: The relative gain in time for which a candidate replaces another: repeated measurements differ by nearly as much.
GAIN = 0.01
#: Elements of a block per thread; with more, registers would spill in the epilogue.
ELEMENTS = range(16, 129)

#: Called with a problem and candidates that are measured next.
Prepare = Callable[[Problem, Sequence[GemmConfig]], None]


def candidates(config: GemmConfig, tma: bool) -> Iterator[GemmConfig]:
    """The configurations that differ in one respect from the given one; ``tma``: whether the architecture has it.

    BLOCK_V, BLOCK_H and the PARTs stay: they determine the order in which exponentials are added, and the memory that
    predict.py reserves for partial sums.
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


def compile_for(problem: Problem, config: GemmConfig) -> None:
    """Compile what :meth:`Workload.measure` runs into Triton's cache, on small tensors.

    Kernels do not depend on the numbers of tokens and vocabulary entries, so these are the ones that will be measured.
    """
    workload = Workload(replace(problem, num_tokens=MOST_BLOCK_N, vocab_size=2 * config.BLOCK_V + problem.vocab_size % 16))
    for gradient in (None, workload.tile):
        workload.score(config, gradient)


def _compile_quietly(task: tuple[Problem, GemmConfig]) -> None:
    with contextlib.suppress(Exception):  # the measurement meets the same error, and handles it
        compile_for(*task)


@contextlib.contextmanager
def compilers(jobs: int) -> Iterator[Prepare]:
    """Processes that compile candidates in parallel before one process measures them: a kernel takes seconds to compile, and a
    search needs about eighty.
    """
    # a forked process would inherit CUDA in an undefined state
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:

        def prepare(problem: Problem, configs: Sequence[GemmConfig]) -> None:
            list(pool.map(_compile_quietly, [(problem, config) for config in configs]))

        yield prepare


def search(workload: Workload, deadline: float | None = None, prepare: Prepare | None = None) -> list[Timing]:
    """Every candidate that runs: first the one to use, then all others from fast to slow.

    Starts from the table's configurations and continues around the best one until no neighbour of it is faster.

    Args:
        workload: what is measured.
        deadline: time of ``time.monotonic()`` after which the best so far is used.
        prepare: called with candidates before they are measured, see :func:`compilers`.

    Raises:
        RuntimeError: when no candidate runs.
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
