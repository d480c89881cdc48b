"""The examples do what they say, in a form short enough for a test."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_dpo_margins_rise_and_held_out_pairs_are_told_apart(tmp_path):
    from logitless.integrations import trl as swap

    example = load("examples/dpo_trl.py")
    progress = example.main(["--quick", "--output-dir", str(tmp_path)])
    assert not swap.is_patched()
    start, *later = [margin for _, margin in progress.held_out_margins]
    assert start == 0  # policy and reference are one
    assert later == sorted(later) and later[0] > 0
    train = [margin for _, margin in progress.train_margins]
    assert train[-1] > train[len(train) // 2] > train[0]
    assert progress.held_out_accuracy[-1][1] > 0.9
    assert (tmp_path / "start" / "tokenizer.json").exists()  # a checkpoint on disk, loaded from there


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("name", "options"), [("grpo_tiny", {}), ("grpo_tiny", {"loss_type": "vespo"}), ("ppo_tiny", {})])
def test_policy_training_raises_the_reward(name, options, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # ppo_tiny takes the task from grpo_tiny
    rewards = load(f"examples/{name}.py").train(seed=0, steps=30, verbose=False, **options)
    assert rewards[0] < 0.15
    assert sum(rewards[-5:]) / 5 > 0.4


def test_docstring_pairs_are_plain_text_and_share_nothing_between_the_splits():
    data = ROOT / "examples" / "data" / "docstring_pairs.jsonl"
    raw = data.read_bytes()
    assert raw.isascii() and len(raw) < 1_000_000
    pairs = [json.loads(line) for line in raw.splitlines()]
    assert len(pairs) >= 500
    assert pairs == sorted(pairs, key=lambda pair: tuple(pair.values()))
    assert all(list(pair) == ["split", "prompt", "chosen", "rejected"] and all(pair.values()) for pair in pairs)
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    assert len(set(texts)) == len(texts)
    prompts = {split: {pair["prompt"] for pair in pairs if pair["split"] == split} for split in ("train", "test")}
    assert not prompts["train"] & prompts["test"]
    assert len(prompts["test"]) >= 100


def test_docstring_pairs_are_made_alike_each_time(tmp_path):
    library = tmp_path / "library"
    script = load("scripts/make_docstring_pairs.py")
    doc = "Say something about number {} that is long enough to be taken into the data set."
    for number, name in enumerate([*script.PROMPTED, *script.MISMATCHED]):
        folder = library / name
        folder.mkdir(parents=True)
        functions = (f'def f{i}(x, y=1):\n    """{doc.format(f"{number}.{i}")}"""\n' for i in range(5))
        (folder / "module.py").write_text("".join(functions))
    pairs = script.make_pairs(library, seed=0)
    assert pairs == script.make_pairs(library, seed=0)
    assert pairs != script.make_pairs(library, seed=1)
    assert len(pairs) == 5 * len(script.PROMPTED)
    assert sum(pair["split"] == "test" for pair in pairs) == len(script.PROMPTED)
    assert pairs[0]["prompt"].startswith("# ") and "(x, y=1):" in pairs[0]["prompt"]
