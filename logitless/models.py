"""Hugging Face causal language models on packed sequences, without padding and without vocabulary logits."""

from logitless.fused.models.at_head import AtHead, at_head, model_loss
from logitless.fused.models.attention import why_not_padding_free
from logitless.fused.models.logps import model_logps
from logitless.fused.models.packing import PackedSequences, pack, unpack

__all__ = [
    "AtHead",
    "PackedSequences",
    "at_head",
    "model_logps",
    "model_loss",
    "pack",
    "unpack",
    "why_not_padding_free",
]
