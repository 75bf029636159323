"""The cache of one DSA layer: latent rows and indexer keys.

A cached row is what MLA in MQA mode attends to, [c_kv ; k_rope] (spec 3.3):
C + R numbers a token whatever the number of heads. The indexer adds its key,
I numbers a token (spec 3.4). Either can be kept in 8 bits: rows as the 656
bytes of `pallas_kernels.pack_fp8_cache`, keys as float8 with a scale each.

A cache is made of areas of equal size. Without pages request b has area b to
itself. With pages an area is a page, and a table says which pages hold a
request's tokens, in order: requests of different lengths share one pool.

Letters: B requests, T new tokens, A areas, O tokens an area holds, N pages of
a request, S = O or N O tokens that a request can have, C kv latent, R rope,
X = C + R, I index_head_dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.sparse_mla_attention import fp8_cache

FORMATS = ('compute', 'fp8')
NO_PAGE = -1
SCALE_FORMAT = 'ue8m0'
"""Of 8-bit indexer keys, as in the released inference code (spec 3.6)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
  """One layer's cache; a value, never changed in place.

  Attributes:
    latent_AOX: rows [c_kv after its norm ; k_rope after rotation]; uint8
      [A, O, 656] in the format 'fp8'.
    k_index_AOI: indexer keys after LayerNorm and rotation; float8 in the
      format 'fp8'.
    k_scale_AO: float32, what float8 keys are multiplied by; else None.
  """

  latent_AOX: Any
  k_index_AOI: Any
  k_scale_AO: Any = None

  @property
  def area_size(self) -> int:
    return self.latent_AOX.shape[1]


def init(
  *,
  areas: int,
  area_size: int,
  latent_dim: int,
  index_dim: int,
  dtype,
  latent_format: str = 'compute',
  index_format: str = 'compute',
) -> LatentCache:
  """Returns an empty cache.

  Args:
    areas: A: requests, or pages of all requests.
    area_size: O: tokens of each.
    latent_dim: X.
    index_dim: I.
    dtype: of what is not kept in 8 bits.
    latent_format: 'compute' or 'fp8'.
    index_format: 'compute' or 'fp8'.

  Raises:
    ValueError: 8-bit rows of another shape than V3.2's 512 + 64.
  """
  width, row_dtype = latent_dim, dtype
  if latent_format == 'fp8':
    if latent_dim != fp8_cache.WIDTH:
      raise ValueError(
        f"latent_format: got 'fp8' for rows of {latent_dim}, expected rows of "
        f'{fp8_cache.WIDTH} (kv_lora_rank 512 and '
        "qk_rope_head_dim 64, which the 656-byte row is made for) or 'compute'"
      )
    width, row_dtype = fp8_cache.ROW_BYTES, jnp.uint8
  is_fp8 = index_format == 'fp8'
  return LatentCache(
    latent_AOX=jnp.zeros((areas, area_size, width), row_dtype),
    k_index_AOI=jnp.zeros(
      (areas, area_size, index_dim), jnp.float8_e4m3fn if is_fp8 else dtype
    ),
    k_scale_AO=jnp.zeros((areas, area_size), jnp.float32) if is_fp8 else None,
  )


