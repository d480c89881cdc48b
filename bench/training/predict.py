"""Predicted time of a step on a GPU, from FLOP and bytes; printed beside what is measured.

The decoders take their FLOP at a share of the GPU's GEMM rate (``DECODER_SHARE``, assumed: transformers runs norms, rotations
and activations as separate kernels), the optimizer its bytes, and our head the time of its cost model. TRL's fused head takes
8 N H V FLOP (frozen 6) and, in tiles of 4096 tokens, the bytes of its logits and of its float32 sums; its trainers without one
take 6 N H V (4) on every position, and ``WHOLE_LOGITS_BYTES`` per entry of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import logitless as ll
from logitless.kernels.cost_model.gpu_constants import Gpu, constants

from .batches import Batch
from .cases import TrainCase, case_batch
from .methods import METHODS
from .models import MODELS, make_config

#: Share of the GPU's GEMM rate that a Hugging Face decoder reaches. Assumed.
DECODER_SHARE = 0.4
#: Bytes that plain PyTorch moves per entry of whole logits, forward and backward: written in bfloat16, copied, shifted,
#: widened, normalised, and back. Counted from the code of TRL's CPOTrainer and ORPOTrainer, not measured.
WHOLE_LOGITS_BYTES = 40
#: Bytes of AdamW in bfloat16 per trained parameter: itself, its gradient, two moments, and clipping's norm and scaling.
_OPTIMIZER_BYTES = 20
#: Of TRL's fused head.
_TRL_TOKENS, _TRL_VOCAB = 4096, 32768


@dataclass(frozen=True)
class Prediction:
    """Seconds of the parts of a step, by arm. ``head_bytes``: at the head's peak, by arm, where they are known."""

    decoders: dict[str, float]
    heads: dict[str, float]
    optimizer: float
    head_bytes: dict[str, int]

    def seconds(self, arm: str) -> float:
        return self.decoders["packed" if arm.endswith(":packed") else "padded"] + self.heads[arm] + self.optimizer

    def speedup(self, arm: str) -> float:
        """TRL's time over the arm's."""
        return self.seconds("trl") / self.seconds(arm)

    def head_share(self, arm: str) -> float:
        return self.heads[arm] / self.seconds(arm)


def decoder_parameters(config: Any) -> int:
    """Parameters of all matrices between the embedding and the head."""
    width, layers = config.hidden_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    attention = width * size * 2 * (config.num_attention_heads + config.num_key_value_heads)
    return int(layers * (attention + 3 * width * config.intermediate_size))


def decoder_flops(config: Any, lengths: list[int]) -> tuple[int, int]:
    """Of a forward pass: products with weights, and causal attention."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = 2 * decoder_parameters(config) * sum(lengths)
    attention = sum(2 * n * n * config.num_attention_heads * size for n in lengths) * config.num_hidden_layers
    return linear, attention


def _decoders(case: TrainCase, config: Any, lengths: list[int], gpu: Gpu) -> float:
    """All decoder passes of a step."""
    method, lora = METHODS[case.method], bool(MODELS[case.model].lora)
    linear, attention = decoder_flops(config, lengths)
    without = method.reference + 2 * method.kl  # forward passes without gradients
    forward = 1 + case.checkpointing
    # the gradient of a product costs as much as the product, for each operand that has one; of attention 2.5 times as much
    flops = linear * (without + forward + (1 if lora else 2)) + attention * (without + forward + 2.5)
    return float(flops / (gpu.bf16_flops * DECODER_SHARE))


def _plan(case: TrainCase, config: Any, batch: Batch, tokens: int, **options: Any) -> Any:
    """The plan of our head on ``tokens`` scored tokens."""
    sizes = [len(c) for c in batch.completions]
    half = len(sizes) // 2
    groups: dict[str, Any] = {}
    if not options and METHODS[case.method].rollouts:
        groups = {"token_groups": True}
    elif not options and tokens == sum(sizes):
        pairs = [a + b for a, b in zip(sizes[:half], sizes[half:], strict=True)]
        groups = {"group_sizes": sizes if case.method == "kto" else pairs, "margin": case.method in ("dpo", "simpo")}
    trained = {"train_hidden": True, "train_weight": not MODELS[case.model].lora, **groups}
    head = {"num_tokens": tokens, "hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    return ll.plan(dtype=torch.bfloat16, device="cuda", architecture="sm_90", **{**head, **trained, **options})


def predict(case: TrainCase, gpu: Gpu | None = None) -> Prediction:
    """A case of :mod:`~.suites`, in bfloat16, on an H100, or on ``gpu`` with our head's time for an H100."""
    gpu = gpu or constants()["sm_90"]
    config, method, lora = make_config(case.model, tiny=False), METHODS[case.method], bool(MODELS[case.model].lora)
    batch = case_batch(case, config.vocab_size)
    lengths = batch.lengths
    scored, (h, v) = batch.scored, (config.hidden_size, config.vocab_size)
    tokens, gemm = scored, 2 * h * v / gpu.bf16_flops  # of one token
    if method.every_token:
        half = len(batch) // 2
        tokens += sum(batch.prompt_lengths[:half]) - half
    without = method.reference + 2 * method.kl

    forward = _plan(case, config, batch, scored, train_hidden=False, train_weight=False)
    module, op = _plan(case, config, batch, tokens), _plan(case, config, batch, tokens, arbitrary_loss=True)
    others = without * forward.cost.seconds
    ours = ("logitless", "logitless:packed")
    heads, head_bytes = dict.fromkeys(ours, module.cost.seconds + others), dict.fromkeys(ours, int(module.extra_bytes))
    heads["trl+patch"], head_bytes["trl+patch"] = op.cost.seconds + others, int(op.extra_bytes)
    if method.fused:
        passes = 6 * v / gpu.bandwidth  # over a token's logits: read for the sums, read again, and the gradient written
        sums = 0 if lora else -(-tokens // _TRL_TOKENS) * 8 * h * v / gpu.bandwidth
        heads["trl"] = tokens * ((3 if lora else 4) * gemm + passes) + sums
        heads["trl"] += without * scored * (gemm + 2 * v / gpu.bandwidth)
        head_bytes["trl"] = _TRL_TOKENS * _TRL_VOCAB * 2 + tokens * h * 6 + (0 if lora else 6 * h * v)
    else:
        positions = len(lengths) * batch.longest
        heads["trl"] = positions * ((2 if lora else 3) * gemm + WHOLE_LOGITS_BYTES * v / gpu.bandwidth)
    trained = 0 if lora else decoder_parameters(config) + h * v * (1 if config.tie_word_embeddings else 2)
    padded = _decoders(case, config, [batch.longest] * len(lengths), gpu)
    decoders = {"padded": padded, "packed": _decoders(case, config, lengths, gpu)}
    return Prediction(decoders, heads, _OPTIMIZER_BYTES * trained / gpu.bandwidth, head_bytes)
