"""The compiled training step, and arrays on the devices that it runs on."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import process_rows, specs
from dsv32_jax.sharding.parallel import Parallel

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

  layout = parallel_lib.active()
  # Metrics are whole everywhere, so that every process can read them.
  read = None if layout is None else whole(layout)
  jitted = jax.jit(
    guarded, donate_argnums=0, out_shardings=(specs.of_leaves(carry), read)
  )
  return jitted.lower(carry, batch, key).compile()


def watched(values: Mapping[str, Any]) -> list[str]:
  """Names of the metrics that must stay finite."""
  return [name for name in values if name.startswith(_WATCHED)]


def whole(parallel: Parallel | None) -> jax.sharding.Sharding:
  """On the one device, or on every device of the mesh."""
  if parallel is None:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.sharding.NamedSharding(parallel.mesh, jax.sharding.PartitionSpec())


def place_state(state: Any, parallel: Parallel | None) -> Any:
  """The state on its devices; leaves not sharded over the mesh are whole."""
  everywhere = whole(parallel)

  def place(leaf: Any) -> Array:
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, jax.sharding.NamedSharding) and (
      parallel is not None and sharding.mesh == parallel.mesh
    ):
      return leaf
    return _put(leaf, everywhere)

  return jax.tree.map(place, state)


def free(state: Any) -> None:
  """Gives the memory of a state back at once, whoever still refers to it."""
  for leaf in jax.tree.leaves(state):
    if not leaf.is_deleted():
      leaf.delete()


def _put(leaf: Any, sharding: jax.sharding.Sharding) -> Array:
  """`jax.device_put`, also of keys and to the devices of other processes."""
  if sharding.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    data = _put(jax.random.key_data(leaf), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
  return jax.device_put(np.asarray(leaf), sharding)


def shapes(state: Any) -> Any:
  """What `CheckpointManager.restore_latest` needs to know of a state."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    state,
  )


def place_rows(
  rows: dict[str, np.ndarray], parallel: Parallel | None
) -> dict[str, jax.Array]:
  """Puts this process's rows on its devices."""
  if parallel is None:
    return jax.device_put(rows, whole(None))
  return process_rows.place(rows, lambda ndim: specs.rows(parallel, ndim))
