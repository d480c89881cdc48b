"""Backends behind one interface: a folder each, whose ``register.py`` registers it. They are asked in alphabetical order."""

import pkgutil
from importlib import import_module

for _folder in sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg):
    import_module(f".{_folder}.register", __name__)
