"""Public signature of sparse MLA attention.

Letters: B batch, T queries, S keys, H heads, C latent width, X = C + rope
width, K selected keys.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.sparse_mla_attention import (
  pallas_mosaic_gpu,
  reference,
  xla,
)

IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.sparse_mla_attention,
  'xla': xla.sparse_mla_attention,
  'reference': reference.sparse_mla_attention,
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
  if q_BTHX.ndim != 4 or kv_BSX.ndim != 3 or indices_BTK.ndim != 3:
    raise ValueError(
      f'q_BTHX.shape={q_BTHX.shape}, kv_BSX.shape={kv_BSX.shape}, '
      f'indices_BTK.shape={indices_BTK.shape} must have 4, 3 and 3 dimensions'
    )
  if q_BTHX.shape[:2] != indices_BTK.shape[:2]:
    raise ValueError(
      f'q_BTHX.shape={q_BTHX.shape} and indices_BTK.shape='
      f'{indices_BTK.shape} must share B and T'
    )
  if (q_BTHX.shape[0], q_BTHX.shape[3]) != (kv_BSX.shape[0], kv_BSX.shape[2]):
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
  if not q_BTHX.size or not kv_BSX.size or not indices_BTK.size:
    raise ValueError(
      f'q_BTHX.shape={q_BTHX.shape}, kv_BSX.shape={kv_BSX.shape}, '
      f'indices_BTK.shape={indices_BTK.shape} must not be empty'
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
