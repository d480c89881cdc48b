"""A checked request for a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ..core.blocking import PASS_BUFFERS, core_options
from ..core.checks import DTYPES, check_outputs
from ..core.dtypes import accumulate_dtype, logits_gemm_dtype, tile_dtype
from ..core.settings import current_settings
from ..core.stats import CoreOptions
from ..cost_model.gpu_constants import constants
from ..parallel.vocab_parallel import VocabParallel


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`~logitless.kernels.planner.plan.plan`, checked, with defaults filled in.

    Attributes:
        groups: tokens of each group, largest first.
        budget: memory budget in bytes.
        wanted: token statistics besides the log-probabilities.
        options: what backends are told.
        parallel: the head is sharded; ``vocab_size`` is then that of the largest shard.
    """

    num_tokens: int
    hidden_size: int
    vocab_size: int
    groups: list[int]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    train_hidden: bool
    train_weight: bool
    train_bias: bool
    arbitrary_loss: bool
    margin: bool
    budget: int
    device: torch.device
    wanted: frozenset[str]
    token_groups: bool
    entropy_gradient: bool
    architecture: str | None
    lora_rank: int
    quantized: bool
    options: CoreOptions
    parallel: VocabParallel | None

    @property
    def needs_head(self) -> bool:
        return self.train_weight or self.train_bias

    @property
    def head_elements(self) -> int:
        """Elements of the weight's gradient: that of B alone with an adapter."""
        return self.vocab_size * (self.lora_rank or self.hidden_size)

    @property
    def head_pass(self) -> float:
        """FLOP / (N * H * V) of the product that makes the logits, or dX: the adapter adds r columns."""
        return 2 * (1 + self.lora_rank / self.hidden_size)

    @property
    def gradient_passes(self) -> float:
        """The same for all gradients that are wanted."""
        weight = 2 * self.head_elements / (self.vocab_size * self.hidden_size)
        return self.head_pass * self.train_hidden + weight * self.train_weight

    @property
    def acc(self) -> int:
        """Bytes of an element of the sums."""
        return accumulate_dtype(self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row of the tile."""
        return self.vocab_size * tile_dtype(self.dtype, self.device).itemsize

    @property
    def overhead(self) -> int:
        """Bytes of the budget that are not for tiles."""
        cache = self.options.cache_elements * PASS_BUFFERS * self.acc
        beside = logits_gemm_dtype(self.dtype, self.device, self.options.precision) != tile_dtype(self.dtype, self.device)
        # the logits need a block of their own beside the tile
        return cache + (self.options.workspace if self.device.type == "cuda" or beside else 0)

    @property
    def tile_budget(self) -> int:
        return max(0, self.budget - self.overhead)


def checked_request(
    *,
    num_tokens: int,
    hidden_size: int,
    vocab_size: int,
    group_sizes: Sequence[int] | None,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    train_hidden: bool,
    train_weight: bool,
    train_bias: bool,
    arbitrary_loss: bool,
    margin: bool,
    memory_budget: int | None,
    precision: str | None,
    device: str | torch.device,
    outputs: str | Iterable[str],
    token_groups: bool,
    entropy_gradient: bool,
    architecture: str | None,
    lora_rank: int,
    quantized: bool,
    parallel: VocabParallel | None,
) -> Request:
    """Check the arguments of a plan; each error names the argument."""
    _check_positive(num_tokens=num_tokens, hidden_size=hidden_size, vocab_size=vocab_size)
    if parallel is not None:
        if not isinstance(parallel, VocabParallel):
            raise TypeError(f"parallel must be a logitless.VocabParallel or None, got {type(parallel).__name__}")
        if lora_rank or quantized:
            raise ValueError(f"lora_rank={lora_rank} and quantized={quantized} are not served with parallel")
        vocab_size = -(-vocab_size // parallel.ranks)
    current = current_settings().updated(memory_budget=memory_budget, precision=precision)
    device = torch.device(device)
    _check_architecture(architecture, device)
    if isinstance(lora_rank, bool) or not isinstance(lora_rank, int) or lora_rank < 0:
        raise ValueError(f"lora_rank must be an integer >= 0, got {lora_rank!r}")
    if not isinstance(quantized, bool):
        raise TypeError(f"quantized must be a bool, got {quantized!r}")
    if quantized and not lora_rank and train_weight:
        raise ValueError("train_weight=True, but a quantized weight is frozen unless it has an adapter (lora_rank)")
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    for name, value in (("dtype", dtype), ("weight_dtype", weight_dtype)):
        if value not in DTYPES:
            raise TypeError(f"{name} must be one of {DTYPES}, got {value!r}")
    wanted = check_outputs(outputs) - {"logps"}
    if entropy_gradient:
        wanted |= {"entropy"}
    if token_groups and (group_sizes is not None or arbitrary_loss):
        raise ValueError("token_groups goes without group_sizes and arbitrary_loss")
    groups = [num_tokens] if group_sizes is None else list(group_sizes)
    if any(isinstance(g, bool) or not isinstance(g, int) for g in groups):
        raise TypeError(f"group_sizes must be integers, got {group_sizes!r}")
    groups.sort(reverse=True)
    if sum(groups) != num_tokens or (groups and groups[-1] < 0):
        raise ValueError(f"group_sizes must be >= 0 and add up to num_tokens={num_tokens}, got a sum of {sum(groups)}")
    acc = accumulate_dtype(dtype).itemsize
    given = current.memory_budget, wanted, current.precision, acc, device, current.grad_filter
    options = core_options(*given, current.batch_invariant)
    return Request(
        num_tokens,
        hidden_size,
        vocab_size,
        groups,
        dtype,
        weight_dtype,
        train_hidden,
        train_weight,
        train_bias,
        arbitrary_loss,
        margin,
        current.memory_budget,
        device,
        wanted,
        token_groups,
        entropy_gradient,
        architecture,
        lora_rank,
        quantized,
        replace(options, slopes_later=entropy_gradient),
        parallel,
    )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < (0 if name == "num_tokens" else 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_architecture(architecture: str | None, device: torch.device) -> None:
    if architecture is None:
        return
    if not isinstance(architecture, str) or architecture not in constants():
        raise ValueError(f"architecture must be None or one of {', '.join(constants())}, got {architecture!r}")
    if device.type != "cuda":
        raise ValueError(f"architecture={architecture!r} needs device='cuda', got device={str(device)!r}")
