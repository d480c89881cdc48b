"""Maps the top-level folders to packages; everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"$', (ROOT / "logitless/__init__.py").read_text(), re.M)[1]

#: The folder of each package.
FOLDERS = {
    "logitless": "logitless",
    "logitless.integrations": "logitless/integrations",
    "logitless.kernels": "kernels",
    "logitless.fused": "fused",
    "logitless.fused.losses": "fused/losses",
    "logitless.bench": "bench",
}

setup(
    version=version,
    packages=list(FOLDERS),
    package_dir=FOLDERS,
    package_data={"logitless": ["py.typed"]},
)
