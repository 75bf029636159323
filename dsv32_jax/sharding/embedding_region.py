"""Embedding lookup in a table that is cut over devices.

Left to the compiler, a table cut along its width would be gathered whole on
every device. Here tokens travel instead: each device looks up the tokens of all
members in its own columns (and, with a cut vocabulary, in its own rows, where
the tokens of others give zeros), and an all-to-all hands every member the whole
vectors of its own tokens. Bytes go with the tokens of a batch, not with the
vocabulary; gradients take the same way back.

Letters: B batch, T tokens, V vocabulary, D width, M members that share a row of
the table, v and d the shares of V and D of one device.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dsv32_jax.sharding import axes
from dsv32_jax.sharding.parallel import active


def lookup(
  table_VD: Float[Array, 'V D'], tokens_BT: Int[Array, 'B T']
) -> Float[Array, 'B T D']:
  """Rows of the table, under the active layout.

  Args:
    table_VD: with logical axes (VOCAB, EMBED).
    tokens_BT: with logical axes (BATCH, SEQUENCE).
  """
  parallel = active()
  if parallel is None:
    return table_VD[tokens_BT]
  table = parallel.fitting_spec(table_VD.shape, axes.VOCAB, axes.EMBED)
  tokens = parallel.fitting_spec(tokens_BT.shape, axes.BATCH, axes.SEQUENCE)
  vocab, width = table

  def member(table_vd: Array, tokens_BT: Array) -> Array:
    tokens_MBT = tokens_BT[None]
    if width:
      tokens_MBT = lax.all_gather(tokens_BT, width)
    if vocab:
      tokens_MBT -= lax.axis_index(vocab) * table_vd.shape[0]
      is_here = (tokens_MBT >= 0) & (tokens_MBT < table_vd.shape[0])
      x_MBTd = table_vd[jnp.where(is_here, tokens_MBT, 0)]
      x_MBTd = jnp.where(is_here[..., None], x_MBTd, 0)
      x_MBTd = lax.psum(x_MBTd, vocab)
    else:
      x_MBTd = table_vd[tokens_MBT]
    if width:
      x_MBTd = lax.all_to_all(x_MBTd, width, 0, 3, tiled=True)
    return x_MBTd[0]

  return jax.shard_map(
    member,
    mesh=parallel.mesh,
    in_specs=(table, tokens),
    out_specs=PartitionSpec(*tokens, None),
    check_vma=False,
  )(table_VD, tokens_BT)
