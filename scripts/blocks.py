"""Generated blocks of Markdown files: the text between ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

import re
from pathlib import Path


def write_block(path: Path, name: str, text: str) -> None:
    """Replace the content of the block. Raises ``SystemExit`` unless the file has exactly one such block."""
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    after, count = re.subn(rf"<!-- {name} -->.*<!-- /{name} -->", lambda _: block, path.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"{path} has {count} blocks {name!r}, not one")
    path.write_text(after)
