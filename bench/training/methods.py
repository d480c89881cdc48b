"""What is trained with: for each method TRL's trainer and its inputs, logitless's module, and the exact loss.

A method is one entry of :data:`METHODS`.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import logitless as ll

from ..losses import loss_of
from ..losses.policy import EPSILON_HIGH, EPSILON_LOW
from ..losses.preference import DPO_BETA, KTO_BETA, ORPO_BETA, SIMPO_BETA, SIMPO_GAMMA, odds_ratio
from .batches import Batch, Data, concatenated_examples, paired_examples, rollout_inputs, unpaired_examples


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        trainer: makes TRL's trainer from device, number of sequences, and the keywords model, ref_model, peft_config.
        inputs: of TRL's ``compute_loss``, on the device.
        module: logitless's loss module.
        exact: the loss from float64 log-probs (S, T - 1), 0 where none are asked for, with plain formulas.
        reference: whether there is a reference model. kl: whether a batch of mismatched pairs runs through both models too.
        rollouts: whether old log-probs and advantages come with the batch.
        every_token: whether the loss reads the prompts' log-probs too.
        fused: whether TRL's trainer has a fused head; else it materialises whole logits.
    """

    trainer: Callable[..., Any]
    inputs: Callable[[Any, Batch, Data], dict[str, Any]]
    module: Callable[[], Any]
    exact: Callable[[Tensor, Data], Tensor]
    reference: bool = False
    kl: bool = False
    rollouts: bool = False
    every_token: bool = False
    fused: bool = True


def _tokenizer() -> Any:
    """The trainers require one, although they get token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    core = Tokenizer(WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="a")


_PAIRS: dict[str, list[Any]] = {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["a b"] * 2}
_LABELLED: dict[str, list[Any]] = {"prompt": ["a"] * 4, "completion": ["b", "a b"] * 2, "label": [True, False] * 2}
#: Of TRL's CPO and ORPO trainers, which cut sequences by default.
_WHOLE = {"max_length": 1 << 20, "remove_unused_columns": False}
_SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": SIMPO_BETA, "simpo_gamma": SIMPO_GAMMA}
_DAPO = {"loss_type": "dapo", "beta": 0.0, "epsilon": EPSILON_LOW, "epsilon_high": EPSILON_HIGH}


def _trainer(module: str, name: str, rows: dict[str, list[Any]], **options: Any) -> Callable[..., Any]:
    """Makes ``{name}Trainer`` of a module of TRL's on a dataset of placeholders; ``options`` are those of its config.

    The batches are cut to length already, and gradient checkpointing is set on the model.
    """
    more = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if name == "GRPO" else {}

    def make(device: torch.device, sequences: int, **models: Any) -> Any:
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()  # they would interrupt the benchmark's own output
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        package = importlib.import_module(module)
        common = {
            "output_dir": str(Path(tempfile.gettempdir()) / "logitless-bench"),  # a trainer makes it, and writes nothing there
            "per_device_train_batch_size": sequences,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": device.type == "cpu",
        }
        config = getattr(package, f"{name}Config")(**{**common, **options})
        data = {"train_dataset": Dataset.from_dict(rows), "processing_class": _tokenizer()}
        return getattr(package, f"{name}Trainer")(args=config, **data, **more, **models)

    return make


def _collated(examples: Callable[[Batch], list[Any]]) -> Callable[[Any, Batch, Data], dict[str, Any]]:
    """By the trainer's own collator."""

    def inputs(trainer: Any, batch: Batch, data: Data) -> dict[str, Any]:
        made = trainer.data_collator(examples(batch))
        return {name: value.to(data.ids.device) if isinstance(value, Tensor) else value for name, value in made.items()}

    return inputs


def _rollouts(trainer: Any, batch: Batch, data: Data) -> dict[str, Any]:
    """A group's rollouts, already generated and scored."""
    inputs: dict[str, Any] = rollout_inputs(batch, data.ids.device)
    old_logps = torch.zeros(inputs["completion_ids"].shape, device=data.ids.device)
    for row, prompt, completion, values in zip(old_logps, batch.prompts, batch.completions, data.old_logps, strict=True):
        row[: len(completion)] = values[len(prompt) - 1 : len(prompt) + len(completion) - 1]
    items = torch.tensor(batch.scored, device=data.ids.device)
    return {**inputs, "advantages": data.advantages, "old_per_token_logps": old_logps, "num_items_in_batch": items}


def _exact(task: str) -> Callable[[Tensor, Data], Tensor]:
    """One of the benchmark's plain losses."""
    return lambda logps, data: loss_of(task)(logps, data.loss_inputs, None)


def _orpo(logps: Tensor, data: Data) -> Tensor:
    """With the NLL over prompt and response, as in TRL: here ``logps`` holds every token that is not padding."""
    half = len(logps) // 2
    nll = -logps[:half].sum() / data.present[:half].sum()
    return nll + ORPO_BETA * odds_ratio(torch.where(data.scored, logps, 0).sum(-1) / data.scored.sum(-1))


METHODS: dict[str, Method] = {
    "dpo": Method(
        _trainer("trl", "DPO", _PAIRS, beta=DPO_BETA, max_length=None),
        _collated(paired_examples),
        lambda: ll.FusedLinearDPOLoss(DPO_BETA),
        _exact("dpo"),
        reference=True,
    ),
    "kto": Method(
        _trainer("trl", "KTO", _LABELLED, beta=KTO_BETA, max_length=None, per_device_train_batch_size=2),
        _collated(unpaired_examples),
        lambda: ll.FusedLinearKTOLoss(KTO_BETA),
        _exact("kto"),
        reference=True,
        kl=True,
    ),
    "simpo": Method(
        _trainer("trl.experimental.cpo", "CPO", _PAIRS, **_WHOLE, **_SIMPO),
        _collated(concatenated_examples),
        lambda: ll.FusedLinearSimPOLoss(SIMPO_BETA, SIMPO_GAMMA),
        _exact("simpo"),
        fused=False,
    ),
    "orpo": Method(
        _trainer("trl.experimental.orpo", "ORPO", _PAIRS, **_WHOLE, beta=ORPO_BETA),
        _collated(concatenated_examples),
        lambda: ll.FusedLinearORPOLoss(ORPO_BETA),
        _orpo,
        every_token=True,
        fused=False,
    ),
    "grpo": Method(
        _trainer("trl", "GRPO", {"prompt": ["a"] * 4}, **_DAPO, num_generations=2, steps_per_generation=1, temperature=1.0),
        _rollouts,
        lambda: ll.FusedLinearGRPOLoss("dapo", epsilon_low=EPSILON_LOW, epsilon_high=EPSILON_HIGH),
        _exact("dapo"),
        rollouts=True,
    ),
}
