"""Language models and a tokenizer small enough to train in a test. Skips the tests that import it without transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

WORDS = [start + end for start in "bdfgklmnprst" for end in ("a", "ed", "ir", "og", "un")]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
VOCAB = len(SPECIAL) + len(WORDS)
#: By what is special about the head: model type, and what its config needs besides.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "bias": ("phi", {}),
    "softcap": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_implementation": "eager"}),
}


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def training_options(out: Any, steps: int) -> dict[str, Any]:
    """Of a trainer's config: some steps on a CPU, each logged, nothing else said or saved."""
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 64,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }


def make_tokenizer() -> Any:
    """One token a word."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(kind: str, seed: int, hidden: int = 16) -> nn.Module:
    """One layer of random weights; ``kind`` is a key of :data:`MODELS`."""
    model_type, extra = MODELS[kind]
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.35,
        **extra,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if kind == "bias":
        nn.init.normal_(model.lm_head.bias)
    return model
