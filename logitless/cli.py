"""The command line: ``logitless env`` and ``logitless bench``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # it has options of its own, and needs packages that the rest does not
        try:
            from logitless.bench.cli import main as bench
        except ModuleNotFoundError as error:
            print(f"logitless bench needs {error.name}: pip install 'logitless[bench]'", file=sys.stderr)
            return 1
        return bench(arguments[1:])
    parser = argparse.ArgumentParser(prog="logitless", description="Language-model-head kernels without logits.")
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="report versions, devices and backends")
    env.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("bench", help="compare with plain PyTorch, TRL and Liger (see logitless bench --help)")
    options = parser.parse_args(arguments)
    from logitless.env import render, report

    sections = report()
    print(json.dumps(sections, indent=2) if options.json else render(sections))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
