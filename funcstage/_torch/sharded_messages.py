"""DTensors between pipeline stages: what a message says of one -> its spec over a mesh of this rank."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from funcstage.errors import LeafError, StructureError


def spec_of(meta: Any, sender: int, meshes: Any) -> Any:
    """Look up the mesh of a DTensor that another stage sends.

    Args:
        meta: torch's `_DTensorMeta`, which names a mesh by its dimensions and its layout.
        sender: the number of that stage.
        meshes: torch's `_MeshCache`, which asks the stage's `get_mesh`.

    Raises:
        StructureError: if no mesh is known.
        LeafError: if it is not the one that was asked for.
    """
    from funcstage._torch.dtensor import shape_here, spec_for

    names, layout = meta.mesh_cache_key
    over = f"a mesh of the dimensions {names} and the layout {layout}"
    said = f"stage {sender} sends a DTensor placed {tuple(meta.placements)} over {over}"
    if meta.mesh_cache_key not in meshes and meshes._get_mesh_cb is None:
        raise StructureError(
            f"{said}, which this stage does not know. Construct it with get_mesh=, a function "
            "(mesh_dim_names, mesh_layout) -> DeviceMesh, or let that stage return tensor.to_local()."
        )
    mesh = meshes._cache.get(meta.mesh_cache_key)
    if mesh is None:
        mesh = meshes._get_mesh_cb(names, layout)
    if not isinstance(mesh, DeviceMesh):
        raise LeafError(
            f"{said}, for which get_mesh returned {mesh!r}. Return this rank's mesh of that name."
        )
    if tuple(mesh.mesh_dim_names or ()) != tuple(names) or mesh._layout != layout:
        raise LeafError(
            f"{said}, but get_mesh returned {mesh}, of the layout {mesh._layout}. Return this rank's mesh "
            "of that name and layout."
        )
    if mesh.get_coordinate() is None:
        raise LeafError(
            f"{said}, but get_mesh returned {mesh}, and this rank is not in it. Return the one that it is in."
        )
    spec = spec_for(mesh, meta.placements, meta.global_shape, meta.global_stride, meta.dtype)
    if shape_here(spec) != tuple(meta.shape):
        raise LeafError(
            f"{said}, and its part has shape {list(meta.shape)}, but this rank's part of the whole, "
            f"{list(meta.global_shape)}, has shape {list(shape_here(spec))} in {mesh}. Give the stages of a "
            "pipeline the same coordinate in their meshes."
        )
    meshes.put(meta.mesh_cache_key, mesh)
    return spec
