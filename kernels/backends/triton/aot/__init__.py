"""Ahead-of-time compilation for NVIDIA GPUs without one: which specialisations (``shipped``), and how (``ahead``)."""
