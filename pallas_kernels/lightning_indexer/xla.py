"""Lightning indexer on any backend, chunked over queries.

Letters: B batch, T query tokens, S key tokens, W keys of a window, J indexer
heads, I index head dim.

One head at a time adds its share to a [B, block, W] block of scores, so the
[B, T, J, S] tensor of head products exists for no head and no block, forward
or backward. The order of the sum over heads is fixed: a score doesn't depend
on the batch it came in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import windows
from pallas_kernels.lightning_indexer import config, quantization
from pallas_kernels.lightning_indexer.stored_keys import StoredKeys


@functools.partial(jax.jit, static_argnames=('quantized', 'scale_format'))
def lightning_indexer(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, '_B _S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
  quantized: bool = False,
  k_scale_BS: Float32[Array, '_B _S'] | None = None,
  pages_BN: Int32[Array, 'B N'] | None = None,
  scale_format: str = 'float32',
) -> Float32[Array, 'B T S']:
  """See `pallas_kernels.lightning_indexer`."""
  batch, num_queries = q_index_BTJI.shape[:2]
  keys = StoredKeys(k_index_BSI, k_scale_BS, pages_BN)
  start_BT, end_BT = windows.key_ranges(
    key_start_BT,
    key_end_BT,
    batch=batch,
    num_queries=num_queries,
    num_keys=keys.num_keys,
  )
  power_of_two = scale_format == 'ue8m0'
  if quantized or k_scale_BS is not None:
    q_index_BTJI = quantization.round_trip(q_index_BTJI, power_of_two)
  with jax.named_scope('lightning_indexer'):
    if not keys.is_plain:
      return _stored_scores(q_index_BTJI, keys, w_index_BTJ, start_BT, end_BT)
    if quantized:
      k_index_BSI = quantization.round_trip(k_index_BSI, power_of_two)
    return _scores(q_index_BTJI, k_index_BSI, w_index_BTJ, start_BT, end_BT)


def score_stored(
  q_BTJI: Float[Array, 'B T J I'],
  keys: StoredKeys,
  w_BTJ: Float[Array, 'B T J'],
  start_BT: Int[Array, 'B T'],
  end_BT: Int[Array, 'B T'],
  offset: Int[Array, ''],
  width: int,
) -> Float32[Array, 'B T W']:
  """`score_window` of keys as they are stored, made a chunk at a time."""

  def score(offset: Array, width: int) -> Array:
    return score_window(
      q_BTJI, keys.window(offset, width), w_BTJ, start_BT, end_BT, offset
    )

  chunk = width
  if not keys.is_plain:
    chunk = config.key_chunk(batch=q_BTJI.shape[0], dim=q_BTJI.shape[3])
  if chunk >= width:
    return score(offset, width)

  def step(i: Array, scores_BTW: Array) -> Array:
    # The last chunk ends where the window does, and overlaps the one before.
    begin = jnp.minimum(i * chunk, width - chunk)
    return lax.dynamic_update_slice_in_dim(
      scores_BTW, score(offset + begin, chunk), begin, axis=2
    )

  empty_BTW = jnp.full((*q_BTJI.shape[:2], width), -jnp.inf, jnp.float32)
  return lax.fori_loop(0, -(-width // chunk), step, empty_BTW)


def score_window(
  q_BTJI: Float[Array, 'B T J I'],
  k_BWI: Float[Array, 'B W I'],
  w_BTJ: Float[Array, 'B T J'],
  start_BT: Int[Array, 'B T'],
  end_BT: Int[Array, 'B T'],
  offset: Int[Array, ''],
) -> Float32[Array, 'B T W']:
  """Scores of the keys offset .. offset + W - 1, -inf outside the ranges."""

  def add_head(acc_BTW: Array, head: tuple[Array, Array]) -> tuple[Array, None]:
    q_BTI, w_BT = head
    relu_BTW = jax.nn.relu(_dots(q_BTI, k_BWI))
    return acc_BTW + w_BT[..., None] * relu_BTW, None

  shape = (*q_BTJI.shape[:2], k_BWI.shape[1])
  if shape[1] == 1:
    # One query (decode): [W, J] is small, and one product reads the keys once
    # instead of once a head.
    dots_BTWJ = jnp.einsum(
      'btji,bsi->btsj',
      q_BTJI,
      k_BWI,
      precision=lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )
    # Apart from the product, the rest is one vectorised pass on CPU.
    dots_BTWJ = lax.optimization_barrier(dots_BTWJ)
    w_BT1J = w_BTJ[:, :, None].astype(jnp.float32)
    scores_BTW = jnp.sum(jax.nn.relu(dots_BTWJ) * w_BT1J, axis=-1)
  else:
    scores_BTW, _ = lax.scan(
      add_head, jnp.zeros(shape, jnp.float32), _heads_first(q_BTJI, w_BTJ)
    )
  # A negative weight times a zero gives -0.0, which is no other score than 0.
  scores_BTW = jnp.where(scores_BTW == 0, 0.0, scores_BTW)
  valid_BTW = windows.range_mask(
    start_BT, end_BT, offset=offset, width=shape[-1]
  )
  return jnp.where(valid_BTW, scores_BTW, -jnp.inf)


def _dots(q_BTI: Array, k_BWI: Array) -> Array:
  return jnp.einsum(
    'bti,bsi->bts',
    q_BTI,
    k_BWI,
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _heads_first(q_BTJI: Array, w_BTJ: Array) -> tuple[Array, Array]:
  q_JBTI = jnp.moveaxis(q_BTJI, 2, 0)
  w_JBT = jnp.moveaxis(w_BTJ, 2, 0).astype(jnp.float32)
  return q_JBTI, w_JBT


@jax.custom_vjp
def _scores(
  q_BTJI: Array, k_BSI: Array, w_BTJ: Array, start_BT: Array, end_BT: Array
) -> Array:
  return _stored_scores(q_BTJI, StoredKeys(k_BSI), w_BTJ, start_BT, end_BT)


def _stored_scores(
  q_BTJI: Array,
  keys: StoredKeys,
  w_BTJ: Array,
  start_BT: Array,
  end_BT: Array,
) -> Array:
  batch, num_queries = q_BTJI.shape[:2]
  num_keys = keys.num_keys
  sizes = config.xla_config(
    batch=batch, num_queries=num_queries, num_keys=num_keys
  )

  def score_block(
    q_BtJI: Array, w_BtJ: Array, start_Bt: Array, end_Bt: Array
  ) -> Array:
    def branch(offset: Array, width: int) -> Array:
      scores_BtW = score_stored(
        q_BtJI, keys, w_BtJ, start_Bt, end_Bt, offset, width
      )
      if width == num_keys:
        return scores_BtW
      empty_BtS = jnp.full(
        (*scores_BtW.shape[:2], num_keys), -jnp.inf, jnp.float32
      )
      return lax.dynamic_update_slice_in_dim(
        empty_BtS, scores_BtW, offset, axis=2
      )

    return windows.over_window(
      branch, start_Bt, end_Bt, num_keys=num_keys, count=sizes.key_windows
    )

  return windows.map_query_blocks(
    score_block, q_BTJI, w_BTJ, start_BT, end_BT, block=sizes.query_block
  )


def _scores_fwd(
  q_BTJI: Array, k_BSI: Array, w_BTJ: Array, start_BT: Array, end_BT: Array
) -> tuple[Array, tuple[Array, ...]]:
  residuals = (q_BTJI, k_BSI, w_BTJ, start_BT, end_BT)
  return _scores(*residuals), residuals


def _scores_bwd(
  residuals: tuple[Array, ...], g_BTS: Array
) -> tuple[Array, Array, Array, np.ndarray, np.ndarray]:
  q_BTJI, k_BSI, w_BTJ, start_BT, end_BT = residuals
  batch, num_queries = q_BTJI.shape[:2]
  num_keys = k_BSI.shape[1]
  sizes = config.xla_config(
    batch=batch, num_queries=num_queries, num_keys=num_keys
  )
  block = sizes.query_block
  padded = [
    windows.pad_queries(x, block=block)
    for x in (q_BTJI, w_BTJ, g_BTS, start_BT, end_BT)
  ]

  def step(dk_BSI: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
    q_BtJI, w_BtJ, g_BtS, start_Bt, end_Bt = (
      windows.query_slice(x, i, block=block) for x in padded
    )

    def branch(
      offset: Array, width: int, dk_BSI: Array
    ) -> tuple[Array, tuple[Array, Array]]:
      k_BWI = lax.dynamic_slice_in_dim(k_BSI, offset, width, axis=1)
      valid_BtW = windows.range_mask(
        start_Bt, end_Bt, offset=offset, width=width
      )
      g_BtW = lax.dynamic_slice_in_dim(g_BtS, offset, width, axis=2)
      # The -inf outside the range are constants, whatever g holds there.
      g_BtW = jnp.where(valid_BtW, g_BtW, 0.0)
      dk_BWI, grads = _window_gradients(q_BtJI, k_BWI, w_BtJ, g_BtW)
      dk_BWI += lax.dynamic_slice_in_dim(dk_BSI, offset, width, axis=1)
      return (
        lax.dynamic_update_slice_in_dim(dk_BSI, dk_BWI, offset, axis=1),
        grads,
      )

    return windows.over_window(
      branch,
      start_Bt,
      end_Bt,
      dk_BSI,
      num_keys=num_keys,
      count=sizes.key_windows,
    )

  dk_BSI, (dq_nBtJI, dw_nBtJ) = lax.scan(
    step,
    jnp.zeros(k_BSI.shape, jnp.float32),
    jnp.arange(padded[0].shape[1] // block),
  )

  def join(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(batch, -1, *x.shape[3:])[:, :num_queries]

  # Integer arguments have tangents of dtype float0.
  none = np.zeros(start_BT.shape, jax.dtypes.float0)
  return (
    join(dq_nBtJI).astype(q_BTJI.dtype),
    dk_BSI.astype(k_BSI.dtype),
    join(dw_nBtJ).astype(w_BTJ.dtype),
    none,
    none,
  )


def _window_gradients(
  q_BTJI: Array, k_BWI: Array, w_BTJ: Array, g_BTW: Array
) -> tuple[Array, tuple[Array, Array]]:
  """dk of the window, and (dq, dw) of the block, head by head, in float32."""

  def add_head(
    dk_BWI: Array, head: tuple[Array, Array]
  ) -> tuple[Array, tuple[Array, Array]]:
    q_BTI, w_BT = head
    dots_BTW = _dots(q_BTI, k_BWI)
    dw_BT = jnp.sum(g_BTW * jax.nn.relu(dots_BTW), axis=-1)
    ddots_BTW = jnp.where(dots_BTW > 0, g_BTW * w_BT[..., None], 0.0)
    dq_BTI = jnp.einsum(
      'bts,bsi->bti',
      ddots_BTW,
      k_BWI.astype(jnp.float32),
      precision=lax.Precision.HIGHEST,
    )
    dk_BWI += jnp.einsum(
      'bts,bti->bsi',
      ddots_BTW,
      q_BTI.astype(jnp.float32),
      precision=lax.Precision.HIGHEST,
    )
    return dk_BWI, (dq_BTI, dw_BT)

  dk_BWI, (dq_JBTI, dw_JBT) = lax.scan(
    add_head, jnp.zeros(k_BWI.shape, jnp.float32), _heads_first(q_BTJI, w_BTJ)
  )
  return dk_BWI, (jnp.moveaxis(dq_JBTI, 0, 2), jnp.moveaxis(dw_JBT, 0, 2))


_scores.defvjp(_scores_fwd, _scores_bwd)
