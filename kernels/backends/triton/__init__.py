"""The backend ``triton``: GEMMs whose epilogue takes the exponentials, so that logits never reach memory.

``TRITON_INTERPRET=1``, set before the first import, runs its kernels on a CPU, for tests without a GPU.
"""
