"""TRL's DPO, CPO and GRPO trainers on 2 ranks log the same, and end with the same weights, with and without ``patch()``.

Run by ``make test-distributed``: ``torchrun --nproc-per-node 2 -m tests.distributed.trl_trainers``.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import peft
import torch
import transformers
import trl
from accelerate.utils import DistributedDataParallelKwargs
from trl.experimental import cpo

from logitless.integrations import trl as swap

from ..integrations.tiny import make_model, make_tokenizer, text, training_options

STEPS = 4


def checkpoint(out: Path) -> Any:
    """A model that was loaded from a folder, which trainers with a reference model load again."""
    return transformers.AutoModelForCausalLM.from_pretrained(out.parents[1] / "untied", dtype=torch.float32)


def sentences() -> list[dict[str, str]]:
    rng = random.Random(0)
    lengths = [(rng.randint(2, 6), rng.randint(3, 9), rng.randint(3, 9)) for _ in range(48)]
    return [{"prompt": text(rng, p), "chosen": " " + text(rng, c), "rejected": " " + text(rng, r)} for p, c, r in lengths]


def options(out: Path, **more: Any) -> dict[str, Any]:
    # Adam would make whole steps of gradients that are 0 but for rounding
    return training_options(out, STEPS) | {"optim": "sgd", "learning_rate": 0.1} | more


def dpo(out: Path, **more: Any) -> Any:
    data = datasets.Dataset.from_list(sentences())
    return trl.DPOTrainer(
        model=checkpoint(out),
        args=trl.DPOConfig(**options(out)),
        train_dataset=data,
        processing_class=make_tokenizer(),
        **more,
    )


def dpo_lora(out: Path) -> Any:
    return dpo(out, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def cpo_static_graph(out: Path, **more: Any) -> Any:
    trainer = cpo_plain(out, **more)
    trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(static_graph=True)
    return trainer


def cpo_plain(out: Path, **more: Any) -> Any:
    return cpo.CPOTrainer(
        model=make_model("tied", 0),
        args=cpo.CPOConfig(**options(out, remove_unused_columns=False) | more),
        train_dataset=datasets.Dataset.from_list(sentences()),
        processing_class=make_tokenizer(),
    )


def grpo(out: Path) -> Any:
    given = options(out)
    del given["max_length"]
    own = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.7, "beta": 0.04}
    return trl.GRPOTrainer(
        model=checkpoint(out),
        reward_funcs=lambda completions, **_: [float(c.count("d")) for c in completions],
        args=trl.GRPOConfig(**given | own),
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in sentences()]),
        processing_class=make_tokenizer(),
    )


def run(make: Callable[[Path], Any], out: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    trainer = make(out)
    trainer.train()
    assert trainer.accelerator.num_processes == torch.distributed.get_world_size() == 2
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def check(make: Callable[[Path], Any], folder: Path) -> None:
    logs, weights = run(make, folder / "theirs")
    with swap.patch():
        own_logs, own_weights = run(make, folder / "ours")
    assert len(logs) == len(own_logs) == STEPS
    for a, b in zip(own_logs, logs, strict=True):
        for name in ("loss", "grad_norm"):
            assert abs(a[name] - b[name]) <= 2e-5 * max(1.0, abs(b[name])), (make.__name__, name, a[name], b[name])
    for name, wanted in weights.items():
        found = own_weights[name]
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm()), (make.__name__, name)
        first = found.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, found), (make.__name__, name, "differs between ranks")
    if torch.distributed.get_rank() == 0:
        print(f"TRL {make.__name__}: the same with patch() and without", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_model("untied", 0).save_pretrained(Path(folder) / "untied")  # each rank its own, before the group exists
        for make in (dpo, dpo_lora, cpo_plain, cpo_static_graph, grpo):
            check(make, Path(folder) / make.__name__)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
