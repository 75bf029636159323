"""Arrays that differ from device to device, under `jax.shard_map`.

With `check_vma` (jax's default) an array's type says along which axes of the
mesh it may differ. Plain operations bring their operands' types together by
themselves; three things don't, and are helped here:

  * a function with its own gradient: a shared operand (the keys, say, where
    heads are split) gets a gradient that differs, still to be summed over the
    devices. Made differing before the call, jax sums it after the call;
  * the first value of a loop's carry, where it is a constant;
  * a Mosaic GPU kernel, whose outputs jax takes to be the same everywhere.

Without `check_vma`, and outside of `jax.shard_map`, nothing differs by type and
these functions return what they are given.
"""

import jax


def axes(*arrays: jax.Array) -> tuple[str, ...]:
  """Mesh axes along which any of the arrays differs."""
  names = set()
  for x in arrays:
    names |= jax.typeof(x).manual_axis_type.varying
  return tuple(sorted(names))


def along(names: tuple[str, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays, of a type that differs along these axes too."""
  return tuple(
    jax.lax.pcast(
      x, tuple(name for name in names if name not in axes(x)), to='varying'
    )
    for x in arrays
  )


def together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The arrays, differing along the same axes."""
  return along(axes(*arrays), *arrays)
