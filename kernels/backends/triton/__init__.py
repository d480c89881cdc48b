"""The Triton kernels of the ``triton`` backend: GEMMs with epilogues, passes over tiles, and their configurations.

``TRITON_INTERPRET=1``, set before the first import, runs them on a CPU, which is how they are tested without a GPU.
"""
