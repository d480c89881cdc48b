"""Measurement of one configuration: the kernels on random tensors of a problem's shape."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
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
from ..compat import on_device
from ..gemm.combine import STATS
from ..gemm.config import GemmConfig
from ..gemm.launch import recompute_block, score_block
from ..predict import PARTIAL_BLOCK
from ..targets import target_logit_and_slope
from .problem import Problem, Timing

log = logging.getLogger("logitless")

#: The most bytes of the gradient that a measurement writes. A larger one is measured on fewer tokens, and the time scaled.
GRADIENT_BYTES = 512 << 20
#: The most by which a candidate's log-probabilities may differ from the table's: far above rounding, far below a wrong block.
TOLERANCE = 1e-4
#: Milliseconds for which a kernel runs before, and during, its measurement.
WARM_UP, REPEAT = 25, 150
#: The most tokens per block: memory is reserved for the partial sums of no more.
MOST_BLOCK_N = PARTIAL_BLOCK


class Workload:
    """Random tensors of a problem's shape, and the kernels on them. Does not touch torch's global generators."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n, hidden, vocab = problem.num_tokens, problem.hidden_size, problem.vocab_size
        device, dtype = problem.device, problem.dtype
        generator = torch.Generator(device).manual_seed(0)
        self.x = torch.randn((n, hidden), dtype=dtype, device=device, generator=generator)
        # logits of standard deviation 1, since the numbers influence how far a GPU throttles
        self.weight = torch.randn((vocab, hidden), dtype=dtype, device=device, generator=generator).mul_(hidden**-0.5)
        self.labels = torch.randint(vocab, (n,), device=device, generator=generator)
        self.head = HeadSpec(softcap=30.0 if problem.softcap else None)
        self.zy, self.k, _ = target_logit_and_slope(self.x, self.weight, None, self.labels, "auto", self.head)
        tile = tile_dtype(dtype, device)
        fit = GRADIENT_BYTES // (vocab * tile.itemsize) // MOST_BLOCK_N * MOST_BLOCK_N
        self.rows = min(n, max(MOST_BLOCK_N, fit))
        self.tile = torch.empty((self.rows, vocab), dtype=tile, device=device)
        self.expected: Tensor | None = None  # log-probabilities of the first configuration

    def score(self, config: GemmConfig, gradient: Tensor | None) -> Tensor:
        """logps (N,); with a gradient, of its rows alone."""
        n = len(self.x if gradient is None else gradient)
        stats = torch.empty((len(STATS), n), dtype=torch.float32, device=self.x.device)
        score_block(
            self.x[:n], self.weight, None, self.labels[:n], self.zy[:n], self.k[:n].clone(), None, stats, None,
            self.head, CoreOptions(), config, first=0, vocab_size=len(self.weight), gradient=gradient,
        )  # fmt: skip
        return stats[0]

    def _milliseconds(self, run: Callable[[], Any]) -> float:
        """The median of several runs, each with an empty L2 cache; of one run in the interpreter."""
        if self.x.device.type == "cpu":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        with on_device(self.x):
            return float(triton.testing.do_bench(run, warmup=WARM_UP, rep=REPEAT, return_mode="median"))

    def measure(self, config: GemmConfig) -> Timing | None:
        """Milliseconds of a configuration; ``None`` if it does not compile or needs more than the GPU has.

        Raises:
            RuntimeError: when its log-probabilities are wrong.
        """
        try:
            self._check(config, self.score(config, None))
            self._check(config, self.score(config, self.tile))
            forward = self._milliseconds(lambda: self.score(config, None))
            gradient = self._milliseconds(lambda: self.score(config, self.tile))
        except (TritonError, RuntimeError) as error:
            if not _is_unusable(error):
                raise
            _log_skipped(config, error)
            return None
        log.debug("%s takes %.3f ms, with a gradient of %d tokens %.3f ms", config, forward, self.rows, gradient)
        return Timing(config, forward, gradient * len(self.x) / self.rows)

    def _check(self, config: GemmConfig, logps: Tensor) -> None:
        if self.expected is None:  # the search starts with the table's configuration
            self.expected = logps
        error = (logps - self.expected[: len(logps)]).abs().max().item()
        if not error <= TOLERANCE:  # false for NaN too
            raise RuntimeError(f"{config} is miscompiled: its log-probabilities differ from the table's by {error:.2g}")

    def serves(self, config: GemmConfig) -> bool:
        """Whether the kernels also fit with all statistics and a filtered gradient, which need more than what is measured."""
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
            recompute_block(
                x, self.weight, bias, labels, k, ones, ones[0], ones[1], self.tile, self.head, options, config, first=0
            )
        except (TritonError, RuntimeError) as error:
            if not _is_unusable(error):
                raise
            _log_skipped(config, error)
            return False
        return True

    def mm_milliseconds(self) -> float:
        """Milliseconds of the vendor's GEMM that computes and writes the same logits."""
        out = torch.empty((len(self.x), len(self.weight)), dtype=self.x.dtype, device=self.x.device)
        torch.mm(self.x, self.weight.t(), out=out)
        return self._milliseconds(lambda: torch.mm(self.x, self.weight.t(), out=out))


def _is_unusable(error: Exception) -> bool:
    """Whether the error means that Triton cannot compile or launch a configuration. Others are raised."""
    if isinstance(error, (OutOfResources, CompilationError, PTXASError)):
        return True
    # a failed pass of the compiler has no exception class of its own
    return type(error) is RuntimeError and "PassManager::run failed" in str(error)


def _log_skipped(config: GemmConfig, error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    log.debug("%s is skipped: %s: %s", config, type(error).__name__, lines[0])
