"""Tiny models of transformers with random weights, and log-probabilities by plain forward passes of one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..helpers import relative_error

transformers = pytest.importorskip("transformers")

VOCAB = 61
LENGTHS = [7, 0, 1, 9, 4, 1]
EPS = torch.finfo(torch.float32).eps
#: Model type, and what its config needs besides. Windows are shorter than the sequences.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    ),
    "mistral": ("mistral", {"sliding_window": 3}),
    "phi": ("phi", {}),  # a head with a bias
    "granite": ("granite", {"logits_scaling": 4.0}),
    "gpt2": ("gpt2", {}),  # learned positions
    "bloom": ("bloom", {}),  # no position ids
    "opt": ("opt", {}),  # positions from the attention mask
    "gpt_oss": ("gpt_oss", {"head_dim": 8, "sliding_window": 3, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "mamba": ("mamba", {"state_size": 4}),
}


def make_model(kind: str, attention: str | None = "eager", seed: int = 0) -> Any:
    model_type, extra = MODELS[kind]
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1 if model_type not in ("gpt2", "opt", "bloom", "mamba") else None,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "dropout": 0.0, **extra},
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return model


def make_ids(lengths: list[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=g) for n in lengths]


def plain_logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0].float()


def plain_logps(model: Any, ids: list[Tensor], temperature: float = 1.0) -> Tensor:
    """Of every token but the first of a sequence, (N,), by plain forward passes of one sequence at a time."""
    out = []
    for sequence in ids:
        out.append(torch.zeros(min(1, len(sequence))))
        if len(sequence) > 1:
            logp = (plain_logits(model, sequence) / temperature).log_softmax(-1)
            out.append(logp[:-1].gather(-1, sequence[1:, None])[:, 0])
    return torch.cat(out)


def gradients(model: Any, value: Tensor, weights: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    (value * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_like_plain(model: Any, ids: list[Tensor], score: Callable[[], Tensor], scored: Tensor | None = None) -> None:
    """Log-probabilities and the gradients of all parameters are those of plain forward passes, up to rounding."""
    # small numbers come out of large ones: a few roundings of the logits, whatever the log-probability
    weights = torch.randn(sum(map(len, ids)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(weights) if scored is None else scored
    expected = plain_logps(model, ids) * mask
    wanted = gradients(model, expected, weights)
    logps = score()
    assert logps.shape == expected.shape
    torch.testing.assert_close(logps, expected, rtol=0, atol=64 * EPS * max(1.0, float(expected.detach().abs().max())))
    found = gradients(model, logps, weights)
    assert found.keys() == wanted.keys() and len(wanted) == sum(p.requires_grad for p in model.parameters())
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 128 * EPS or float((found[name] - gradient).norm()) < 16 * EPS, name


def padded(ids: list[Tensor], side: str, extra: int = 1) -> tuple[Tensor, Tensor]:
    width = max(map(len, ids)) + extra
    out, mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
    for row, sequence in enumerate(ids):
        where = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        out[row, where], mask[row, where] = sequence, 1
    return out, mask
