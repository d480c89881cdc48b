"""The page on losses: its examples run, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

from logitless.fused.preference.losses.dpo import DPO_LOSSES
from logitless.fused.preference.losses.kto import KTO_LOSSES
from logitless.fused.preference.losses.simple import CPO_LOSSES

EVERY_BACKEND = True


PAGE = Path(__file__).parents[2] / "docs" / "losses.md"


def test_examples_of_the_page_on_losses_run():
    registry = dict(DPO_LOSSES)
    blocks = [b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL) if "import" in b]
    assert len(blocks) == 2
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), {})
    finally:
        DPO_LOSSES.clear()
        DPO_LOSSES.update(registry)


def test_conventions_are_backed_by_tests_that_exist():
    files = [path.read_text(encoding="utf8") for path in Path(__file__).parent.glob("test_losses_*.py")]
    page = PAGE.read_text(encoding="utf8")
    for row in page[page.index("## Conventions") : page.index("## Your own loss")].splitlines():
        named = re.findall(r"`(test_\w+)`", row)
        if row.startswith("|") and not row.startswith(("| subject", "|---")):
            assert named, row
        for name in named:
            assert any(f"def {name}(" in text for text in files), name
    for name in DPO_LOSSES | CPO_LOSSES | KTO_LOSSES:
        assert f"`{name}`" in page or f'"{name}"' in page
