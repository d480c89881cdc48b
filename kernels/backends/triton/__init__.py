"""The ``triton`` backend: GEMMs with an epilogue (``gemm/``), element-wise kernels, entry points over them (``backend.py``).

``tuning/`` chooses block sizes, ``aot/`` compiles every kernel without a GPU. With ``TRITON_INTERPRET=1``, set before the first
import of Triton, the kernels run on a CPU: that is how they are tested without a GPU.
"""
