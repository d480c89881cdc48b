"""DPO with TRL's own trainer on logitless, from scratch.

The script trains a tokenizer on ``examples/data/docstring_pairs.jsonl``, makes a tiny Llama with random weights, saves and
loads both like any checkpoint, and runs ``trl.DPOTrainer``, which learns which docstring belongs to a function. The reward
margin rises from 0, and the accuracy on held-out pairs exceeds 0.9::

    python examples/dpo_trl.py                # half a minute on two cores
    python examples/dpo_trl.py --no-patch     # the same on TRL's own head, with the same results

Nothing is downloaded. Requires ``pip install logitless[trl]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trl import DPOConfig, DPOTrainer

from logitless.integrations import trl as logitless_trl

DATA = Path(__file__).resolve().parent / "data" / "docstring_pairs.jsonl"
VOCABULARY = 2048
MAX_LENGTH = 96


class Progress(NamedTuple):
    """Reward margins and accuracies of a run, as (step, value)."""

    train_margins: list[tuple[int, float]]
    held_out_margins: list[tuple[int, float]]
    held_out_accuracy: list[tuple[int, float]]


def load_pairs(path: Path) -> dict[str, Dataset]:
    """The splits ``train`` and ``test``, with the columns that DPOTrainer expects."""
    pairs = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    return {
        split: Dataset.from_list([{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs if p["split"] == split])
        for split in ("train", "test")
    }


def make_checkpoint(path: Path, texts: Sequence[str], seed: int) -> None:
    """Save a byte-level BPE tokenizer trained on the texts, and a Llama with 400 thousand random weights, to a folder."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


class Report(transformers.TrainerCallback):
    """Print margins and accuracies during training, and store them."""

    def __init__(self) -> None:
        self.progress = Progress([], [], [])

    def on_log(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        logs, step = logs or {}, state.global_step
        if "rewards/margins" in logs:
            margin = logs["rewards/margins"]
            self.progress.train_margins.append((step, margin))
            print(f"step {step:4d}   train:    loss {logs['loss']:.4f}   margin {margin:7.3f}", flush=True)
        if "eval_rewards/margins" in logs:
            margin, accuracy = logs["eval_rewards/margins"], logs["eval_rewards/accuracies"]
            self.progress.held_out_margins.append((step, margin))
            self.progress.held_out_accuracy.append((step, accuracy))
            print(f"step {step:4d}   held out: accuracy {accuracy:.3f}   margin {margin:7.3f}", flush=True)


def run(steps: int, seed: int, output_dir: Path, patch: bool = True) -> Progress:
    """Train for ``steps`` steps. Returns the margins and accuracies that were logged."""
    pairs = load_pairs(DATA)
    checkpoint = output_dir / "start"
    make_checkpoint(checkpoint, [row["prompt"] + row["chosen"] + row["rejected"] for row in pairs["train"]], seed)
    config = DPOConfig(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=len(pairs["test"]),  # one batch: TRL averages over batches, whatever their size
        learning_rate=1e-3,
        warmup_steps=10,
        max_length=MAX_LENGTH,
        logging_steps=max(1, steps // 12),
        eval_strategy="steps",
        eval_steps=max(1, steps // 4),
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )
    report = Report()
    with logitless_trl.patch() if patch else nullcontext():
        trainer = DPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
            args=config,
            train_dataset=pairs["train"],
            eval_dataset=pairs["test"],
            processing_class=transformers.AutoTokenizer.from_pretrained(checkpoint),
            callbacks=[report],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return report.progress


def main(arguments: Sequence[str] | None = None) -> Progress:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of 16 pairs (default: 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("trainer_output/dpo_trl"))
    parser.add_argument("--no-patch", action="store_true", help="run TRL's own head, for comparison")
    parser.add_argument("--quick", action="store_true", help="40 steps, overriding --steps")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    progress = run(40 if options.quick else options.steps, options.seed, options.output_dir, patch=not options.no_patch)
    accuracy = progress.held_out_accuracy[-1][1]
    print(f"held-out accuracy {accuracy:.3f} on the {'TRL' if options.no_patch else 'logitless'} head")
    return progress


if __name__ == "__main__":
    main()
