"""Gradients under DistributedDataParallel, FSDP1 and FSDP2 are those of one process, whatever each rank's batch."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import logitless as ll

from ..models.tiny import make_ids, make_model
from .ranks import run_ranks

pytest.importorskip("transformers")
WORLD = 2
#: Sequences of each rank, by micro-batch. The first of rank 0 costs less as a padded batch, the first of rank 1 as one row.
LENGTHS = {0: ([9, 9, 9, 9], [3, 11, 1, 5]), 1: ([25, 1, 1, 2], [6, 6, 6, 6])}
TOLERANCE = 1e-6


def loss_of(model: Any, ids: list[Tensor]) -> Tensor:
    packed = ll.pack(ids, prompt_lengths=[0] * len(ids))
    advantages = torch.linspace(-1.0, 1.0, len(ids))
    return ll.model_loss(model, ll.FusedLinearGRPOLoss(loss_type="grpo"), packed, advantages=advantages).loss


def logps_of(model: Any, ids: list[Tensor]) -> Tensor:
    stats = ll.model_logps(model, ids, outputs=("logps", "entropy"))
    return (stats.logps * torch.linspace(0.5, 1.5, len(stats.logps))).sum() / 10


def nothing_scored(model: Any, ids: list[Tensor]) -> Tensor:
    """As :func:`logps_of`, on rank 0 without a scored token."""
    prompts = [len(i) if torch.distributed.get_rank() == 0 else 0 for i in ids]
    return ll.model_logps(model, ids, prompt_lengths=prompts).logps.sum() / 10


def at_head_of(model: Any, ids: list[Tensor]) -> Tensor:
    """A result that is a dictionary with a dataclass and a tuple in it."""

    def fn(at: ll.models.AtHead) -> Any:
        stats = ll.linear_logps(at.hidden, at.weight, at.labels, at.bias, at.head)
        return {"stats": stats, "more": (at.hidden.square().mean(), "text", [1])}

    result = ll.at_head(model, ll.pack(ids), fn)
    return result["stats"].logps.sum() / 10 + result["more"][0]


def base_model(kind: str = "llama", lora: bool = False, checkpointing: bool = False) -> Any:
    model = make_model(kind, "sdpa")
    if lora:
        import peft

        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            model.enable_input_require_grads()
    return model.train()


def ids_of(rank: int, step: int) -> list[Tensor]:
    return make_ids(LENGTHS[rank][step], seed=10 * rank + step)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def expected(model: Any, call: Callable[[Any, list[Tensor]], Tensor], steps: int) -> dict[str, Tensor]:
    """The average of both ranks' gradients, each by this process alone and added up over ``steps``."""
    rank = torch.distributed.get_rank()
    model.zero_grad()
    for step in range(steps):
        call(model, ids_of(rank, step)).backward()
    total = {
        name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad
    }
    for gradient in total.values():
        torch.distributed.all_reduce(gradient)
        gradient /= WORLD
    return total


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, tolerance: float = TOLERANCE) -> None:
    largest = max(float(g.norm()) for g in wanted.values())
    assert found.keys() == wanted.keys(), (what, found.keys() ^ wanted.keys())
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm())
        assert error <= tolerance * max(float(gradient.norm()), largest * 1e-3), (what, name, error, float(gradient.norm()))


def ddp_case(call: Any, options: dict[str, Any], model_options: dict[str, Any], accumulate: bool = False) -> None:
    plain = base_model(**model_options)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain), **options)
    what = f"DDP {options} {model_options} {call.__name__} accumulate={accumulate}"
    steps = 2 if accumulate else 1
    wanted = expected(plain, call, steps)
    for _ in range(2):  # static_graph takes another way from the second step on
        wrapped.zero_grad()
        if accumulate:
            with wrapped.no_sync():
                call(wrapped, ids_of(torch.distributed.get_rank(), 0)).backward()
        call(wrapped, ids_of(torch.distributed.get_rank(), steps - 1)).backward()
        check(gradients_of(wrapped.module), wanted, what)


def ddp(rank: int) -> None:
    for call in (loss_of, logps_of, nothing_scored, at_head_of):
        for options in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
            ddp_case(call, options, {})
    ddp_case(loss_of, {}, {}, accumulate=True)
    ddp_case(logps_of, {"static_graph": True}, {"lora": True, "checkpointing": True})
    ddp_case(loss_of, {"find_unused_parameters": True}, {"kind": "qwen2"})


def layouts_of_fsdp2() -> dict[str, Callable[[Any, Any], None]]:
    """How to shard: the whole model (``outer``, perhaps PEFT's) and its causal language model."""
    from torch.distributed.fsdp import fully_shard

    def layers(lm: Any, **options: Any) -> None:
        for layer in lm.model.layers:
            fully_shard(layer, **options)

    def root(outer: Any, lm: Any) -> None:
        layers(lm)
        fully_shard(outer)

    def resharded(outer: Any, lm: Any) -> None:
        layers(lm, reshard_after_forward=True)
        fully_shard(outer, reshard_after_forward=True)

    def norm_and_head(outer: Any, lm: Any) -> None:
        layers(lm)
        fully_shard([lm.model.norm, lm.lm_head], reshard_after_forward=True)
        fully_shard(outer, reshard_after_forward=True)

    def head_alone(outer: Any, lm: Any) -> None:
        layers(lm)
        fully_shard(lm.lm_head)
        fully_shard(outer)

    def kept(outer: Any, lm: Any) -> None:
        layers(lm, reshard_after_forward=False)
        fully_shard(outer, reshard_after_forward=False)

    return {fn.__name__: fn for fn in (root, resharded, norm_and_head, head_alone, kept)}


