"""The documentation is true: paths exist, names resolve, links lead somewhere, examples run, generated tables are current."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import logitless as ll

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md", "examples/data/README.md")),
    *(file for folder in ("docs", "bench/results") for file in sorted((ROOT / folder).glob("*.md"))),
]
FOLDERS = ("bench", "csrc", "docs", "examples", "fused", "kernels", "logitless", "scripts", "tests", ".ci")
SUFFIXES = "cpp|cu|cuh|h|inc|jsonl?|md|png|py|sh|toml"
#: Names of repository paths, and of files anywhere in the repository.
PATH = re.compile(rf"({'|'.join(map(re.escape, FOLDERS))})/\S*|[\w*-]+\.({SUFFIXES})")
#: Files that a command writes.
GENERATED = re.compile(r"bench/out|(bench/results/)?(gpu-DEVICE|DEVICE-|cuda-|triton-(configs|timings)|-)")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf8")


def inline_code(text: str) -> list[str]:
    """The inline code of a page, without its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def expand(path: str) -> Iterator[str]:
    """``a/{b,c}`` as ``a/b`` and ``a/c``."""
    if (found := re.search(r"\{([^{}]*)\}", path)) is None:
        yield path
        return
    for choice in found[1].split(","):
        yield from expand(path[: found.start()] + choice.strip() + path[found.end() :])


def paths(text: str) -> Iterator[str]:
    """The repository paths and file names in a page's inline code."""
    for code in inline_code(text):
        for word in re.split(r"\s+(?![^{]*\})", code):
            if PATH.fullmatch(word):
                yield from expand(word.split("::")[0].rstrip("/"))


def exists(path: str) -> bool:
    """A path from the root, also as a pattern; a bare file name may be anywhere in the source folders."""
    if "/" in path:
        return any(ROOT.glob(path))
    return any(ROOT.glob(path)) or any(next((ROOT / folder).rglob(path), None) for folder in FOLDERS)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_path_named_in_a_page_exists(page):
    named = {path for path in paths(read(page)) if not GENERATED.match(path)}
    missing = sorted(path for path in named if not exists(path))
    assert not missing


def resolve(name: str) -> Any:
    """The object that ``ll.name`` means; adapters are modules that may not be imported yet."""
    found: Any = ll
    for part in name.split("."):
        if isinstance(found, ModuleType) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_name_of_the_library_in_a_page_resolves(page):
    if page.name == "CHANGELOG.md":
        return  # a name of an older version may be gone
    for name in sorted(set(re.findall(r"\bll\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", read(page)))):
        assert resolve(name) is not None, name


def test_every_kernel_named_in_a_page_exists():
    sources = [
        file for folder in ("csrc", "kernels") for file in (ROOT / folder).rglob("*") if file.suffix in {".py", ".cu", ".cuh"}
    ]
    known = set(re.findall(r"\b(\w+_kernel)\b", "".join(map(read, sources))))
    named = {name for page in PAGES for code in inline_code(read(page)) for name in re.findall(r"\b([a-z_]+_kernel)\b", code)}
    assert named and not named - known


def test_every_test_named_beside_a_promise_exists():
    rows = [row for row in read(ROOT / "tests" / "README.md").splitlines() if re.match(r"\| \d+\. ", row)]
    assert len(rows) >= 10
    for row in rows:
        for group in row.split(" | ")[1].split("; "):
            files, names = re.findall(r"`(tests/[\w/]+\.py)`", group), re.findall(r"`(test_\w+)`", group)
            assert files and names, group
            for file in files:
                for name in names:
                    assert f"def {name}(" in read(ROOT / file), f"{file}: {name}"


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_internal_link_leads_to_a_file_and_a_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", read(page)):
        if target.startswith(("http://", "https://")):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in slugs(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_python_block_compiles_and_its_imports_resolve(page):
    for block in python_blocks(page):
        compile(block, str(page), "exec")
        for module, names in re.findall(r"^from (logitless[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_first_example_of_readme_runs_and_is_near_its_top():
    block, text = python_blocks(README)[0], read(README)
    assert text[: text.index(block) + len(block)].count("\n") <= 30
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 5
    space: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), space)
    assert space["hidden"].grad.isfinite().all() and space["weight"].grad.abs().sum() > 0


def tiny_model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 61}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def test_the_examples_of_readme_run_on_a_model():
    torch.manual_seed(0)
    ids = torch.randint(61, (8, 6))
    space = {
        "torch": torch,
        "model": tiny_model(),
        "batch": {"input_ids": ids, "labels": ids},
        "ref_logps": torch.zeros(8),
        "sequences": ids.tolist(),
        "prompt_lengths": [2] * 8,
        "rewards": torch.rand(8),
    }
    blocks = [block for block in python_blocks(README)[1:] if "model" in block]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
        assert space["out"].loss.isfinite()
    inline = re.search(r"`(ll\.model_loss\(model, ll\.FusedLinearDPOLoss[^`]*)`", read(README))
    assert inline is not None
    assert eval(inline[1], space).loss.isfinite()


def block_of(page: str, name: str) -> str:
    return read(ROOT / page).split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def test_the_tables_of_readme_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    figures, training = (importlib.import_module(name) for name in ("readme_figures", "training_figures"))
    record = json.loads((ROOT / "bench" / "results" / "cpu-2-cores.json").read_text(encoding="utf8"))
    assert block_of("README.md", "headline") == figures.table(record)
    if not list(ROOT.glob("bench/results/gpu-*/*-training-*.json")):
        assert block_of("README.md", "training") == training.NOTHING
    for name in ("readme_figures", "training_figures", "blocks"):
        sys.modules.pop(name, None)


def test_no_file_refers_to_a_document_that_is_not_there():
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            if file.suffix not in {".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".sh"} or file == Path(__file__).resolve():
                continue
            text = file.read_text(encoding="utf8")
            assert not re.search(r"\bDESIGN\b|\bissue #?\d+", text), file
