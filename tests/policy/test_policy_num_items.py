"""``num_items_in_batch``: what it may be, and 0 where a whole optimiser step has nothing to score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import logitless as ll
from logitless.fused import num_items as counts
from logitless.fused.num_items import check_num_items, over

PPO, GRPO = ll.FusedLinearPPOLoss, ll.FusedLinearGRPOLoss
LOSSES = {
    "ppo": PPO(),
    "ppo everything": PPO(dual_clip=3.0, entropy_coef=0.02, aggregation="sequence-mean", metrics=True),
    "ppo fixed length": PPO(aggregation="fixed-length", max_length=9, entropy_coef=0.1),
    "grpo": GRPO("grpo", entropy_coef=0.1),
    "dapo": GRPO("dapo"),
    "gspo": GRPO("dapo", importance_sampling_level="sequence"),
    "luspo": GRPO("luspo"),
    "dr_grpo": GRPO("dr_grpo", max_completion_length=9),
    "cispo": GRPO("cispo", epsilon_high=5.0),
    "sapo": GRPO("sapo"),
    "vespo": GRPO("vespo"),
    "top entropy": GRPO("dapo", top_entropy_quantile=0.4),
    "own": ll.FusedLinearPolicyLoss(lambda t: -t.logps * t.advantages, entropy_coef=0.1),
    "own of sequences": ll.FusedLinearPolicyLoss(lambda t: -t.logps, group="sequence", aggregation="sequence-mean"),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
KINDS: dict[str, Callable[[float], Any]] = {
    "number": lambda value: value,
    "tensor": torch.tensor,
    "float tensor": lambda value: torch.tensor(float(value), dtype=torch.float64),
    "tensor of one element": lambda value: torch.tensor([value]),
}


def run(name: str, labels: Tensor, num_items: Any) -> tuple[ll.FusedLinearPolicyLoss, list[Tensor]]:
    """The output, and the gradients of hidden states and weight."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*labels.shape, 8, generator=g).requires_grad_()
    w = torch.randn(23, 8, generator=g).requires_grad_()
    others = {"entropy_threshold": 1.0} if name == "top entropy" else {}
    if name == "grpo":  # with an entropy bonus it has two counts
        num_items = torch.stack((num_items, num_items)) if isinstance(num_items, Tensor) else (num_items, num_items)
    out = LOSSES[name](x, w, labels, advantages=torch.linspace(-1, 1, len(labels)), num_items_in_batch=num_items, **others)
    return out, list(torch.autograd.grad(out.loss, (x, w)))


IGNORED, SCORED = torch.full((3, 4), -100), torch.arange(12).view(3, 4)


@every_loss
@pytest.mark.parametrize("items", [0, 7])
def test_every_position_ignored_is_a_loss_of_0(name, items):
    """Also where the other micro-batches of the step have no scored token either."""
    for given in (items, torch.tensor(items)):
        out, gradients = run(name, IGNORED, given)
        assert out.loss.item() == 0
        assert all((g == 0).all() for g in gradients)
        assert all(value == 0 for value in out.metrics.values())


@every_loss
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_what_cannot_be_a_count_is_an_error(name, value):
    for given in (value, torch.tensor(value)):
        with pytest.raises(ValueError, match="num_items_in_batch must be a finite number"):
            run(name, SCORED, given)
        if value != 0:
            with pytest.raises(ValueError, match="num_items_in_batch must be a finite number"):
                run(name, IGNORED, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("any_scored", [False, True])
@pytest.mark.parametrize("value", [-1, -3.5, math.nan, math.inf, -math.inf, 0])
def test_numbers_and_tensors_are_checked_alike(kind, any_scored, value):
    given = KINDS[kind](value)
    if value == 0 and not any_scored:
        assert check_num_items(given, any_scored) == 0
        assert over(7.0, check_num_items(given, any_scored)) == 0
        return
    with pytest.raises(ValueError, match="num_items_in_batch must be a finite number"):
        check_num_items(given, any_scored)


class OfGPU:
    """A number that says it is on a GPU, whose value must not be read."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)

    def __gt__(self, other: float) -> Tensor:
        return self.value > other

    def __ge__(self, other: float) -> Tensor:
        return self.value >= other

    def isfinite(self) -> Tensor:
        return self.value.isfinite()


@pytest.mark.parametrize(
    ("value", "any_scored", "holds"),
    [
        (0.0, False, True),
        (0.0, True, False),
        (5.0, True, True),
        (5.0, False, True),
        (-1.0, False, False),
        (-1.0, True, False),
        (math.nan, False, False),
        (math.inf, False, False),
        (math.inf, True, False),
    ],
)
def test_on_a_gpu_the_device_asserts_what_a_cpu_checks(value, any_scored, holds, monkeypatch):
    """Emulated: the branch for CUDA tensors on a number whose value it cannot read, and the assertion that it launches."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, message: asserted.append(bool(condition)))
    monkeypatch.setattr(counts, "as_number", lambda name, given: OfGPU(value))
    checked = check_num_items(torch.tensor(value), any_scored)
    assert asserted == [holds]
    assert isinstance(checked, OfGPU)  # the value was not read
    assert not holds or over(torch.tensor(7.0), checked.value) == (7.0 / value if value else 0)
