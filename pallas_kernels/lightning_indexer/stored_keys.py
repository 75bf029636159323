"""Index keys as a cache holds them: float8 with scales, and in pages.

For implementations that compute with plain arrays: a window of the keys is
made when it is needed, so that neither a dequantised nor a gathered copy of
all of them exists.

Letters: B batch, S key tokens, W keys of a window, I index head dim, P pages of
the pool, N pages of a row.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class StoredKeys:
  """Keys, and how to find and read them.

  Attributes:
    values: [B, S, I], or a pool of pages [P, page, I].
    scale: float32 [B, S] or [P, page], of float8 values; else None.
    pages_BN: int32 numbers of each row's pages in order; None without pages.
  """

  values: Array
  scale: Array | None = None
  pages_BN: Array | None = None

  @property
  def is_plain(self) -> bool:
    """Whether the values are the keys, in their order."""
    return self.scale is None and self.pages_BN is None

  @property
  def num_keys(self) -> int:
    """S."""
    if self.pages_BN is None:
      return self.values.shape[1]
    return self.pages_BN.shape[1] * self.values.shape[1]

  def window(self, offset: Int[Array, ''], width: int) -> Float[Array, 'B W I']:
    """Keys offset .. offset + width - 1 of every row.

    Float8 keys come back in float32, others in their own type.
    """
    k_BWI = self._slice(self.values, offset, width)
    if self.scale is None:
      return k_BWI
    scale_BW = self._slice(self.scale, offset, width)
    return k_BWI.astype(jnp.float32) * scale_BW[..., None]

  def _slice(self, x: Array, offset: Array, width: int) -> Array:
    if self.pages_BN is None:
      return lax.dynamic_slice_in_dim(x, offset, width, axis=1)
    num_pages, page = x.shape[:2]
    position_1W = (offset + jnp.arange(width, dtype=jnp.int32))[None]
    number_BW = jnp.take(self.pages_BN, position_1W[0] // page, axis=1)
    # What is named for positions outside every range may be anything.
    number_BW = jnp.clip(number_BW, 0, num_pages - 1)
    row_BW = number_BW * page + position_1W % page
    return jnp.take(x.reshape(-1, *x.shape[2:]), row_BW, axis=0, mode='clip')