def fsdp2_case(layout: str, call: Any, model_options: dict[str, Any], accumulate: bool = False) -> None:
    plain = base_model(**model_options)
    sharded = copy.deepcopy(plain)
    what = f"FSDP2 {layout} {model_options} {call.__name__} accumulate={accumulate}"
    layouts_of_fsdp2()[layout](sharded, sharded.get_base_model() if model_options.get("lora") else sharded)
    steps = 2 if accumulate else 1
    wanted = expected(plain, call, steps)
    for _ in range(2 if accumulate else 1):
        sharded.zero_grad()
        for step in range(steps):
            call(sharded, ids_of(torch.distributed.get_rank(), step)).backward()
        check({name: g.full_tensor() for name, g in gradients_of(sharded).items()}, wanted, what)


def fsdp2(rank: int) -> None:
    for layout in layouts_of_fsdp2():
        for call in (loss_of, logps_of):
            fsdp2_case(layout, call, {}, accumulate=call is logps_of)
        fsdp2_case(layout, logps_of, {"lora": True, "checkpointing": True})
    fsdp2_case("resharded", at_head_of, {})
    fsdp2_case("resharded", nothing_scored, {})
    for layout in ("root", "resharded"):  # tied weights cannot be in two groups
        fsdp2_case(layout, logps_of, {"kind": "qwen2"})


def fsdp1_case(strategy: Any, call: Any, model_options: dict[str, Any], wrap_head: bool = False) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import CustomPolicy

    plain = base_model(**model_options)
    inside = copy.deepcopy(plain)
    lm = inside.get_base_model() if model_options.get("lora") else inside
    layer = type(lm.model.layers[0])
    policy = CustomPolicy(lambda module: isinstance(module, layer) or (wrap_head and module is lm.lm_head))
    sharded = FSDP(
        inside, sharding_strategy=strategy, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )
    what = f"FSDP1 {strategy} {model_options} {call.__name__} wrap_head={wrap_head}"
    wanted = expected(plain, call, 1)
    call(sharded, ids_of(torch.distributed.get_rank(), 0)).backward()
    with FSDP.summon_full_params(sharded, with_grads=True):
        check({name.replace("_fsdp_wrapped_module.", ""): g for name, g in gradients_of(sharded).items()}, wanted, what)


def fsdp1(rank: int) -> None:
    from torch.distributed.fsdp import ShardingStrategy

    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        for call in (loss_of, logps_of):
            fsdp1_case(strategy, call, {})
    fsdp1_case(ShardingStrategy.FULL_SHARD, logps_of, {"lora": True, "checkpointing": True})
    fsdp1_case(ShardingStrategy.FULL_SHARD, logps_of, {"kind": "qwen2"})
    fsdp1_case(ShardingStrategy.FULL_SHARD, logps_of, {}, wrap_head=True)


def by_hand(rank: int) -> None:
    """A head's weight gathered by the caller: averaged over ranks, or an error."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    torch.manual_seed(0)
    layer, labels = nn.Linear(4, 7, bias=False), torch.tensor([[1, 2, 3], [4, 5, 6]])
    hidden = torch.randn(2, 3, 4) + rank

    def loss(weight: Tensor) -> Tensor:
        return ll.FusedLinearSimPOLoss()(hidden, weight, labels).loss + ll.linear_logps(hidden, weight, labels).logps.sum()

    whole = layer.weight.detach().clone().requires_grad_()
    loss(whole).backward()
    torch.distributed.all_reduce(whole.grad)
    fully_shard(layer)
    loss(layer.weight.full_tensor(grad_placements=[Partial("avg")])).backward()
    torch.testing.assert_close(layer.weight.grad.full_tensor(), whole.grad / WORLD, rtol=1e-6, atol=1e-6)
    for weight in (layer.weight.full_tensor(), layer.weight.full_tensor().double().float()):
        with pytest.raises(TypeError, match=r"weight comes from DTensor.full_tensor\(\) without grad_placements.*2 ranks"):
            loss(weight)
    with torch.no_grad():
        loss(layer.weight.full_tensor())
    with pytest.raises(TypeError, match=r"^weight is a DTensor.*model_loss"):
        loss(layer.weight)


def refused(rank: int) -> None:
    """What cannot be served is an error that names what to change."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    ids = ids_of(rank, 0)

    class Opaque:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    wrapped = nn.parallel.DistributedDataParallel(base_model())
    with pytest.raises(TypeError, match=r"fn returned a Opaque whose value needs a gradient.*return tensors, dataclasses"):
        ll.at_head(wrapped, ll.pack(ids), lambda at: [Opaque(at.hidden)])
    model = base_model(lora=True)
    fully_shard(model.get_base_model().lm_head.base_layer)
    fully_shard(model)
    with pytest.raises(ValueError, match=r"head has the layer base_layer, .*fully_shard on the whole head"):
        logps_of(model, ids)
    flat = FullyShardedDataParallel(base_model(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="pass the wrapped model"):
        logps_of(flat.module, ids)
    sharded = base_model()
    fully_shard(sharded, reshard_after_forward=True)
    with pytest.raises(ValueError, match="fn must not return the head's weight"):
        ll.at_head(sharded, ll.pack(ids), lambda at: (at.hidden, at.weight))


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What a step imports, before the processes are forked."""
    for name in ("torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(name)
    logps_of(base_model(lora=True, checkpointing=True), ids_of(0, 0)).backward()


@pytest.mark.parametrize("cases", [ddp, fsdp2, fsdp1, by_hand, refused], ids=lambda fn: fn.__name__)
def test_gradients_are_those_of_one_process_or_there_is_an_error(cases):
    run_ranks(WORLD, cases, timeout=100)
