"""The backends ``cpu`` and ``cuda``: the compiled operators of ``csrc/``."""
