"""Which models :func:`logitless.model_logps` runs, for callers that have another way to run the others."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from logitless.kernels.core.checks import check_head

from .at_head import at_head
from .attention import _evaluating, _probe_ids, attention_of
from .causal_lm import causal_lm, head_layer
from .packing import pack
from .wrappers import for_probes

#: Findings, by causal language model, then by the state of its head.
_found: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str | None]] = weakref.WeakKeyDictionary()


def why_not_served(model: nn.Module) -> str | None:
    """Why :func:`logitless.model_logps` cannot run a model; ``None`` if it can.

    The kind of the model is checked at each call. The model also runs once, up to its head, on two sequences of five and three
    tokens, without gradients and in evaluation mode; and again when the adapters, hooks or modules of its head change.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> why_not_served(GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2)))
    """
    try:
        lm = causal_lm(model)
    except (TypeError, ValueError) as error:
        return str(error)
    found = _found.setdefault(lm, {})
    state = _state_of_head(lm)
    if state not in found:
        (ids,), model = _probe_ids(lm, 1), for_probes(model)
        try:
            with torch.no_grad(), _evaluating(model):
                at_head(
                    model, pack([ids[:5], ids[5:]]), lambda at: check_head(at.hidden, at.weight, at.bias), padding_free=False
                )
            found[state] = None
        except (TypeError, ValueError) as error:  # the reasons for which a model is refused
            found[state] = str(error)
    return found[state]


def _state_of_head(lm: Any) -> tuple[Any, ...]:
    """What may decide whether a head is served, besides its values."""
    modules = list(head_layer(lm).modules())
    hooks = [(*m._forward_pre_hooks, None, *m._forward_hooks) for m in modules]
    forwards = [(type(m), id(vars(m).get("forward"))) for m in modules]
    adapters = [(str(getattr(m, "active_adapters", "")), getattr(m, "merged", False)) for m in modules]
    return (attention_of(lm), *hooks, *forwards, *adapters)
