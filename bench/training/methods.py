"""What is trained with: for each method TRL's trainer and its inputs, logitless's module and its inputs, and the exact loss.

One entry of :data:`METHODS` a method; adding one here is all that it takes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import logitless as ll

from .. import losses, policy_losses
from .batches import Batch, concatenated_examples, paired_examples, rollout_inputs, unpaired_examples

if TYPE_CHECKING:
    from .workbench import Data, Workbench


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        trainer: makes TRL's trainer from keyword arguments: model, ref_model, peft_config, and ``args`` of its config.
        inputs: of TRL's ``compute_loss``, on the device.
        module: logitless's loss module.
        arguments: what the module gets besides packed hidden states, weight and labels.
        exact: the loss from float64 log-probs (S, T - 1), 0 where none are asked for, with plain formulas.
        reference: whether there is a reference model. kl: whether a batch of mismatched pairs runs through both models too.
        every_token: whether the loss reads prompts' log-probs too.
        fused: whether TRL's trainer has its fused head; else it makes whole logits.
    """

    trainer: Callable[..., Any]
    inputs: Callable[[Any, Batch, Data], dict[str, Any]]
    module: Callable[[], Any]
    arguments: Callable[[Workbench, Data], dict[str, Any]]
    exact: Callable[[Tensor, Data], Tensor]
    reference: bool = False
    kl: bool = False
    every_token: bool = False
    fused: bool = True


def _tokenizer() -> Any:
    """The trainers ask for one, and are handed token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    core = Tokenizer(WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="a")


def _common(device: torch.device, sequences: int) -> dict[str, Any]:
    """Of every trainer's config. The batches are cut to length already, and gradient checkpointing is the model's business."""
    return {
        "output_dir": str(Path(tempfile.gettempdir()) / "logitless-bench"),  # a trainer makes it, and writes nothing there
        "per_device_train_batch_size": sequences,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
    }


def _quiet() -> None:
    from datasets import disable_progress_bars

    disable_progress_bars()  # they would tear the benchmark's own output to pieces
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def _dpo_trainer(device: torch.device, sequences: int, **models: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    _quiet()
    rows = {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["a b"] * 2}
    args = DPOConfig(**_common(device, sequences), beta=losses.DPO_BETA, max_length=None)
    return DPOTrainer(args=args, train_dataset=Dataset.from_dict(rows), processing_class=_tokenizer(), **models)


def _kto_trainer(device: torch.device, sequences: int, **models: Any) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    _quiet()
    rows = {"prompt": ["a"] * 4, "completion": ["b", "a b"] * 2, "label": [True, False] * 2}
    args = KTOConfig(**{**_common(device, sequences), "per_device_train_batch_size": 2}, beta=losses.KTO_BETA, max_length=None)
    return KTOTrainer(args=args, train_dataset=Dataset.from_dict(rows), processing_class=_tokenizer(), **models)


def _concatenated_trainer(name: str, **options: Any) -> Callable[..., Any]:
    def make(device: torch.device, sequences: int, ref_model: Any = None, **models: Any) -> Any:
        from datasets import Dataset

        _quiet()
        if name == "ORPO":
            from trl.experimental.orpo import ORPOConfig as Config
            from trl.experimental.orpo import ORPOTrainer as Trainer
        else:
            from trl.experimental.cpo import CPOConfig as Config
            from trl.experimental.cpo import CPOTrainer as Trainer
        rows = {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["a b"] * 2}
        args = Config(**_common(device, sequences), max_length=1 << 20, remove_unused_columns=False, **options)
        return Trainer(args=args, train_dataset=Dataset.from_dict(rows), processing_class=_tokenizer(), **models)

    return make


def _grpo_trainer(device: torch.device, sequences: int, ref_model: Any = None, **models: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    _quiet()
    args = GRPOConfig(
        **_common(device, sequences),
        num_generations=2,
        steps_per_generation=1,
        loss_type="dapo",
        beta=0.0,
        epsilon=policy_losses.EPSILON_LOW,
        epsilon_high=policy_losses.EPSILON_HIGH,
        temperature=1.0,
    )
    return GRPOTrainer(
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 4}),
        processing_class=_tokenizer(),
        **models,
    )


def _collated(examples: Callable[[Batch], list[Any]]) -> Callable[[Any, Batch, Data], dict[str, Any]]:
    """By the trainer's own collator."""

    def inputs(trainer: Any, batch: Batch, data: Data) -> dict[str, Any]:
        made = trainer.data_collator(examples(batch))
        return {name: value.to(data.device) if isinstance(value, Tensor) else value for name, value in made.items()}

    return inputs


