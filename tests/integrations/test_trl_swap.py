"""TRL's trainers do on logitless what they do on their own head: same numbers, fewer passes, every contract kept."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import logitless as ll
from logitless.integrations import trl as swap

from .tiny import VOCAB, make_model, make_tokenizer, text, training_options

EVERY_BACKEND = True

datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
chunked_logprob = pytest.importorskip("trl.kernels.chunked_logprob")
utils = pytest.importorskip("trl.trainer.utils")

ROUND = 2.0**-23  # distance from 1 to the next float32
STEPS = 20
HIDDEN = 32
OWN = utils._ChunkedLogProbFunction
OWN_USE_TRITON = utils._use_triton
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    swap.unpatch()
    torch.set_num_threads(threads)
    assert utils._ChunkedLogProbFunction is OWN and utils._use_triton is OWN_USE_TRITON


def sentences() -> list[dict[str, str]]:
    rng = random.Random(0)
    lengths = [(rng.randint(2, 6), rng.randint(3, 9), rng.randint(3, 9)) for _ in range(80)]
    return [{"prompt": text(rng, p), "chosen": " " + text(rng, c), "rejected": " " + text(rng, r)} for p, c, r in lengths]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a model with random weights, and returns the folder."""
    saved: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in saved:
            saved[kind] = tmp_path_factory.mktemp(kind)
            make_model(kind, 0, HIDDEN).save_pretrained(saved[kind])
        return saved[kind]

    return save


def load(path: Path, heads: bool = False) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if heads:
        utils.add_fused_lm_head(model, outputs=("log_probs", *OUTPUTS))
    return model


def make_trainer(kind: str, path: Path, out: Path, lora: bool = False, **options: Any) -> transformers.Trainer:
    torch.set_num_threads(1)
    common = training_options(out, STEPS) | options
    rows = sentences()
    extra: dict[str, Any] = {"processing_class": make_tokenizer()}
    if lora:
        extra["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if kind == "dpo":
        data = datasets.Dataset.from_list(rows)
        return trl.DPOTrainer(model=load(path), args=trl.DPOConfig(**common), train_dataset=data, **extra)
    sides = ("chosen", "rejected")
    rows = [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in rows for side in sides]
    data = datasets.Dataset.from_list(rows)
    return trl.KTOTrainer(model=load(path), args=trl.KTOConfig(**common), train_dataset=data, **extra)


def history(trainer: transformers.Trainer) -> list[dict[str, float]]:
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == trainer.args.max_steps
    return logs


def assert_same_run(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], beta: float, again: list[dict[str, float]] | None = None
) -> None:
    """Every logged number agrees to 4 roundings of the float32 numbers that it was made of, at every step.

    Rounding a sequence's log-probability, of size L, moves it by ``ROUND * L``. ``beta`` times that reaches the rewards,
    and with them the loss and its gradient. Entropies and logits are means over tokens, so they move by their own rounding.
    Training carries rounding on to later steps: ``again`` is their run with other roundings, whose spread is granted twice.
    """
    spread: dict[str, float] = {}
    for a, b in zip(again or theirs, theirs, strict=True):
        for name in b:
            spread[name] = max(spread.get(name, 0.0), abs(a[name] - b[name]))
    largest = max(abs(value) for log in theirs for name, value in log.items() if name.startswith("logps/"))
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if name.startswith("logps/") or name == "kl":
                size = largest
            elif name in ("loss", "grad_norm") or name.startswith("rewards/"):
                size = max(1.0, abs(value)) * max(1.0, beta * largest)
            else:
                size = max(1.0, abs(value))
            assert abs(a[name] - value) <= 4 * ROUND * size + 2 * spread[name], (step, name, a[name], value)


