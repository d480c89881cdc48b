"""Configurations of the GEMM kernels: looked up in a table (``configs``) or measured (``search``), as ``lookup`` decides."""
