"""Tensors that a loss module cannot compute on: without data, of a ``torch.func`` transform, distributed. Errors name them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import logitless as ll

S, T, H, V = 4, 5, 8, 23
LABELS = torch.arange(S * T).view(S, T) % V
HEAD = {"hidden": torch.ones(S, T, H), "weight": torch.ones(V, H), "labels": LABELS, "bias": torch.ones(V)}
REF_LOGPS = {"ref_logps": torch.ones(S)}
REF_STATES = {"ref_hidden": torch.ones(S, T, 3), "ref_weight": torch.ones(V, 3), "ref_bias": torch.ones(V)}
PER_TOKEN = torch.zeros(S, T)
PACKED = {"hidden": torch.ones(S * T, H), "labels": LABELS.flatten(), "cu_seqlens": torch.arange(S + 1) * T}
POLICY = {"advantages": torch.ones(S), "old_logps": PER_TOKEN}
RATIO = {"importance_sampling_ratio": torch.ones(S, T)}
ENTROPY = {"entropy_threshold": torch.tensor(1.0), "num_items_in_batch": torch.tensor(20)}

#: Modules and all tensors that they take; some exclude each other.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "dpo": (ll.FusedLinearDPOLoss(), {**HEAD, **REF_LOGPS, "token_weights": torch.ones(S, T)}),
    "dpo with states": (ll.FusedLinearDPOLoss(metrics=True), {**HEAD, **REF_STATES}),
    "ipo": (ll.FusedLinearIPOLoss(), {**HEAD, **REF_LOGPS}),
    "simpo": (ll.FusedLinearSimPOLoss(), HEAD),
    "simpo packed": (ll.FusedLinearSimPOLoss(), {**HEAD, **PACKED}),
    "cpo": (ll.FusedLinearCPOLoss(), HEAD),
    "orpo": (ll.FusedLinearORPOLoss(), {**HEAD, "nll_labels": LABELS}),
    "kto": (
        ll.FusedLinearKTOLoss(),
        {**HEAD, **REF_LOGPS, "desirable": torch.ones(S, dtype=torch.bool), "kl": torch.tensor(0.1)},
    ),
    "own": (ll.FusedLinearPreferenceLoss(lambda pairs: -pairs.chosen_logps), {**HEAD, **REF_LOGPS}),
    "objectives": (
        ll.FusedLinearMultiObjectiveLoss(),
        {**HEAD, "objectives": {"a": ll.Objective(ll.FusedLinearSimPOLoss(), [0, 1])}},
    ),
    "ppo": (ll.FusedLinearPPOLoss(), {**HEAD, **POLICY, **RATIO}),
    "ppo with a reference": (ll.FusedLinearPPOLoss(kl_coef=0.1), {**HEAD, **POLICY, "ref_logps": PER_TOKEN}),
    "ppo corrected": (
        ll.FusedLinearPPOLoss(importance_sampling_mode="token_mask"),
        {**HEAD, **POLICY, "sampling_logps": PER_TOKEN},
    ),
    "grpo": (ll.FusedLinearGRPOLoss(top_entropy_quantile=0.5), {**HEAD, **POLICY, **ENTROPY}),
    "own policy loss": (ll.FusedLinearPolicyLoss(lambda tokens: -tokens.logps), {**HEAD, "advantages": torch.ones(S)}),
}
ARGUMENTS = [
    (name, argument) for name, (_, given) in CALLS.items() for argument, value in given.items() if isinstance(value, Tensor)
]
every_argument = pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[f"{n}-{a}" for n, a in ARGUMENTS])
every_call = pytest.mark.parametrize("name", CALLS)


def call(name: str, **changed: Any) -> Any:
    module, given = CALLS[name]
    return module(**{**given, **changed})


@every_call
def test_the_calls_are_right_but_for_what_is_changed(name):
    assert call(name).loss.isfinite()


@every_argument
def test_a_meta_tensor_is_an_error_that_names_it(name, argument):
    with pytest.raises(ValueError, match=f"^{argument} is on meta, which has no data"):
        call(name, **{argument: CALLS[name][1][argument].to("meta")})


@every_argument
def test_a_fake_tensor_is_an_error_that_names_it(name, argument):
    fake = FakeTensorMode().from_tensor(CALLS[name][1][argument])
    with pytest.raises(ValueError, match=f"^{argument} is a FakeTensor, which has no data"):
        call(name, **{argument: fake})


@every_argument
def test_vmap_is_an_error_that_names_the_argument(name, argument):
    stacked = CALLS[name][1][argument].expand(2, *CALLS[name][1][argument].shape)
    with pytest.raises(TypeError, match=rf"^{argument} is a tensor of a torch\.func transform"):
        torch.func.vmap(lambda value: call(name, **{argument: value}).loss)(stacked)


FLOATS = [(n, a) for n, a in ARGUMENTS if CALLS[n][1][a].is_floating_point()]


@pytest.mark.parametrize(("name", "argument"), FLOATS, ids=[f"{n}-{a}" for n, a in FLOATS])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev"])
def test_derivatives_of_torch_func_are_errors_that_name_the_argument(name, argument, transform):
    value = CALLS[name][1][argument]

    def loss(x: Tensor) -> Tensor:
        return call(name, **{argument: x}).loss

    derive = {
        "grad": lambda: torch.func.grad(loss)(value),
        "vjp": lambda: torch.func.vjp(loss, value),
        "jvp": lambda: torch.func.jvp(loss, (value,), (torch.ones_like(value),)),
        "jacrev": lambda: torch.func.jacrev(loss)(value),
    }
    with pytest.raises(TypeError, match=rf"^{argument} is a tensor of a torch\.func transform .*loss\.backward\(\)"):
        derive[transform]()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """One process that is a whole mesh."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs torch.distributed, not yet initialised")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield distributed.init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@every_argument
def test_a_dtensor_is_an_error_that_names_it_and_says_what_to_pass(name, argument, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    value = CALLS[name][1][argument].cpu()
    given = distribute_tensor(value, mesh, [Shard(0)] if value.dim() else None)
    ways_out = [r"\.to_local\(\)", r"\.full_tensor\(\)"]
    if argument in ("weight", "bias"):
        ways_out = [rf"\.full_tensor\(grad_placements=\[{placement}\]" for placement in (r'Partial\("avg"\)', r"Replicate\(\)")]
    wanted = rf"^{argument} is a DTensor.*{argument}{ways_out[0]}.*{argument}{ways_out[1]}"
    with pytest.raises(TypeError, match=wanted):
        call(name, **{argument: given})


@pytest.mark.parametrize("argument", ["hidden", "weight", "labels", "bias"])
def test_linear_logps_names_them_too(argument, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    value = HEAD[argument]
    with pytest.raises(TypeError, match=rf"^{argument} is a tensor of a torch\.func transform"):
        torch.func.vmap(lambda x: ll.linear_logps(**{**HEAD, argument: x}).logps)(value.expand(2, *value.shape))
    with pytest.raises(TypeError, match=f"^{argument} is a DTensor"):
        ll.linear_logps(**{**HEAD, argument: distribute_tensor(value.cpu(), mesh, [Shard(0)])})


def test_linear_logps_traces_with_fake_and_meta_tensors():
    """Its operators have a shape function, which ``torch.export`` and ``torch.compile`` need."""
    for move in (FakeTensorMode(allow_non_fake_inputs=True).from_tensor, lambda t: t.to("meta")):
        logps = ll.linear_logps(**{name: move(value) for name, value in HEAD.items()}).logps
        assert logps.shape == LABELS.shape
