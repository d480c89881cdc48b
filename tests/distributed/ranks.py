"""Runs a function on several ranks of ``torch.distributed`` (gloo), in processes forked from this one.

Forked processes have every module imported already, so a group of two starts in a few milliseconds. A test should put many
cases into one function.
"""

from __future__ import annotations

import datetime
import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """``[fn(0, *args), fn(1, *args), ...]``, each on its own rank of a default process group.

    Args:
        world_size: number of ranks.
        fn: called as ``fn(rank, *args)``; its result must be loadable by ``torch.load``.
        timeout: seconds until ranks that still run are killed. Collectives fail after half of that.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or the ranks that did not finish in time. Other
            ranks, which may wait for the failed one, are killed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        pipes, processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(there, store, rank, world_size, timeout, fn, args), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {[pipes.index(pipe) for pipe in waiting]} did not finish in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                failure, payload = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without a result: a crash, such as a segmentation fault") from None
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{payload}")
            results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, store: str, rank: int, world_size: int, timeout: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout / 2),
        )
        buffer = io.BytesIO()
        torch.save(fn(rank, *args), buffer)
        pipe.send((False, buffer.getvalue()))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # neither pytest's own exit handlers nor the destructors of the process group
