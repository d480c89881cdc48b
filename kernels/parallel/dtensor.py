"""Heads whose weight is a DTensor sharded by rows over a tensor-parallel mesh."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..core.head_spec import HeadSpec
from .vocab_parallel import VocabParallel

#: Names of a mesh dimension whose ranks have the same sequences. Ranks of any other may have sequences of their own, as under
#: FSDP2, which shards weights in the same way.
TENSOR_PARALLEL = ("tp", "tensor", "tensor_parallel")


def _mesh_of(value: Any) -> Any:
    """The mesh of a DTensor that is sharded by rows over one tensor-parallel dimension; ``None`` for anything else."""
    distributed = sys.modules.get("torch.distributed.tensor")  # without that module there are no DTensors
    if torch.compiler.is_compiling() or distributed is None or not isinstance(value, distributed.DTensor):
        return None
    mesh = value.device_mesh
    names = mesh.mesh_dim_names
    by_rows = value.placements == (distributed.Shard(0),)
    return mesh if by_rows and names is not None and len(names) == 1 and names[0] in TENSOR_PARALLEL else None


def local_rows(value: Any, parallel: VocabParallel | None) -> Any:
    """The rank's part of a DTensor that is sharded as ``parallel`` says, whose gradient is a DTensor again; else ``value``."""
    mesh = _mesh_of(value)
    same = mesh is not None and parallel is not None and mesh.get_group() is parallel.group
    return value.to_local() if same else value


def from_dtensor(
    weight: Any,
    bias: Any,
    parallel: VocabParallel | None,
    head: HeadSpec | None,
) -> tuple[Any, Any, VocabParallel | None, HeadSpec | None]:
    """The arguments of a call with ``weight``, ``bias`` and ``head`` of this rank's rows, where ``weight`` is a DTensor that
    is sharded by rows over a tensor-parallel mesh; else those given, of which other DTensors are refused later.

    Raises:
        ValueError: for a rank without a real entry, or with ``parallel`` beside it.
    """
    mesh = _mesh_of(weight)
    if mesh is None or weight.dim() != 2:
        return weight, bias, parallel, head
    if parallel is not None:
        raise ValueError("parallel is given beside a weight that is a DTensor: pass weight.to_local(), or leave parallel out")
    entries = len(weight) if head is None or head.vocab_size is None else min(head.vocab_size, len(weight))
    each = -(-len(weight) // mesh.size())  # rows of every shard but the last ones
    if each * (mesh.size() - 1) >= entries:
        raise ValueError(
            f"weight is a DTensor with {entries} entries on {mesh.size()} ranks, of which the last would have none of its "
            f"shards of {each} rows: pass weight.full_tensor()"
        )
    made = VocabParallel(mesh.get_group(), each * mesh.get_local_rank(), entries)
    if head is not None:
        head = HeadSpec(head.logit_scale, head.softcap, head.temperature)
    return local_rows(weight, made), local_rows(bias, made), made, head
