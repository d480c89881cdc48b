"""Which models tell packed sequences apart: what their attention declares, and probes that measure it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .causal_lm import causal_lm, num_token_ids, run_to_head, takes_positions
from .packing import PackedSequences

#: Attention implementations for which transformers makes a mask from the position ids, and layer types that read this mask.
_MASKED = ("eager", "sdpa", "flex_attention")
_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_PROBE_TOKENS = 8
#: Largest change of a hidden state caused by the tokens of another sequence, and by packing itself, as a fraction of the change
#: caused by a different context: far above bfloat16 rounding, far below the effect of a missing mask or of positions that
#: continue across sequences.
_LEAK, _DIFFERENCE = 1 / 64, 1 / 8
#: Findings of the probes, by causal language model, then by attention implementation and probe.
_found: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], list[str]]] = weakref.WeakKeyDictionary()


def attention_of(lm: Any) -> str:
    """Name of the attention implementation."""
    return str(lm.config.get_text_config()._attn_implementation)


def takes_bounds(lm: Any) -> bool:
    """Whether the attention implementation takes ``cu_seq_lens_q/k``; told by its name, which may be a registered one's."""
    return "flash" in attention_of(lm) or "varlen" in attention_of(lm)


def why_not_padding_free(model: nn.Module) -> list[str]:
    """Every reason why a model cannot take several sequences in one row of tokens; empty when it can.

    Checked first: whether the model's forward takes position ids, its attention implementation (``eager``, ``sdpa``,
    ``flex_attention``, ``*flash*`` or ``*varlen*``), whether it keeps a recurrent state, and ``layer_types`` of its config.
    Some models pass these checks and still drop the position ids before they build the mask. So the model is also probed:
    each of two sequences of eight tokens in one row must get the hidden states that it gets alone, whatever the tokens of the
    other sequence. The probe takes five forward passes without gradients, in evaluation mode, and runs once per model and
    attention implementation.

    Raises:
        TypeError, ValueError: as :func:`logitless.model_logps` does, for a model that it cannot run.

    Example:
        >>> from transformers import BloomConfig, BloomForCausalLM
        >>> why_not_padding_free(BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2)))
        ['BloomForCausalLM.forward takes no position_ids']
    """
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    reasons = []
    name = type(lm).__name__
    if not takes_positions(lm):
        reasons.append(f"{name}.forward takes no position_ids")
    attention = attention_of(lm)
    if attention not in _MASKED and not takes_bounds(lm):
        reasons.append(f"attention implementation {attention!r} is not known to tell sequences apart")
    if getattr(lm, "_is_stateful", False):
        reasons.append(f"{name} keeps a recurrent state, which runs on from one sequence into the next")
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS):
        reasons.append(f"config.layer_types has {', '.join(others)}: only attention layers tell sequences apart")
    if reasons:
        return reasons
    return _probed(model, lm, _probe_row)


def why_not_right_padded(model: nn.Module, lm: Any) -> list[str]:
    """Every reason why a right-padded batch gives wrong hidden states; found by a probe that runs once per model."""
    return _probed(model, lm, _probe_padded)


def _probed(model: nn.Module, lm: Any, probe: Callable[[nn.Module, Any], list[str]]) -> list[str]:
    """The findings of a probe, which runs once per model and attention implementation."""
    found = _found.setdefault(lm, {})
    key = (attention_of(lm), probe.__name__)
    if key not in found:
        with torch.no_grad(), _evaluating(model):
            found[key] = probe(model, lm)
    return list(found[key])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probe_ids(lm: Any, count: int) -> Tensor:
    """Token ids (count, _PROBE_TOKENS)."""
    vocab = num_token_ids(lm)
    ids = torch.arange(count * _PROBE_TOKENS, device=lm.get_input_embeddings().weight.device)
    return ((ids * 7 + vocab // 3) % vocab).view(count, _PROBE_TOKENS)


def _states(model: nn.Module, lm: Any, inputs: dict[str, Any]) -> Tensor:
    """The input of the model's head, (S, T, H) float64."""
    states: Tensor = run_to_head(model, lm, inputs, lambda hidden: hidden).double()
    if not bool(states.isfinite().all()):
        raise ValueError("model cannot be probed: its hidden states are not finite, so its weights may not be either")
    return states


def _change(a: Tensor, b: Tensor) -> float:
    """The largest distance between two hidden states. Each (..., H)."""
    return float((a - b).norm(dim=-1).max())


def _probe_row(model: nn.Module, lm: Any) -> list[str]:
    """Whether each of two short sequences in one row gets the hidden states that it gets alone."""
    n = _PROBE_TOKENS
    first, other, second = _probe_ids(lm, 3)
    alone, joined = torch.arange(n, device=second.device), torch.arange(2 * n, device=second.device)
    bounds = torch.tensor([0, n, 2 * n], dtype=torch.int32, device=second.device)

    def packed(before: Tensor) -> Tensor:
        pack = PackedSequences(torch.cat((before, second)), alone.repeat(2), bounds, n)
        return _states(model, lm, pack.model_inputs(flash_attention=takes_bounds(lm)))[0, n:]

    def continued(before: Tensor) -> Tensor:
        ids = torch.cat((before, second))
        return _states(model, lm, {"input_ids": ids[None], "position_ids": joined[None]})[0, n:]

    by_itself = _states(model, lm, {"input_ids": second[None], "position_ids": alone[None]})[0]
    row, scale = packed(first), _change(continued(first), continued(other))
    name = f"{type(lm).__name__} with {attention_of(lm)} attention"
    # "not <": NaN, and a model whose hidden states do not depend on context, fail as well
    if not _change(row, packed(other)) < _LEAK * scale:
        return [f"{name} lets the sequences of one row see each other (or does not react to context at all)"]
    if not _change(row, by_itself) < _DIFFERENCE * scale:
        return [f"{name} gives the sequences of one row other hidden states than alone"]
    return []


def _probe_padded(model: nn.Module, lm: Any) -> list[str]:
    """Whether padding on the right and later tokens leave the hidden states of a sequence unchanged."""
    (ids,) = _probe_ids(lm, 1)
    short = ids[: _PROBE_TOKENS // 2]
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, len(short) :] = 0
    alone = _states(model, lm, {"input_ids": short[None], "attention_mask": torch.ones_like(short)[None]})[0]
    later, padded = _states(model, lm, {"input_ids": ids.repeat(2, 1), "attention_mask": mask})[:, : len(short)]
    limit = _DIFFERENCE * float((alone - alone.mean(0)).norm(dim=-1).max())
    if not _change(later, alone) <= limit:
        return [f"{type(lm).__name__} is not causal: later tokens change the hidden states of earlier ones"]
    if not _change(padded, alone) <= limit:
        return [f"{type(lm).__name__} gives sequences with padding to their right other hidden states than alone"]
    return []