@pytest.fixture
def rows_scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call that TRL makes of the drop-in."""
    seen: list[int] = []
    original = swap.LogProbFunction.apply

    def spy(hidden: Tensor, *args: Any) -> Any:
        seen.append(len(hidden))
        return original(hidden, *args)

    monkeypatch.setattr(swap.LogProbFunction, "apply", staticmethod(spy))
    return seen


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("kind", "model"), [("dpo", "untied"), ("kto", "untied"), ("dpo", "tied"), ("kto", "softcap")])
def test_twenty_steps_log_the_same_losses_norms_and_metrics(checkpoint, tmp_path, kind, model, lora, rows_scored, monkeypatch):
    path = checkpoint(model)
    theirs = make_trainer(kind, path, tmp_path / "theirs", lora)
    expected = history(theirs)
    with monkeypatch.context() as patched:
        patched.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 5)
        again = history(make_trainer(kind, path, tmp_path / "again", lora))
    assert not rows_scored
    with swap.patch():
        ours = make_trainer(kind, path, tmp_path / "ours", lora)
        found = history(ours)
    assert len(rows_scored) >= 2 * STEPS  # policy and reference
    assert_same_run(found, expected, theirs.args.beta, again)
    assert expected[-1]["loss"] != expected[0]["loss"]


def test_gradient_checkpointing_changes_nothing(checkpoint, tmp_path):
    path = checkpoint("untied")
    expected = history(make_trainer("dpo", path, tmp_path / "plain", max_steps=5))
    with swap.patch():
        trainer = make_trainer("dpo", path, tmp_path / "gc", max_steps=5, gradient_checkpointing=True)
        found = history(trainer)
    assert trainer.model.is_gradient_checkpointing
    assert_same_run(found, expected, trainer.args.beta)


def test_bf16_autocast_trains(checkpoint, tmp_path, rows_scored):
    path = checkpoint("untied")
    expected = history(make_trainer("dpo", path, tmp_path / "theirs", max_steps=3, bf16=True))
    with swap.patch():
        found = history(make_trainer("dpo", path, tmp_path / "ours", max_steps=3, bf16=True))
    assert rows_scored
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2.0**-7)
        assert a["logps/chosen"] == pytest.approx(b["logps/chosen"], rel=2.0**-7)


def test_trainer_made_before_the_patch_runs_on_it_and_only_while_it_holds(checkpoint, tmp_path, rows_scored):
    trainer = make_trainer("dpo", checkpoint("untied"), tmp_path, max_steps=1)
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, inputs)
    assert rows_scored == []
    with swap.patch():
        trainer.compute_loss(trainer.model, inputs)
    scored = int(inputs["completion_mask"][:, 1:].sum())
    assert rows_scored == [scored, scored]  # policy and reference; masked positions are not handed over
    assert scored < inputs["completion_mask"][:, 1:].numel()
    trainer.compute_loss(trainer.model, inputs)
    assert len(rows_scored) == 2


@pytest.mark.parametrize(("lora", "passes"), [(True, 4), (False, 8)], ids=["frozen head", "trained head"])
def test_head_costs_4_passes_when_frozen_on_scored_tokens_only(checkpoint, tmp_path, lora, passes):
    trainer = make_trainer("dpo", checkpoint("untied"), tmp_path, lora, max_steps=1)
    inputs = next(iter(trainer.get_train_dataloader()))
    with swap.patch(), FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, inputs).backward()
    counts = counter.get_flop_counts()["Global"]
    spent = sum(n for op, n in counts.items() if str(op).startswith("logitless."))
    unit = int(inputs["completion_mask"][:, 1:].sum()) * HIDDEN * VOCAB
    assert spent == (passes + 2) * unit  # 2 for the reference


def test_grpo_logs_the_same(checkpoint, tmp_path, rows_scored):
    path = checkpoint("untied")

    def run(out: Path) -> list[dict[str, float]]:
        torch.set_num_threads(1)
        args = trl.GRPOConfig(
            output_dir=str(out),
            max_steps=3,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            temperature=0.7,
            beta=0.04,
            logging_steps=1,
            optim="sgd",  # Adam would make whole steps of gradients that are 0 but for rounding
            learning_rate=0.1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=3,
        )
        trainer = trl.GRPOTrainer(
            model=load(path),
            reward_funcs=lambda completions, **_: [float(c.count("d")) for c in completions],
            args=args,
            train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in sentences()]),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log]

    expected = run(tmp_path / "theirs")
    with swap.patch():
        found = run(tmp_path / "ours")
    assert rows_scored
    # a token's log-probability is of size 10 at most
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "entropy"):
            assert abs(a[name] - b[name]) <= 4 * ROUND * 10 * max(1.0, abs(b[name])), (name, a[name], b[name])


def function_inputs(
    bias: bool = True, train: str = "hwb", dtype: torch.dtype = torch.float32, rows: int = 13
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 24, generator=g).to(dtype).requires_grad_("h" in train)
    weight = (torch.randn(203, 24, generator=g) * 0.5).to(dtype).requires_grad_("w" in train)
    b = torch.randn(203, generator=g).to(dtype).requires_grad_("b" in train) if bias else None
    return hidden, weight, b, torch.randint(203, (rows,), generator=g)


def run_function(
    function: Any,
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    cap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = OUTPUTS,
    with_entropy: bool = True,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """All five outputs, and the gradients of a weighted sum of the log-probabilities and entropies."""
    hidden, weight, bias, targets = inputs
    results = function.apply(hidden, weight, bias, targets, temperature, 64, cap, scale, outputs)
    g = torch.Generator().manual_seed(2)
    loss = (results[0] * torch.randn(len(targets), generator=g)).sum()
    if with_entropy and results[1] is not None:
        loss = loss + (results[1] * torch.randn(len(targets), generator=g)).sum()
    leaves = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return list(results), list(torch.autograd.grad(loss, leaves)) if leaves else []


def largest_logit(inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], head: ll.HeadSpec) -> float:
    hidden, weight, bias, _ = inputs
    return head.apply(nn.functional.linear(hidden, weight, bias)).abs().max().item()


def assert_close(ours: Tensor | None, theirs: Tensor | None, logit: float = 10.0) -> None:
    """Same dtype and shape, and as close as 4 roundings of the float32 logits allow.

    Rounding a logit z moves log-probabilities by ``ROUND * |z|`` and probabilities, hence gradients, by that fraction.
    """
    assert (ours is None) == (theirs is None)
    if ours is None or theirs is None:
        return
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if theirs.dtype == torch.bool:
        assert torch.equal(ours, theirs)
        return
    size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * ROUND * logit * size)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("cap", [None, 2.5], ids=["no cap", "cap"])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.25, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "logps and entropy"])
def test_outputs_and_gradients_agree_with_trl(bias, cap, scale, temperature, with_entropy):
    inputs = function_inputs(bias)
    ours = run_function(swap.LogProbFunction, inputs, cap, scale, temperature, with_entropy=with_entropy)
    theirs = run_function(OWN, inputs, cap, scale, temperature, with_entropy=with_entropy)
    logit = largest_logit(inputs, ll.HeadSpec(scale, cap, temperature))
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert_close(a, b, logit)
    assert [r.requires_grad for r in ours[0]] == [r.requires_grad for r in theirs[0]]


@pytest.mark.parametrize("train", ["h", "w", "b", "hw", "hb", "wb", "hwb", ""])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_every_choice_of_trained_tensors_gets_its_gradients(train, with_entropy):
    inputs = function_inputs(train=train)
    ours = run_function(swap.LogProbFunction, inputs, with_entropy=with_entropy)[1]
    theirs = run_function(OWN, inputs, with_entropy=with_entropy)[1]
    assert len(ours) == len(train)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("outputs", [(), ("log_probs",), ("log_probs", "is_top1"), ("mean_logits", "entropy")])
def test_outputs_not_asked_for_are_none(outputs):
    inputs = function_inputs()
    ours, theirs = (run_function(f, inputs, outputs=outputs)[0] for f in (swap.LogProbFunction, OWN))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_all_outputs_by_default():
    ours, theirs = (f.apply(*function_inputs(), 1.0, 64) for f in (swap.LogProbFunction, OWN))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("mode", ["autocast", "bf16", "bf16 hidden, fp32 weight"])
def test_half_precision_is_at_least_as_exact_as_trl(mode):
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    hidden, weight, bias, targets = function_inputs(dtype=dtype)
    if mode == "bf16 hidden, fp32 weight":
        weight = function_inputs()[1]
    inputs = (hidden, weight, bias, targets)
    # the truth for the numbers that are multiplied: those rounded to bfloat16
    double = tuple(t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight, bias))

    class Truth:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *_: Any) -> Any:
            stats = ll.reference_logps(hidden, weight, targets, bias)
            return stats.logps, stats.entropy, stats.log_sum_sq_probs, stats.mean_logits, stats.is_top1

    truth, truth_grads = run_function(Truth, (*double, targets))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        ours, our_grads = run_function(swap.LogProbFunction, inputs)
        theirs, their_grads = run_function(OWN, inputs)

    def error(value: Tensor, reference: Tensor) -> float:
        return (value.double() - reference).norm().item() / reference.norm().item()

    for a, b, t in zip(ours[:4], theirs[:4], truth[:4], strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert error(a, t) <= error(b, t)
    for a, b, t in zip(our_grads, their_grads, truth_grads, strict=True):
        assert a.dtype == b.dtype
        # at least as good as TRL's, or as one rounding of the gradient to bfloat16, which autocast asks of a linear layer
        assert error(a, t) <= max(error(b, t), 2.0**-8)


def test_no_token_at_all_gives_zero_gradients_not_none():
    hidden, weight, bias, targets = function_inputs(rows=0)
    for train in ("hwb", "h"):
        inputs = function_inputs(rows=0, train=train)
        ours, theirs = (run_function(f, inputs) for f in (swap.LogProbFunction, OWN))
        for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
            assert_close(a, b)
    logps, *_ = swap.LogProbFunction.apply(hidden, weight, bias, targets, 1.0, 64)
    logps.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_microbatch_with_every_label_masked_is_a_differentiable_zero(checkpoint):
    model = load(checkpoint("untied"), heads=True)
    ids = torch.randint(2, VOCAB, (2, 7))
    with swap.patch():
        out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        out.log_probs.sum().backward()
    assert torch.equal(out.log_probs, torch.zeros(2, 6))
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and not g.any() for g in grads)


def test_masked_positions_are_never_read(checkpoint):
    model = load(checkpoint("untied"), heads=True)
    ids = torch.randint(2, VOCAB, (2, 7))
    labels = ids.masked_fill(torch.arange(7) < 4, -100)

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.masked_fill((torch.arange(7) < 3)[:, None], float("nan"))
        return output

    with swap.patch():
        expected = model(input_ids=ids, labels=labels, fused_lm_head=True)
        model.base_model.register_forward_hook(poison)
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    for name in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1"):
        assert torch.equal(found[name], expected[name])


def test_frozen_head_is_scored_forward_only_without_gradients(checkpoint):
    model = load(checkpoint("untied"), heads=True).requires_grad_(False)
    ids = torch.randint(2, VOCAB, (2, 7))
    with swap.patch(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, fused_lm_head=True)
    counts = counter.get_flop_counts()["Global"]
    assert sum(n for op, n in counts.items() if str(op).startswith("logitless.")) == 2 * 12 * HIDDEN * VOCAB


def test_settings_hold(checkpoint):
    model = load(checkpoint("untied"), heads=True)
    ids = torch.randint(2, VOCAB, (2, 7))
    with swap.patch(), pytest.raises(ValueError, match="backend"), ll.settings(backend="no such"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


class Sharded:
    """What ``deepspeed.zero.GatheredParameters`` does to parameters: whole inside of the context, empty outside of it."""

    def __init__(self, *params: nn.Parameter) -> None:
        self.whole = {id(p): p.data for p in params}
        self.entries: list[str] = []
        self.phase = "forward"
        for p in params:
            p.data = torch.empty(0)

    @contextmanager
    def gather(self, *params: nn.Parameter | None) -> Iterator[None]:
        self.entries.append(self.phase)
        present = [p for p in params if p is not None]
        for p in present:
            assert p.numel() == 0
            p.data = self.whole[id(p)].clone()
        try:
            yield
        finally:
            for p in present:
                p.data = torch.empty(0)


@pytest.mark.parametrize("with_entropy", [False, True], ids=["logps", "logps and entropy"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_zero3_shards_are_gathered_in_forward_and_backward(checkpoint, monkeypatch, frozen, with_entropy):
    ids = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))

    def run(shard: bool) -> tuple[list[Tensor], list[str]]:
        model = load(checkpoint("untied"), heads=True)
        head = model.get_output_embeddings()
        head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
        head.requires_grad_(not frozen)
        entries: list[str] = []
        with monkeypatch.context() as m:
            if shard:
                zero = Sharded(head.weight, head.bias)
                entries = zero.entries
                m.setattr(utils, "maybe_gather_lm_head_ctx", zero.gather)
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
            assert not shard or head.weight.numel() == 0
            loss = out.log_probs.sum() + (out.entropy.sum() if with_entropy else 0)
            if shard:
                zero.phase = "backward"
            # not backward(): what takes a gradient to a parameter without elements is DeepSpeed's, which is not here
            grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
            assert not shard or head.weight.numel() == 0
        return list(grads), entries

    with swap.patch():
        whole, _ = run(shard=False)
        sharded, entries = run(shard=True)
    _, trls = run(shard=True)
    assert trls == ["forward", "backward"]
    # a frozen head's gradient was finished in the forward pass, but for the entropy's
    assert entries == (["forward"] if frozen and not with_entropy else trls)
    assert len(sharded) == len(whole)
    for a, b in zip(sharded, whole, strict=True):
        assert torch.equal(a, b)


def test_patching_twice_is_patching_once_and_unpatch_restores_the_originals():
    swap.patch()
    replaced = utils._ChunkedLogProbFunction, utils._use_triton
    assert swap.is_patched() and replaced[0] is swap.LogProbFunction
    swap.patch()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == replaced
    swap.unpatch()
    assert not swap.is_patched()
    assert utils._ChunkedLogProbFunction is OWN and utils._use_triton is OWN_USE_TRITON
    swap.unpatch()
    assert utils._ChunkedLogProbFunction is OWN


def test_inner_block_leaves_the_outer_patch_in_place():
    with swap.patch():
        with swap.patch():
            assert swap.is_patched()
        assert swap.is_patched()
    assert not swap.is_patched()
    swap.patch()
    with swap.patch():
        pass
    assert swap.is_patched()


def test_block_restores_after_an_error():
    with pytest.raises(KeyError), swap.patch():
        raise KeyError
    assert utils._ChunkedLogProbFunction is OWN


def test_only_the_trainers_question_about_compaction_is_answered_anew(monkeypatch):
    from trl.kernels import chunked_logprob
    from trl.trainer import distillation_trainer

    monkeypatch.setattr(utils, "_use_triton", lambda device: device.type == "xpu")
    with swap.patch():
        answers = {kind: utils._use_triton(torch.device(kind)) for kind in ("cpu", "cuda", "xpu", "meta", "xla", "mps")}
        assert answers == {"cpu": True, "cuda": True, "xpu": True, "meta": False, "xla": False, "mps": False}
        assert distillation_trainer._use_triton is chunked_logprob._use_triton is OWN_USE_TRITON
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx", "add_fused_lm_head"])
def test_trl_without_a_name_is_an_error_that_says_which_and_what_to_do(monkeypatch, name):
    monkeypatch.delattr(utils, name)
    monkeypatch.setattr(trl, "__version__", "0.29.1")
    with pytest.raises(RuntimeError, match=rf"trl\.trainer\.utils\.{name}, which TRL 0\.29\.1 lacks: install another"):
        swap.patch()
    assert not swap.is_patched()
    monkeypatch.undo()


def test_trl_whose_function_takes_other_arguments_is_an_error(monkeypatch):
    class Newer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shiny: int) -> Tensor:
            return hidden

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Newer)
    with pytest.raises(RuntimeError, match=r"takes \(hidden, weight, targets, shiny\) where"):
        swap.patch()
    assert not swap.is_patched()
    monkeypatch.undo()


def test_trl_1_15_needs_no_answer_about_compaction(monkeypatch):
    monkeypatch.delattr(utils, "_use_triton")
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    with swap.patch():
        assert utils._ChunkedLogProbFunction is swap.LogProbFunction
        assert not hasattr(utils, "_use_triton")
    assert utils._ChunkedLogProbFunction is OWN
    monkeypatch.undo()


def test_missing_trl_is_an_import_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.15'"):
        swap.patch()


def test_importing_logitless_imports_no_trainer():
    code = (
        "import sys, logitless, logitless.integrations as i\n"
        "assert 'trl' in dir(i) and 'logitless.integrations.trl' not in sys.modules\n"
        "assert not i.trl.is_patched()\n"
        "assert not {'trl', 'transformers', 'liger_kernel'} & set(sys.modules)\n"
        "try:\n    i.nothing\nexcept AttributeError as e:\n    assert 'liger, trl' in str(e)\nelse:\n    raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
