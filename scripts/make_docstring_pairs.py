"""Make ``examples/data/docstring_pairs.jsonl``: true against mismatched docstrings of the Python standard library.

A prompt is the signature of a function from one part of the library (windows, drawing, numbers, dates) and the package that
it lives in. ``chosen`` is the start of its own docstring, ``rejected`` the start of one from another part (messages, files,
processes, build tools). A model can tell them apart by what they speak of, and has to do so on functions that it has not
seen: no prompt and no docstring occurs twice, in one split or in both.

The output depends on the version of Python alone; run it with the version named in ``examples/data/README.md``::

    python scripts/make_docstring_pairs.py
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Folders or files of the library that prompts and their true docstrings come from, and what a user calls them.
PROMPTED = {
    "_pydecimal": "decimal",
    "calendar": "calendar",
    "datetime": "datetime",
    "statistics": "statistics",
    "tkinter": "tkinter",
    "turtle": "turtle",
}
#: Where the mismatched docstrings come from.
MISMATCHED = ("asyncio", "distutils", "email", "http", "importlib", "logging", "multiprocessing", "pathlib", "tarfile", "xml")
SHORTEST, LONGEST = 60, 240  # characters of a docstring
LONGEST_PROMPT = 100
OUTPUT = Path(__file__).resolve().parent.parent / "examples" / "data" / "docstring_pairs.jsonl"


class Documented(NamedTuple):
    """A function and what its docstring says first."""

    prompt: str
    text: str


def signatures(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, str]]:
    """Every public function and method with a docstring: its signature and the docstring."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from signatures(node, node.name)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            text = ast.get_docstring(node)
            if text:
                name = f"{owner}.{node.name}" if owner else node.name
                yield f"{name}({ast.unparse(node.args)})", text


def shorten(text: str) -> str:
    """The first words of a docstring that fit, on one line."""
    text = " ".join(text.split())
    if len(text) <= LONGEST:
        return text
    return text[: text.rfind(" ", 0, LONGEST)]


def collect(library: Path, packages: dict[str, str], seen: set[str]) -> list[Documented]:
    """All usable functions of some packages, in the order of the files, but for prompts and texts ``seen`` before."""
    found = []
    for part, package in sorted(packages.items()):
        root = library / part
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]:
            if {"test", "tests"} & set(path.relative_to(library).parts):
                continue
            for signature, docstring in sorted(signatures(ast.parse(path.read_text(encoding="utf-8")))):
                prompt, text = f"# {package}\ndef {signature}:\n", shorten(docstring)
                usable = text.isascii() and prompt.isascii() and len(text) >= SHORTEST and len(prompt) <= LONGEST_PROMPT
                if usable and not seen & {prompt, text}:
                    seen |= {prompt, text}
                    found.append(Documented(prompt, text))
    return found


def make_pairs(library: Path, seed: int) -> list[dict[str, str]]:
    """The pairs, sorted; every fifth is held out."""
    rng = random.Random(seed)
    seen: set[str] = set()
    true, wrong = collect(library, PROMPTED, seen), collect(library, dict(zip(MISMATCHED, MISMATCHED)), seen)
    held_out = set(rng.sample(range(len(true)), len(true) // 5))
    pairs = [
        {"split": "test" if i in held_out else "train", "prompt": a.prompt, "chosen": a.text, "rejected": b.text}
        for i, (a, b) in enumerate(zip(true, rng.sample(wrong, len(true)), strict=True))
    ]
    return sorted(pairs, key=lambda pair: tuple(pair.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pairs = make_pairs(Path(sysconfig.get_paths()["stdlib"]), arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="ascii")
    held_out = sum(pair["split"] == "test" for pair in pairs)
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"{arguments.output}: {len(pairs)} pairs, {held_out} of them held out, from Python {version}")


if __name__ == "__main__":
    main()
