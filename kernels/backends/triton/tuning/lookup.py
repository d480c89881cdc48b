"""The configuration for a shape: from the table or, with ``LOGITLESS_AUTOTUNE=1``, from measurements.

The first call with a shape measures about forty candidates, for some minutes, on random tensors of that shape. These take the
memory of the hidden states and of the weight once more, ``GRADIENT_BYTES`` for a gradient and, on a GPU, a buffer of about
256 MiB that empties the L2 cache between measurements. ``logitless tune`` does it before a job.

The result goes to a file of :func:`configs.cache_folder`, one per shape, which later processes read. If several processes
measure at the same time, the first to finish decides for all that share the folder. Ranks of a distributed job that do not
share it (other machines) may choose differently, and the last bits of log-probabilities then differ between ranks: point
``LOGITLESS_CACHE_DIR`` to a shared folder, or tune beforehand and export into the table.

The key does not contain what is computed (a gradient or none, which statistics), so a policy and its reference get the same
configuration for the same number of tokens. Another number, rounded up to a power of 2, may get another one: if a policy's
tile holds fewer tokens than the reference's batch, their last bits may differ, unless ``settings(batch_invariant=True)``.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch
from torch import Tensor

from ....core.blocking import INVARIANT_TOKENS
from ....core.head_spec import HeadSpec
from ....core.stats import CoreOptions
from ..gemm.config import GemmConfig
from .cache import read, store
from .configs import architecture_of, autotuning, operand_bits, pick, table
from .problem import Problem, bucket
from .search import search
from .workload import Workload

log = logging.getLogger("logitless")


def gemm_config(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int, vocab_size: int, softcap: bool
) -> GemmConfig:
    """The kernels' configuration for hidden states of that dtype and shape. Measures nothing unless :func:`autotuning`."""
    if autotuning():
        return tuned_config(device, dtype, num_tokens, hidden_size, vocab_size, softcap)
    return pick(table()[architecture_of(device)][operand_bits(dtype)], num_tokens)


def config_of(
    x: Tensor,  # (N, H)
    vocab: int,
    head: HeadSpec,
    options: CoreOptions,
) -> GemmConfig:
    """:func:`gemm_config` for a call; with ``batch_invariant`` that of one number of tokens, whatever N."""
    tokens = INVARIANT_TOKENS if options.batch_invariant else len(x)
    return gemm_config(x.device, x.dtype, tokens, x.shape[1], vocab, head.softcap is not None)


_lock = threading.Lock()
_known: dict[Path, GemmConfig] = {}


def tuned_config(
    device: torch.device, dtype: torch.dtype, num_tokens: int, hidden_size: int, vocab_size: int, softcap: bool
) -> GemmConfig:
    """The best configuration for a shape: known to this process, read from its file, or measured now.

    Raises:
        RuntimeError: when no candidate runs, one is miscompiled, or a CUDA graph is being captured.
        ValueError: naming the file, when the cached file is not valid for the shape.
    """
    problem = Problem(device, dtype, bucket(num_tokens), hidden_size, vocab_size, softcap)
    path = problem.path()
    found = _known.get(path)
    if found is not None:
        return found
    with _lock:  # backward passes run in threads of their own
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
