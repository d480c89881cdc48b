"""Results of a function at the head depend on the model's logits, keep their structure, and cost nothing more."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import logitless as ll

from .tiny import VOCAB, make_ids, make_model


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclasses.dataclass(frozen=True)
class Record:
    value: Tensor
    rest: dict[str, Any]


def test_results_keep_their_structure_and_share_storage():
    model, seen = make_model("llama"), {}

    def fn(at: ll.models.AtHead) -> Any:
        seen["states"] = at.hidden
        total = at.hidden.sum()
        return Record(at.hidden, {"pair": Pair(total, "text"), "list": [total.detach(), None, 3], "tuple": (total, total)})

    result = ll.at_head(model, ll.pack(make_ids()), fn)
    assert isinstance(result, Record) and isinstance(result.rest["pair"], Pair) and result.rest["list"][1:] == [None, 3]
    assert result.rest["pair"].second == "text" and not result.rest["list"][0].requires_grad
    assert result.value.data_ptr() == seen["states"].data_ptr() and result.value.requires_grad
    loss = result.rest["pair"].first
    loss /= 2  # as trainers do with a loss
    loss.backward()
    assert all(p.grad is not None for p in model.model.parameters()) and model.lm_head.weight.grad is None


class Made(TorchDispatchMode):
    """The number of tensors of the size of the head's weight that operations return, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.numel() == VOCAB * 16 and out.untyped_storage().data_ptr() not in views:
            self.count += 1
        return out


def test_the_logits_give_the_weight_no_gradient_of_its_size():
    model = make_model("llama")
    model.model.embed_tokens.requires_grad_(False)  # the gradient of its rows has that size too
    packed = ll.pack(make_ids())
    ll.at_head(model, packed, lambda at: at.hidden.sum())  # probes
    with Made() as made:
        ll.at_head(model, packed, lambda at: at.hidden.sum()).backward()
    assert made.count == 0 and model.lm_head.weight.grad is None
