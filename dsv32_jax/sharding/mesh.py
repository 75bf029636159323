"""Devices as a mesh. Axis `data`: rows of a batch; parameters are whole."""

import jax
from jax.sharding import AxisType, Mesh

from dsv32_jax.config.training import MeshConfig


def make_mesh(config: MeshConfig) -> Mesh | None:
  """Builds the mesh of a config.

  Linen's logical axes need Auto mesh axes, which `jax.make_mesh` does not make
  by default.

  Args:
    config: number of devices on each axis.

  Returns:
    The mesh; None for one device, where it would only cost.

  Raises:
    ValueError: if there are fewer devices than asked for.
  """
  available = jax.device_count()
  count = available if config.data == -1 else config.data
  if count > available:
    raise ValueError(
      f'mesh.data: got {count}, expected at most the {available} devices there '
      'are'
    )
  if count == 1:
    return None
  return jax.make_mesh(
    (count,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:count],
  )
