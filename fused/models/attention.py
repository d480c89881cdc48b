"""Which models can run packed or padded sequences: what their attention declares, and probes that measure it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .causal_lm import causal_lm, check_head_input, num_token_ids, run_to_head, takes_positions
from .model_kwargs import media_token_ids, required_arguments
from .packing import PackedSequences
from .wrappers import for_probes

#: Attention implementations for which transformers makes a mask from the position ids, and layer types that read this mask.
_MASKED = ("eager", "sdpa", "flex_attention")
_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_PROBE_TOKENS = 8
#: Largest change of a hidden state caused by tokens that it must not see, and by packing or padding itself, as a fraction of
#: the change caused by other tokens before it: far above bfloat16 rounding, far below the effect of a missing mask or of
#: positions that continue across sequences.
_LEAK, _DIFFERENCE = 1 / 64, 1 / 8
#: The same two changes where a model reacts less to context than it rounds, in roundings of the largest hidden state.
_LEAK_ROUNDINGS, _DIFFERENCE_ROUNDINGS = 4, 16
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
    attention implementation. Models whose forward requires more than token ids (``pixel_values`` of BLIP-2) are not probed.

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
    if missing := required_arguments(lm):
        reasons.append(f"{name}.forward requires {', '.join(missing)}: a row of text alone cannot be tried")
    if reasons:
        return reasons
    return _probed(model, lm, "row", lambda model: _probe_row(model, lm))


def why_not_causal(model: nn.Module, lm: Any) -> list[str]:
    """Whether later tokens change the hidden states of earlier ones; found by a probe that runs once per model."""
    return _probed(model, lm, "causal", lambda model: _probe_causal(model, lm))


def why_not_right_padded(model: nn.Module, lm: Any) -> list[str]:
    """Every reason why a right-padded batch gives wrong hidden states; found by a probe that runs once per model."""
    return _probed(model, lm, "padded", lambda model: _probe_padded(model, lm))


def why_not_batch(
    model: nn.Module,
    lm: Any,
    inputs: dict[str, Any],
    per_token: Iterable[str],
    scored: Tensor,  # (S, T) bool
) -> list[str]:
    """Every reason why a right-padded batch with images, or other inputs that no probe can make up, gives wrong hidden states.

    The probe uses the batch itself, and runs once per model and set of inputs. Later tokens must not change the hidden states
    at scored positions, and neither must more padding.
    """
    key = f"batch of {', '.join(sorted(inputs))}"
    return _probed(model, lm, key, lambda model: _probe_batch(model, lm, inputs, per_token, scored))


def max_row(lm: Any) -> int | None:
    """The longest row that the model can run, where a causal mask of fixed size limits it (GPT-Neo)."""
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    return longest if any(b.shape == (1, 1, longest, longest) for b in lm.buffers()) else None


def _probed(model: nn.Module, lm: Any, key: str, probe: Callable[[nn.Module], list[str]]) -> list[str]:
    """The findings of a probe, which runs once per model and attention implementation."""
    found = _found.setdefault(lm, {})
    if (attention_of(lm), key) not in found:
        model = for_probes(model)
        with torch.no_grad(), _evaluating(model):
            found[attention_of(lm), key] = probe(model)
    return list(found[attention_of(lm), key])


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
    """Token ids (count, _PROBE_TOKENS), without those that stand for images."""
    media = media_token_ids(lm)
    vocab = torch.tensor([i for i in range(min(num_token_ids(lm), 4096)) if i not in media], device="cpu")
    ids = torch.arange(count * _PROBE_TOKENS, device="cpu") * 7 + len(vocab) // 3
    device = lm.get_input_embeddings().weight.device
    return vocab[ids % len(vocab)].view(count, _PROBE_TOKENS).to("cpu" if device.type == "meta" else device)


def _states(model: nn.Module, lm: Any, inputs: dict[str, Any]) -> Tensor:
    """The input of the model's head, (S, T, H) in its own dtype."""

    def of_tokens(hidden: Tensor) -> Tensor:
        check_head_input(lm, hidden, tuple(inputs["input_ids"].shape))
        return hidden

    states: Tensor = run_to_head(model, lm, inputs, of_tokens)
    if not bool(states.isfinite().all()):
        raise ValueError("model cannot be probed: its hidden states are not finite, so its weights may not be either")
    return states


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances between hidden states, (...) float64. Each (..., H)."""
    return (a.double() - b.double()).norm(dim=-1)


def _change(a: Tensor, b: Tensor) -> float:
    """The largest distance between two hidden states. Each (..., H)."""
    return float(_distances(a, b).max())


def _rounding(lm: Any, states: Tensor) -> float:
    """The rounding error of the largest hidden state, in the coarsest dtype that the model computes in."""
    dtypes = [states.dtype, lm.get_input_embeddings().weight.dtype]
    if torch.is_autocast_enabled(states.device.type):
        dtypes.append(torch.get_autocast_dtype(states.device.type))
    largest = float(states.double().norm(dim=-1).max())
    return largest * max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1)


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
    if scale <= _rounding(lm, by_itself):
        return [f"{name} does not react to context: a probe cannot tell whether sequences in one row see each other"]
    if not _change(row, packed(other)) < _LEAK * scale:
        return [f"{name} lets the sequences of one row see each other"]
    if not _change(row, by_itself) < _DIFFERENCE * scale:
        return [f"{name} gives the sequences of one row other hidden states than alone"]
    return []


def _probe_contexts(lm: Any) -> tuple[Tensor, int]:
    """Three rows of tokens, the second with another second half, the third with another first half; and a half's length."""
    (ids, other), half = _probe_ids(lm, 2), _PROBE_TOKENS // 2
    return torch.stack((ids, torch.cat((ids[:half], other[half:])), torch.cat((other[:half], ids[half:])))), half


