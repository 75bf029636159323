"""The cache of one DSA layer: latent rows and indexer keys.

A cached row is what MLA in MQA mode attends to, [c_kv ; k_rope] (spec 3.3):
C + R numbers a token whatever the number of heads. The indexer adds its key,
I numbers a token (spec 3.4).

Letters: B batch, T new tokens, S capacity, C kv latent, R rope, X = C + R,
I index_head_dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
  """One layer's cache; a value, never changed in place.

  Attributes:
    latent_BSX: rows [c_kv after its norm ; k_rope after rotation].
    k_index_BSI: indexer keys after LayerNorm and rotation.
  """

  latent_BSX: Any
  k_index_BSI: Any

  @property
  def capacity(self) -> int:
    return self.latent_BSX.shape[1]


def init(
  *, batch: int, capacity: int, latent_dim: int, index_dim: int, dtype
) -> LatentCache:
  """Returns an empty cache for `capacity` tokens a row."""
  return LatentCache(
    latent_BSX=jnp.zeros((batch, capacity, latent_dim), dtype),
    k_index_BSI=jnp.zeros((batch, capacity, index_dim), dtype),
  )


def append(
  cache: LatentCache,
  latent_BTX: Float[Array, 'B T X'],
  k_index_BTI: Float[Array, 'B T I'],
  *,
  start_B: Int[Array, ' B'],
) -> LatentCache:
  """Writes T new tokens of each row at its own offset.

  Args:
    cache: what is there already.
    latent_BTX: new latent rows.
    k_index_BTI: new indexer keys.
    start_B: position of each row's first new token. The caller keeps
      start_B + T within the capacity (`lax` would clamp a write past it).

  Returns:
    The longer cache; XLA updates in place when the argument is donated.
  """

  def write(rows_SX, new_TX, start):
    return jax.lax.dynamic_update_slice(
      rows_SX, new_TX.astype(rows_SX.dtype), (start, jnp.zeros_like(start))
    )

  return LatentCache(
    latent_BSX=jax.vmap(write)(cache.latent_BSX, latent_BTX, start_B),
    k_index_BSI=jax.vmap(write)(cache.k_index_BSI, k_index_BTI, start_B),
  )
