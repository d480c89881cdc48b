"""Providers of the suite ``train``: a step of TRL's DPOTrainer on a small transformer, stock and on logitless."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .cases import IGNORE, Case, Inputs
from .reference import Reference
from .registry import Result, Work, not_installed, provider

_LAYERS = 2
_PACKAGES = ("trl", "transformers", "datasets")


def _model(case: Case, seed: int, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = case.shape
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=shape.tokens,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(device=device, dtype=shape.torch_dtype)
    model.lm_head.weight.requires_grad_(case.train_head)
    return model


def _batch(case: Case, device: torch.device) -> dict[str, Tensor]:
    """What the trainer's collator makes of a preference data set: token ids, chosen first, and where completions are."""
    shape = case.shape
    g = torch.Generator().manual_seed(shape.seed)
    ids = torch.randint(3, shape.vocab, (shape.sequences, shape.tokens), generator=g)
    completion = torch.ones_like(ids)
    completion[:, : max(1, shape.prompt)] = 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    return {key: value.to(device) for key, value in batch.items()}


def _tokenizer() -> Any:
    """The trainer asks for one, and is handed token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    core = Tokenizer(WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="a")


def _trainer(case: Case, device: torch.device) -> Any:
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()  # they would tear the benchmark's own to pieces
    rows = {"prompt": ["a"] * 2, "chosen": ["b"] * 2, "rejected": ["a b"] * 2}
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="logitless-bench-"),
        beta=losses.DPO_BETA,
        bf16=False,
        gradient_checkpointing=False,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )
    return DPOTrainer(
        model=_model(case, 1, device),
        ref_model=_model(case, 2, device),
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=_tokenizer(),
    )


def _collect(model: Any) -> tuple[Tensor, Tensor | None]:
    """Gradients of all parameters but the head, end to end, (1, count), and of the head."""
    head = model.get_output_embeddings().weight
    rest = [p.grad.reshape(-1) for p in model.parameters() if p is not head and p.grad is not None]
    return torch.cat(rest)[None], head.grad


def train_reference(case: Case, inputs: Inputs) -> Reference:
    """The same models and batch in float64, by the definition of the loss."""
    device = inputs.hidden.device
    batch = _batch(case, device)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)[:, 1:]

    def logps(model: Any) -> Tensor:
        logits = model.double()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        values = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(labels != IGNORE, values, 0).sum(-1)

    model = _model(case, 1, device)
    with torch.no_grad():
        reference = logps(_model(case, 2, device))
    chosen, rejected = (logps(model) - reference).chunk(2)
    loss = -F.logsigmoid(losses.DPO_BETA * (chosen - rejected)).mean()
    loss.backward()
    rest, head = _collect(model)
    return Reference(loss.item(), None, None, rest, head)


def _work(case: Case, inputs: Inputs, around: Callable[[], Any] | None = None) -> Work:
    device = inputs.hidden.device
    trainer = _trainer(case, device)
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop, which does not run here
    model = trainer.model
    # A learning rate of 0 pays for the optimizer's step and leaves every round with the same weights.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batch = _batch(case, device)

    def run() -> Tensor:
        loss: Tensor = trainer.training_step(model, batch)
        optimizer.step()
        return loss

    def step() -> Result:
        optimizer.zero_grad()
        if around is None:
            loss = run()
        else:
            with around():
                loss = run()
        rest, head = _collect(model)
        return Result(loss=loss.detach(), dhidden=rest, dweight=head)

    return Work(step)


def _unavailable(case: Case, device: torch.device) -> list[str]:
    missing = [reason for package in _PACKAGES for reason in not_installed(package)]
    return missing + (["the model of this suite has no soft-cap"] if case.shape.softcap else [])


@provider("trl:trainer", tasks={"train"}, why_not=_unavailable, warm_up=True)
def stock(case: Case, inputs: Inputs) -> Work:
    """TRL's trainer as it is."""
    return _work(case, inputs)


def _no_integration(case: Case, device: torch.device) -> list[str]:
    try:
        from logitless.integrations.trl import patch  # noqa: F401
    except ImportError as error:
        return [f"logitless.integrations.trl cannot be imported: {error}"]
    return _unavailable(case, device)


@provider("logitless:trainer", tasks={"train"}, why_not=_no_integration, warm_up=True)
def patched(case: Case, inputs: Inputs) -> Work:
    """TRL's trainer on logitless."""
    from logitless.integrations import trl

    return _work(case, inputs, trl.patch)
