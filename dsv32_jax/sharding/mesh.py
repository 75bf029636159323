"""Devices as a mesh of the five axes of `rules.MESH_AXES`."""

import math

import jax
from jax.sharding import AxisType, Mesh

from dsv32_jax.config.training import MeshConfig
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.sharding.rules import MESH_AXES, RULE_SETS


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Devices along each axis, -1 filled in.

  Raises:
    ValueError: naming the axis, for sizes that do not fit the devices or the
      rules.
  """
  sizes = {name: getattr(config, name) for name in MESH_AXES}
  rules = RULE_SETS[config.rules]
  for name, size in sizes.items():
    if size > 1 and name != 'data' and name not in rules.used:
      raise ValueError(
        f'mesh.{name}: got {size} with mesh.rules {config.rules!r}, expected 1 '
        f'(these rules cut nothing over it; they use '
        f'{", ".join(n for n in MESH_AXES if n in rules.used)})'
      )
  known = math.prod(size for size in sizes.values() if size != -1)
  for name, size in sizes.items():
    if size == -1:
      if num_devices % known:
        raise ValueError(
          f'mesh.{name}: got -1, expected the other axes ({known} devices) to '
          f'divide the {num_devices} devices there are'
        )
      sizes[name] = num_devices // known
  count = math.prod(sizes.values())
  if count > num_devices:
    described = ' x '.join(f'{n} {s}' for n, s in sizes.items() if s > 1)
    raise ValueError(
      f'mesh: got {described} = {count} devices, expected at most the '
      f'{num_devices} devices there are'
    )
  return sizes


def make_parallel(config: MeshConfig) -> Parallel | None:
  """Mesh and rules of a config.

  Linen's logical axes need Auto mesh axes, which `jax.make_mesh` does not make
  by default.

  Returns:
    None for one device, where a mesh would only cost.

  Raises:
    ValueError: see `axis_sizes`; or the exchange is not of this backend.
  """
  sizes = axis_sizes(config, jax.device_count())
  count = math.prod(sizes.values())
  if count == 1 and jax.process_count() == 1:
    return None
  if jax.process_count() > 1 and count < jax.device_count():
    raise ValueError(
      f'mesh: got {count} devices, expected all {jax.device_count()} of the '
      f'{jax.process_count()} processes'
    )
  if config.exchange == 'ragged' and jax.default_backend() != 'gpu':
    raise ValueError(
      f"mesh.exchange: got 'ragged' on {jax.default_backend()}, expected "
      "'dense' (XLA has a ragged all-to-all for GPUs only)"
    )
  mesh = make_mesh(sizes, jax.devices()[:count])
  return Parallel(mesh, RULE_SETS[config.rules], config.exchange)


def make_mesh(sizes: dict[str, int], devices: list) -> Mesh:
  """A mesh of the five axes over these devices."""
  return jax.make_mesh(
    tuple(sizes[name] for name in MESH_AXES),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )
