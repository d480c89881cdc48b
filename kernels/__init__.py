"""Log-prob kernels and operators: spec, plan, op, backends, and the float64 reference beside them.

This folder is the package ``logitless.kernels``. Losses are in ``fused/``, which builds on it.
"""

if __name__ == "kernels":
    # Python runs in the repository root and a library (such as transformers) imports the PyPI package ``kernels``. Hand
    # over to it if it is installed; else look like the bare folder that this would be without an __init__.py, which
    # transformers can tell from a real package.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path
    from types import ModuleType

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        sys.modules["kernels"] = ModuleType("kernels")
