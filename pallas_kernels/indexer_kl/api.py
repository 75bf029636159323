"""Public signature of the indexer's loss.

Letters: B batch, T queries, S keys, J indexer heads, I indexer width, H heads
of the main attention, G of its keys, X its width, K selected keys.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.indexer_kl import pallas_mosaic_gpu, reference, xla

IMPLEMENTATIONS = {
  'mosaic_gpu': pallas_mosaic_gpu.indexer_kl,
  'xla': xla.indexer_kl,
  'reference': reference.indexer_kl,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexerKL:
  """The loss, and what it is the weighted sum of.

  Attributes:
    loss: float32 scalar, sum of row_weight * KL.
    kl_BT: float32 divergence of each row, 0 in a row with no valid key or of
      weight 0. For logging: it carries no gradient.
  """

  # Any, as jax rebuilds pytrees with shapes, specs or stacked arrays inside.
  loss: Any
  kl_BT: Any


def indexer_kl(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, 'B S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  q_BTHX: Float[Array, 'B T H X'],
  k_BSGX: Float[Array, 'B S G X'],
  lse_BTH: Float[Array, 'B T H'],
  row_weight_BT: Float[Array, 'B T'],
  *,
  scale: int | float,
  indices_BTK: Int[Array, 'B T K'] | None = None,
  key_start_BT: Int[Array, 'B T'] | None = None,
  key_end_BT: Int[Array, 'B T'] | None = None,
  head_axis: str | tuple[str, ...] | None = None,
  implementation: str | Sequence[str] | None = None,
) -> IndexerKL:
  """Divergence of the indexer's distribution from the main attention's.

  Over the valid keys s of a query t (arXiv:2512.02556, Eq. 3 with all
  preceding keys, Eq. 4 with the selected set):

    p[t, s] = 1/H sum_h exp(scale * q[t, h] . k[s, g(h)] - lse[t, h])
    I[t, s] = sum_j w[t, j] ReLU(q_index[t, j] . k_index[s])
    KL[t]   = sum_s p[t, s] (log p[t, s] - log softmax_s(I[t, :])[s])
    loss    = sum_{b,t} row_weight[b, t] KL[b, t]

  Gradients reach `q_index`, `k_index` and `w_index` only: p is the detached
  target. Under differentiation the forward pass computes the loss and all
  three gradients in one sweep; they are the residuals, named
  'indexer_kl_grads' for `jax.checkpoint` policies.

  Args:
    q_index_BTJI: indexer queries, float32 or bfloat16.
    k_index_BSI: indexer keys.
    w_index_BTJ: head weights, every scale included; of any sign.
    q_BTHX: queries of the main attention, in either mode.
    k_BSGX: its keys: G = 1 (MQA mode, the latent rows), G = H (MHA mode), or
      any G that divides H.
    lse_BTH: float32 normaliser over the same valid keys, as the attention
      returns it. So p sums to 1 without a second pass.
    row_weight_BT: float32; 0 leaves a row out. Normalise it over all rows of a
      step, and the loss does not depend on how they are cut into batches.
    scale: the main attention's factor of the scores.
    indices_BTK: int32 selected keys, -1 for none; excludes the ranges.
    key_start_BT: int32 first valid key of each query; None means 0.
    key_end_BT: int32, one past the last; None means causal, aligned at the
      end: t + 1 + S - T.
    head_axis: inside a `jax.shard_map`, the mesh axis (or axes) that the heads
      of q, k and lse are cut over: H are the heads of one member then, and p
      is the mean over those of all.
    implementation: see `pallas_kernels.dispatch`.

  Returns:
    `IndexerKL`.

  Raises:
    ValueError: sizes that do not fit, or a selection together with ranges.

  Example:
    >>> q_index, k_index = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 4))
    >>> q, k = jnp.ones((1, 3, 2, 5)), jnp.ones((1, 3, 1, 5))
    >>> lse = 0.2 * 5 + jnp.log(jnp.array([[[1.0], [2.0], [3.0]]]))
    >>> output = indexer_kl(
    ...   q_index,
    ...   k_index,
    ...   jnp.ones((1, 3, 2)),
    ...   q,
    ...   k,
    ...   jnp.broadcast_to(lse, (1, 3, 2)),
    ...   jnp.full((1, 3), 1 / 3),
    ...   scale=0.2,
    ... )
    >>> bool(abs(output.loss) < 1e-6)  # both distributions are uniform
    True
  """
  batch, num_queries, num_heads, width = q_BTHX.shape
  num_keys, num_key_heads = k_BSGX.shape[1:3]
  index_heads, index_width = q_index_BTJI.shape[2:]
  expected = {
    'q_index_BTJI': (
      q_index_BTJI,
      (batch, num_queries, *q_index_BTJI.shape[2:]),
    ),
    'k_index_BSI': (k_index_BSI, (batch, num_keys, index_width)),
    'w_index_BTJ': (w_index_BTJ, (batch, num_queries, index_heads)),
    'k_BSGX': (k_BSGX, (batch, num_keys, num_key_heads, width)),
    'lse_BTH': (lse_BTH, (batch, num_queries, num_heads)),
    'row_weight_BT': (row_weight_BT, (batch, num_queries)),
    'key_start_BT': (key_start_BT, (batch, num_queries)),
    'key_end_BT': (key_end_BT, (batch, num_queries)),
  }
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(f'{name}.shape={array.shape} must be {shape}')
  if num_heads % num_key_heads:
    raise ValueError(
      f'k_BSGX.shape={k_BSGX.shape}: its heads must divide the H={num_heads} '
      'heads of q_BTHX'
    )
  if indices_BTK is not None:
    if key_start_BT is not None or key_end_BT is not None:
      raise ValueError(
        'indices_BTK excludes key_start_BT and key_end_BT: the selection is '
        'the valid set'
      )
    if indices_BTK.shape[:2] != (batch, num_queries):
      raise ValueError(
        f'indices_BTK.shape={indices_BTK.shape} must begin with '
        f'{(batch, num_queries)}'
      )
  else:
    if key_start_BT is None:
      key_start_BT = jnp.zeros((batch, num_queries), jnp.int32)
    if key_end_BT is None:
      ends_T = jnp.arange(num_queries, dtype=jnp.int32) + 1
      ends_T = jnp.maximum(ends_T + num_keys - num_queries, 0)
      key_end_BT = jnp.broadcast_to(ends_T, (batch, num_queries))
  loss, kl_BT = dispatch.call(
    'indexer_kl',
    IMPLEMENTATIONS,
    implementation,
    q_index_BTJI,
    k_index_BSI,
    w_index_BTJ,
    lax.stop_gradient(q_BTHX),
    lax.stop_gradient(k_BSGX),
    lax.stop_gradient(lse_BTH),
    lax.stop_gradient(row_weight_BT),
    scale=scale,
    indices_BTK=indices_BTK,
    key_start_BT=key_start_BT,
    key_end_BT=key_end_BT,
    head_axis=head_axis,
  )
  return IndexerKL(loss, lax.stop_gradient(kl_BT))
