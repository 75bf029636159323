"""Public signatures of sparse MLA attention.

Letters: B batch, T queries, S keys, H heads, C latent width, X = C + rope
width, K selected keys, Z bytes of a row of the 8-bit cache.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla_attention import (
  fp8_cache,
  pallas_mosaic_gpu,
  reference,
  xla,
)

IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.sparse_mla_attention,
  'xla': xla.sparse_mla_attention,
  'reference': reference.sparse_mla_attention,
}
FP8_CACHE_IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.sparse_mla_attention_fp8_cache,
  'xla': xla.sparse_mla_attention_fp8_cache,
  'reference': reference.sparse_mla_attention_fp8_cache,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseAttentionOutput:
  """What attention returns.

  Attributes:
    out_BTHC: attended latents, of q's type; 0 in a row with no valid key.
    lse_BTH: float32 log of the sum of exponentials over the selected keys
      (natural log, scale included), -inf in a row with no valid key. Carries
      no gradient; `indexer_kl` takes it as the target's normaliser.
  """

  # Any, as jax rebuilds pytrees with shapes, specs or stacked arrays inside.
  out_BTHC: Any
  lse_BTH: Any


def sparse_mla_attention(
  q_BTHX: Float[Array, 'B T H X'],
  kv_BSX: Float[Array, 'B S X'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  latent_dim: int,
  scale: int | float,
  implementation: str | Sequence[str] | None = None,
) -> SparseAttentionOutput:
  """Attends from every query to its own set of keys (arXiv:2512.02556, Eq. 2).

  MQA (absorbed) mode: all heads share the rows [c_kv ; k_rope], and the values
  are their first `latent_dim` entries,

    out[t, h] = sum_s softmax_s(scale * q[t, h] . kv[s]) kv[s, :latent_dim],

  s over the selected set of query t. Scores, softmax and sums are float32.
  The selection is constant; `q_BTHX` and `kv_BSX` get gradients. Equal inputs
  give bitwise equal results, gradients included, on every platform, but for
  the gradient of `kv_BSX` by 'mosaic_gpu': it is summed by atomic additions.

  Args:
    q_BTHX: float32 or bfloat16 absorbed queries [q_latent ; q_rope].
    kv_BSX: rows [c_kv ; k_rope], of q's type.
    indices_BTK: int32 keys of each query, distinct, in any order; -1 is no
      key. Causality and packing are the selector's work: what is named here is
      attended to. Data, so not checked.
    latent_dim: C, at most X.
    scale: factor of the scores, a Python number.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    `SparseAttentionOutput`.

  Raises:
    ValueError: ranks, sizes or types that do not fit.

  Example:
    >>> q, kv = jnp.ones((1, 2, 4, 6)), jnp.ones((1, 2, 6))
    >>> keys = jnp.array([[[0, -1], [0, 1]]])
    >>> sparse_mla_attention(
    ...   q, kv, keys, latent_dim=4, scale=0.5
    ... ).out_BTHC.shape
    (1, 2, 4, 4)
  """
  _require_shapes(q_BTHX, 'kv_BSX', kv_BSX, indices_BTK)
  if q_BTHX.shape[3] != kv_BSX.shape[2]:
    raise ValueError(
      f'q_BTHX.shape={q_BTHX.shape} and kv_BSX.shape={kv_BSX.shape} must '
      'share B and X'
    )
  if q_BTHX.dtype != kv_BSX.dtype:
    raise ValueError(
      f'q_BTHX.dtype={q_BTHX.dtype} and kv_BSX.dtype={kv_BSX.dtype} must be '
      'equal'
    )
  if not 1 <= latent_dim <= kv_BSX.shape[2]:
    raise ValueError(
      f'latent_dim={latent_dim} must be between 1 and X={kv_BSX.shape[2]}'
    )
  out_BTHC, lse_BTH = dispatch.call(
    'sparse_mla_attention',
    IMPLEMENTATIONS,
    implementation,
    q_BTHX,
    kv_BSX,
    indices_BTK,
    latent_dim=latent_dim,
    scale=scale,
  )
  return SparseAttentionOutput(out_BTHC, lse_BTH)


def sparse_mla_attention_fp8_cache(
  q_BTHX: Float[Array, 'B T H X'],
  cache_BSZ: UInt8[Array, 'B S Z'],
  indices_BTK: Int[Array, 'B T K'],
  *,
  scale: int | float,
  implementation: str | Sequence[str] | None = None,
) -> SparseAttentionOutput:
  """`sparse_mla_attention` over a cache of 656-byte rows, for decoding.

  What `sparse_mla_attention` gives over `unpack_fp8_cache(cache_BSZ)` with a
  latent width of 512, but only the selected rows are read, as bytes. Without
  gradients.

  Args:
    q_BTHX: float32 or bfloat16 absorbed queries, X = 576.
    cache_BSZ: uint8 rows of `pack_fp8_cache`, Z = 656; `fp8_cache` says what
      is in them. What is in rows that aren't selected has no influence.
    indices_BTK: as in `sparse_mla_attention`.
    scale: factor of the scores, a Python number.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    `SparseAttentionOutput`, C = 512.

  Raises:
    ValueError: ranks, sizes or types that do not fit.
    NotImplementedError: it is differentiated.

  Example:
    >>> q, cache = (
    ...   jnp.ones((1, 1, 4, 576)),
    ...   pack_fp8_cache(jnp.ones((1, 2, 576))),
    ... )
    >>> keys = jnp.array([[[0, -1]]])
    >>> sparse_mla_attention_fp8_cache(q, cache, keys, scale=0.5).out_BTHC.shape
    (1, 1, 4, 512)
  """
  _require_shapes(q_BTHX, 'cache_BSZ', cache_BSZ, indices_BTK)
  fp8_cache.require_cache(cache_BSZ)
  if q_BTHX.shape[3] != fp8_cache.WIDTH:
    raise ValueError(
      f'q_BTHX.shape={q_BTHX.shape} must have X={fp8_cache.WIDTH}, the width '
      'of an unpacked row'
    )
  if q_BTHX.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f'q_BTHX.dtype={q_BTHX.dtype} must be float32 or bfloat16')
  out_BTHC, lse_BTH = dispatch.call(
    'sparse_mla_attention_fp8_cache',
    FP8_CACHE_IMPLEMENTATIONS,
    implementation,
    _without_gradient(q_BTHX),
    cache_BSZ,
    indices_BTK,
    scale=scale,
  )
  return SparseAttentionOutput(out_BTHC, lse_BTH)


@jax.custom_jvp
def _without_gradient(q_BTHX):
  return q_BTHX


@_without_gradient.defjvp
def _(primals, tangents):
  raise NotImplementedError(
    'sparse_mla_attention_fp8_cache has no gradients; use sparse_mla_attention '
    'over unpack_fp8_cache(cache_BSZ)'
  )


def _require_shapes(q_BTHX, name, rows_BSX, indices_BTK):
  shapes = (
    f'q_BTHX.shape={q_BTHX.shape}, {name}.shape={rows_BSX.shape}, '
    f'indices_BTK.shape={indices_BTK.shape}'
  )
  if (q_BTHX.ndim, rows_BSX.ndim, indices_BTK.ndim) != (4, 3, 3):
    raise ValueError(f'{shapes} must have 4, 3 and 3 dimensions')
  if q_BTHX.shape[:2] != indices_BTK.shape[:2]:
    raise ValueError(f'{shapes}: queries and indices must share B and T')
  if q_BTHX.shape[0] != rows_BSX.shape[0]:
    raise ValueError(f'{shapes}: queries and rows must share B')
  if not q_BTHX.size or not rows_BSX.size or not indices_BTK.size:
    raise ValueError(f'{shapes} must not be empty')
