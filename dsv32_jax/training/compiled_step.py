"""The compiled training step, and arrays on the devices that it runs on."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# A value under one of these that is not finite ends the run.
_WATCHED = ('loss/', 'grad_norm/')


def compile_step(
  step_fn: Callable, carry: Any, batch: Any, key: Array
) -> Callable:
  """Compiles the step ahead of time: another batch shape is then an error.

  The carry is (state, whether all steps so far were finite). From the first
  step on that is not, the state stays as it was before that step, though the
  host learns of it a step later and has donated the buffers by then.
  """

  def guarded(carry: Any, batch: Any, key: Array):
    state, was_finite = carry
    new_state, values = step_fn(state, batch, key)
    checks = [jnp.all(jnp.isfinite(values[k])) for k in watched(values)]
    is_finite = jnp.logical_and(
      was_finite, jnp.all(jnp.stack(checks)) if checks else True
    )
    kept = jax.tree.map(
      lambda new, old: jnp.where(is_finite, new, old), new_state, state
    )
    return (kept, is_finite), values

  placed = jax.tree.map(lambda leaf: leaf.sharding, carry)
  jitted = jax.jit(guarded, donate_argnums=0, out_shardings=(placed, None))
  return jitted.lower(carry, batch, key).compile()


def watched(values: Mapping[str, Any]) -> list[str]:
  """Names of the metrics that must stay finite."""
  return [name for name in values if name.startswith(_WATCHED)]


def whole(mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
  """On the one device, or on every device of the mesh."""
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def place_state(state: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """The state on its devices; leaves not sharded over the mesh are whole."""
  everywhere = whole(mesh)

  def place(leaf: Any) -> Array:
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, jax.sharding.NamedSharding) and (
      mesh is not None and sharding.mesh == mesh
    ):
      return leaf
    return jax.device_put(leaf, everywhere)

  return jax.tree.map(place, state)


def shapes(state: Any) -> Any:
  """What `CheckpointManager.restore_latest` needs to know of a state."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    state,
  )


def place_rows(
  rows: dict[str, np.ndarray], mesh: jax.sharding.Mesh | None
) -> dict[str, jax.Array]:
  """Puts this process's rows on its devices."""
  if mesh is None:
    return jax.device_put(rows, whole(None))
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec('data')
  )
  local = mesh.shape['data'] // jax.process_count()
  for name, value in rows.items():
    if value.shape[0] % local:
      raise ValueError(
        f'batch_size: got {value.shape[0]} rows of {name!r}, expected a '
        f"multiple of this process's {local} devices along mesh axis 'data'"
      )
  return {
    name: jax.make_array_from_process_local_data(sharding, value)
    for name, value in rows.items()
  }
