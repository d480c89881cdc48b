"""Models at the sizes that people train, built from their configs with random weights; and the same shrunk, for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """A published architecture.

    Attributes:
        model_type: of ``transformers.AutoConfig.for_model``.
        sizes: values of its config, from the model's own ``config.json``.
        lora: rank of the adapters on all linear layers except the head, which alone are trained; 0: everything is trained.
    """

    model_type: str
    sizes: Mapping[str, Any] = field(hash=False)
    lora: int = 0


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, **more: Any) -> dict[str, Any]:
    counts = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    return {"hidden_size": hidden, "intermediate_size": intermediate, **counts, "tie_word_embeddings": True, **more}


_QWEN = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_LLAMA = {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
_8B = {"max_position_embeddings": 8192, "tie_word_embeddings": False}

MODELS: dict[str, ModelSpec] = {
    "qwen3-0.6b": ModelSpec("qwen3", _sizes(1024, 3072, 28, 16, 8, head_dim=128, max_position_embeddings=40960, **_QWEN)),
    "llama-3.2-1b": ModelSpec("llama", _sizes(2048, 8192, 16, 32, 8, head_dim=64, max_position_embeddings=131072, **_LLAMA)),
    "qwen2.5-1.5b": ModelSpec("qwen2", _sizes(1536, 8960, 28, 12, 2, max_position_embeddings=131072, **_QWEN)),
    "llama-3-8b-lora": ModelSpec("llama", _sizes(4096, 14336, 32, 32, 8, **_8B, **_LLAMA), lora=16),
}

#: What ``--tiny`` makes of each of them: the same kinds of layers, heads and ties.
_TINY = {k: v for k, v in _sizes(64, 96, 2, 4, 2, vocab_size=509, head_dim=16).items() if k != "tie_word_embeddings"}


def make_config(name: str, *, tiny: bool) -> Any:
    """The config of a model of :data:`MODELS`."""
    from transformers import AutoConfig

    spec = MODELS[name]
    sizes = {**spec.sizes, **(_TINY if tiny else {})}
    return AutoConfig.for_model(spec.model_type, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def make_model(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool, attention: str, seed: int) -> Any:
    """Random weights, drawn on the device: the same for one seed on one kind of device."""
    from transformers import AutoModelForCausalLM

    config = make_config(name, tiny=tiny)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.to(device)


def lora_config(name: str) -> Any:
    """Adapters as ``TRL --use_peft`` adds them; ``None`` for a model that is trained whole.

    B is random instead of 0, so that the policy differs from its reference from the first step on.
    """
    rank = MODELS[name].lora
    if not rank:
        return None
    from peft import LoraConfig

    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **options)


@torch.no_grad()
def move_away(model: nn.Module, seed: int) -> None:
    """Change the norms' weights by some hundredths, so that a policy differs from the reference of the same seed."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("norm.weight"):
            parameter.mul_((1 + 0.03 * torch.randn(parameter.shape, generator=g)).to(parameter))