def _rollouts(trainer: Any, batch: Batch, data: Data) -> dict[str, Any]:
    """A group's rollouts, generated and scored before."""
    inputs: dict[str, Any] = rollout_inputs(batch, data.device)
    old_logps = torch.zeros(inputs["completion_ids"].shape, device=data.device)
    for row, prompt, completion, values in zip(old_logps, batch.prompts, batch.completions, data.old_logps, strict=True):
        row[: len(completion)] = values[len(prompt) - 1 : len(prompt) + len(completion) - 1]
    return {
        **inputs,
        "advantages": data.advantages,
        "old_per_token_logps": old_logps,
        "num_items_in_batch": torch.tensor(batch.scored, device=data.device),
    }


def _reference_sums(bench: Workbench, data: Data) -> dict[str, Any]:
    return {"ref_logps": bench.reference_sums(data.packed)}


def _kto_arguments(bench: Workbench, data: Data) -> dict[str, Any]:
    with torch.no_grad():
        ratios = bench.policy_sums(data.packed_kl) - bench.reference_sums(data.packed_kl)
    return {"ref_logps": bench.reference_sums(data.packed), "desirable": data.desirable, "kl": ratios.mean()}


def _rollout_arguments(bench: Workbench, data: Data) -> dict[str, Any]:
    old_logps = torch.cat([row[:n] for row, n in zip(data.old_logps, data.lengths, strict=True)])
    return {"advantages": data.advantages, "old_logps": old_logps}


def _of_losses(loss: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Data], Tensor]:
    """One of the benchmark's plain losses on what it reads of its inputs."""

    def exact(logps: Tensor, data: Data) -> Tensor:
        view: Any = SimpleNamespace(
            scored=data.scored, ref_logps=data.exact_ref, desirable=data.desirable, kl=data.exact_kl, rollouts=None
        )
        return loss(logps, view)

    return exact


def _simpo(logps: Tensor, data: Data) -> Tensor:
    return losses.simpo(logps, SimpleNamespace(scored=data.scored))  # type: ignore[arg-type]


def _orpo(logps: Tensor, data: Data) -> Tensor:
    """With the NLL over prompt and response, as TRL has it: here ``logps`` holds every token that is not padding."""
    responses = torch.where(data.scored, logps, 0)
    means = responses.sum(-1) / data.scored.sum(-1)
    half = len(means) // 2
    odds = means - torch.log(-torch.expm1(means))
    nll = -logps[:half].sum() / data.present[:half].sum()
    return nll - losses.ORPO_BETA * F.logsigmoid(odds[:half] - odds[half:]).mean()


def _dapo(logps: Tensor, data: Data) -> Tensor:
    rollouts = SimpleNamespace(advantages=data.advantages[:, None], old_logps=data.old_logps[:, : logps.shape[1]])
    return policy_losses.dapo(logps, SimpleNamespace(scored=data.scored, rollouts=rollouts))  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "dpo": Method(
        _dpo_trainer,
        _collated(paired_examples),
        lambda: ll.FusedLinearDPOLoss(losses.DPO_BETA),
        _reference_sums,
        _of_losses(losses.dpo),
        reference=True,
    ),
    "kto": Method(
        _kto_trainer,
        _collated(unpaired_examples),
        lambda: ll.FusedLinearKTOLoss(losses.KTO_BETA),
        _kto_arguments,
        _of_losses(losses.kto),
        reference=True,
        kl=True,
    ),
    "simpo": Method(
        _concatenated_trainer("CPO", loss_type="simpo", cpo_alpha=0.0, beta=losses.SIMPO_BETA, simpo_gamma=losses.SIMPO_GAMMA),
        _collated(concatenated_examples),
        lambda: ll.FusedLinearSimPOLoss(losses.SIMPO_BETA, losses.SIMPO_GAMMA),
        lambda bench, data: {},
        _simpo,
        fused=False,
    ),
    "orpo": Method(
        _concatenated_trainer("ORPO", beta=losses.ORPO_BETA),
        _collated(concatenated_examples),
        lambda: ll.FusedLinearORPOLoss(losses.ORPO_BETA),
        lambda bench, data: {"nll_labels": data.every_label},
        _orpo,
        every_token=True,
        fused=False,
    ),
    "grpo": Method(
        _grpo_trainer,
        _rollouts,
        lambda: ll.FusedLinearGRPOLoss("dapo", epsilon_low=policy_losses.EPSILON_LOW, epsilon_high=policy_losses.EPSILON_HIGH),
        _rollout_arguments,
        _dapo,
    ),
}
