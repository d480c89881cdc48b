"""Gradients of a DeepSpeed engine at stages 1, 2 and 3 are those of one process.

Run by ``make test-distributed``: ``torchrun --nproc-per-node 2 -m tests.distributed.deepspeed_stages``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

import logitless as ll

from . import test_wrappers as cases

#: ZeRO-3 replaces ``torch.nn.functional.linear`` by its own, which rounds otherwise.
TOLERANCE = {1: 1e-6, 2: 1e-6, 3: 4e-6}


def engine_of(model: Any, stage: int) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def check_stage(stage: int, call: Callable[[Any, list[Tensor]], Tensor], options: dict[str, Any]) -> None:
    plain = cases.base_model(**options)
    inside = copy.deepcopy(plain)
    wanted = cases.expected(plain, call, 1)
    engine = engine_of(inside, stage)
    for _ in range(2):
        engine.backward(call(engine, cases.ids_of(torch.distributed.get_rank(), 0)))
        found = {name: safe_get_full_grad(p) for name, p in inside.named_parameters() if p.requires_grad}
        engine.step()
        cases.check(found, wanted, f"ZeRO-{stage} {call.__name__} {options}", TOLERANCE[stage])


def check_refused() -> None:
    """ZeRO-3: adapters of the head, and a loss outside of the engine's forward pass."""
    ids = cases.ids_of(torch.distributed.get_rank(), 0)
    engine = engine_of(cases.base_model(lora=True), 3)
    with pytest.raises(ValueError, match="with ZeRO-3, merge the adapter of the head"):
        cases.logps_of(engine, ids)
    inside = cases.base_model()
    engine_of(inside, 3)
    weight = inside.lm_head.weight
    with (
        deepspeed.zero.GatheredParameters(weight),
        pytest.raises(TypeError, match="weight is a parameter of DeepSpeed ZeRO-3"),
    ):
        ll.linear_logps(torch.randn(3, weight.shape[1]), weight, torch.tensor([1, 2, 3]))


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for stage in (1, 2, 3):
        for call in (cases.loss_of, cases.logps_of, cases.nothing_scored, cases.at_head_of):
            check_stage(stage, call, {})
        check_stage(stage, cases.logps_of, {"kind": "qwen2"})
        check_stage(stage, cases.loss_of, {"checkpointing": True})
        if stage < 3:
            check_stage(stage, cases.logps_of, {"lora": True})
    check_refused()
    if torch.distributed.get_rank() == 0:
        print("DeepSpeed ZeRO-1, 2, 3: gradients are those of one process")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