def append(
  cache: LatentCache,
  latent_BTX: Float[Array, 'B T X'],
  k_index_BTI: Float[Array, 'B T I'],
  start_B: Int[Array, ' B'],
  pages_BN: Int[Array, 'B N'] | None = None,
) -> LatentCache:
  """Writes T new tokens of each request at its own offset.

  Args:
    cache: what is there already.
    latent_BTX: new latent rows.
    k_index_BTI: new indexer keys.
    start_B: position of each request's first new token. Without pages the
      caller keeps start_B + T within the area (`lax` would clamp a write past
      it); with pages, tokens that have no page are not written, and what is
      not finite is written as 0 (the caller finds it in the hidden states).
    pages_BN: pages of each request, -1 for none; None: request b has area b.

  Returns:
    The longer cache; XLA updates in place when the argument is donated.
  """
  if pages_BN is not None:
    # Rows of others may be read under a mask, and 0 times NaN is NaN: whatever
    # goes wrong in one request must stay there.
    latent_BTX, k_index_BTI = map(_finite, (latent_BTX, k_index_BTI))
  new = _stored(cache, latent_BTX, k_index_BTI)
  if pages_BN is None:
    return jax.tree.map(lambda old, x: _write_area(old, x, start_B), cache, new)
  A, O = cache.latent_AOX.shape[:2]
  position_BT = start_B[:, None] + jnp.arange(latent_BTX.shape[1])[None, :]
  page_BT = _page_of(pages_BN, position_BT // O)
  # One past the end is dropped; -1 would count from the end.
  row_BT = jnp.where(page_BT < 0, A * O, page_BT * O + position_BT % O)

  def write(old_AO: Array, new_BT: Array) -> Array:
    flat = old_AO.reshape(A * O, *old_AO.shape[2:])
    flat = flat.at[row_BT].set(new_BT, mode='drop')
    return flat.reshape(old_AO.shape)

  return jax.tree.map(write, cache, new)


def latent_rows(
  latent_AOX: Array, pages_BN: Int[Array, 'B N'] | None, dtype
) -> Float[Array, 'B S X']:
  """Each request's rows in the order of their positions.

  Rows that were never written hold anything finite.
  """
  rows = in_order(latent_AOX, pages_BN)
  if rows.dtype == jnp.uint8:
    rows = pallas_kernels.unpack_fp8_cache(rows)
  return rows.astype(dtype)


def index_keys(
  k_index_AOI: Array,
  k_scale_AO: Float[Array, 'A O'] | None,
  pages_BN: Int[Array, 'B N'] | None,
  dtype,
) -> Float[Array, 'B S I']:
  """Each request's indexer keys, likewise."""
  keys = in_order(k_index_AOI, pages_BN)
  if k_scale_AO is not None:
    scale = in_order(k_scale_AO, pages_BN)
    keys = keys.astype(jnp.float32) * scale[..., None]
  return keys.astype(dtype)


def in_order(x_AO: Array, pages_BN: Int[Array, 'B N'] | None) -> Array:
  """[B, S, ...] of what is in areas [A, O, ...]; missing pages read any."""
  if pages_BN is None:
    return x_AO
  pages = x_AO[jnp.maximum(pages_BN, 0)]
  B, N, O = pages.shape[:3]
  return pages.reshape(B, N * O, *x_AO.shape[2:])


def _stored(
  cache: LatentCache, latent_BTX: Array, k_index_BTI: Array
) -> LatentCache:
  """New tokens in the formats of the cache."""
  rows = latent_BTX
  if cache.latent_AOX.dtype == jnp.uint8:
    if rows.dtype not in (jnp.float32, jnp.bfloat16):
      rows = rows.astype(jnp.float32)
    rows = pallas_kernels.pack_fp8_cache(rows)
  keys, scale = k_index_BTI, None
  if cache.k_scale_AO is not None:
    keys, scale = pallas_kernels.quantize_index_keys(
      keys, scale_format=SCALE_FORMAT
    )
  return LatentCache(
    rows.astype(cache.latent_AOX.dtype),
    keys.astype(cache.k_index_AOI.dtype),
    scale,
  )


def _finite(x: Array) -> Array:
  return jnp.where(jnp.isfinite(x), x, 0)


def _write_area(old_BO: Array, new_BT: Array, start_B: Array) -> Array:
  def write(old_O, new_T, start):
    rest = (jnp.zeros_like(start),) * (old_O.ndim - 1)
    return jax.lax.dynamic_update_slice(old_O, new_T, (start, *rest))

  return jax.vmap(write)(old_BO, new_BT, start_B)


def _page_of(pages_BN: Array, number_BT: Array) -> Array:
  """The page of each of a request's own page numbers; -1 past the last."""
  N = pages_BN.shape[1]
  page_BT = jnp.take_along_axis(pages_BN, jnp.minimum(number_BT, N - 1), axis=1)
  return jnp.where(number_BT < N, page_BT, NO_PAGE)