def _probe_causal(model: nn.Module, lm: Any) -> list[str]:
    """Whether the hidden states of the first half of a sequence stay the same with other tokens in the second."""
    ids, half = _probe_contexts(lm)
    rows = ids[:, None]  # some attention implementations take one row alone
    here, followed, preceded = (
        _states(model, lm, {"input_ids": row, "attention_mask": torch.ones_like(row)})[0] for row in rows
    )
    leak, scale = _change(here[:half], followed[:half]), _change(here[half:], preceded[half:])
    return [] if leak <= max(_LEAK * scale, _LEAK_ROUNDINGS * _rounding(lm, here)) else [_not_causal(lm)]


def _probe_padded(model: nn.Module, lm: Any) -> list[str]:
    """Whether padding on the right leaves the hidden states of a sequence unchanged."""
    ids, half = _probe_contexts(lm)
    mask = torch.ones_like(ids)
    mask[1, half:] = 0
    try:
        here, padded, preceded = _states(model, lm, {"input_ids": ids, "attention_mask": mask})
    except Exception as error:  # which is the reason, should this layout be needed
        return [f"{type(lm).__name__} with {attention_of(lm)} attention cannot run a right-padded batch: {error}"]
    alone = _states(model, lm, {"input_ids": ids[:1, :half], "attention_mask": mask[:1, :half]})[0]
    limit = max(_DIFFERENCE * _change(here[half:], preceded[half:]), _DIFFERENCE_ROUNDINGS * _rounding(lm, here))
    return [] if _change(padded[:half], alone) <= limit else [_not_padded(lm)]


def _probe_batch(model: nn.Module, lm: Any, inputs: dict[str, Any], per_token: Iterable[str], scored: Tensor) -> list[str]:
    """Whether later tokens, and more padding, leave the hidden states of the first half of the scored positions unchanged."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rank = scored.cumsum(1)
    early = scored & (rank <= (rank[:, -1:] + 1) // 2)
    places = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(early, places, -1).amax(1, keepdim=True)
    media = torch.tensor(sorted(media_token_ids(lm)), dtype=ids.dtype, device=ids.device)
    text = mask.bool() & (last >= 0) & ~torch.isin(ids, media)
    later, before = text & (places > last), text & (places <= last)
    first, second = _probe_ids(lm, 1)[0, :2].to(ids.device)
    others = torch.where(ids == first, second, first)

    def longer(value: Tensor) -> Tensor:
        return torch.cat((value, value.new_zeros(len(value), _PROBE_TOKENS, *value.shape[2:])), 1)

    names = ("input_ids", "attention_mask", "position_ids", *per_token)
    more = {name: longer(inputs[name]) for name in names if name in inputs}
    more["input_ids"][:, ids.shape[1] :] = first
    here = _states(model, lm, inputs)
    followed = _states(model, lm, {**inputs, "input_ids": torch.where(later, others, ids)})
    preceded = _states(model, lm, {**inputs, "input_ids": torch.where(before, others, ids)})
    padded = _states(model, lm, {**inputs, **more})[:, : ids.shape[1]]
    if not bool(later.any()):  # nothing to compare
        return []
    # means: with thousands of tokens, rounding may send one of them to another expert
    scale, rounding = float(_distances(here[later], preceded[later]).mean()), _rounding(lm, here)
    if not float(_distances(here[early], followed[early]).mean()) <= max(_LEAK * scale, _LEAK_ROUNDINGS * rounding):
        return [_not_causal(lm)]
    difference = float(_distances(here[early], padded[early]).mean())
    return [] if difference <= max(_DIFFERENCE * scale, _DIFFERENCE_ROUNDINGS * rounding) else [_not_padded(lm)]


def _not_causal(lm: Any) -> str:
    return f"{type(lm).__name__} is not causal: later tokens change the hidden states of earlier ones"


def _not_padded(lm: Any) -> str:
    return f"{type(lm).__name__} gives sequences with padding to their right other hidden states than alone"
