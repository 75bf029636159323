"""Token selection on a GPU, by a kernel that selects from rows of scores.

Letters: B batch, T query tokens, t those of a chunk, S key tokens, J indexer
heads, I index head dim, K selected tokens, R rows, one for each query of the
batch.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import mosaic, windows
from pallas_kernels.lightning_indexer import mosaic_chunks
from pallas_kernels.lightning_indexer import xla as indexer_xla
from pallas_kernels.lightning_indexer.stored_keys import StoredKeys
from pallas_kernels.topk_selector import config
from pallas_kernels.topk_selector.selection import Selection


@functools.partial(jax.jit, static_argnames=('k', 'select_rows'))
def select_topk(
  scores_BTS: Float[Array, 'B T S'],
  *,
  k: int,
  select_rows: Callable[..., Array],
) -> Selection:
  """See `pallas_kernels.select_topk`.

  Args:
    scores_BTS: see `pallas_kernels.select_topk`.
    k: likewise.
    select_rows: (scores_RS, *, k) -> indices_RK.

  Raises:
    NotImplementedError: `select_rows` can't run here.
  """
  scores_BTS = lax.stop_gradient(scores_BTS)
  B, T, S = scores_BTS.shape
  indices_RK = select_rows(scores_BTS.reshape(B * T, S), k=k)
  return Selection(indices_BTK=indices_RK.reshape(B, T, k))


@functools.partial(
  jax.jit, static_argnames=('k', 'select_rows', 'scale_format', 'target')
)
def indexed_topk(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, '_B _S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  *,
  k: int,
  select_rows: Callable[..., Array],
  key_start_BT: Int32[Array, 'B T'] | None = None,
  key_end_BT: Int32[Array, 'B T'] | None = None,
  k_scale_BS: Float32[Array, '_B _S'] | None = None,
  pages_BN: Int32[Array, 'B N'] | None = None,
  scale_format: str = 'float32',
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> Selection:
  """See `pallas_kernels.indexed_topk`.

  The scores of one chunk exist at a time. They come from the indexer's kernel
  where that supports the arguments, else from its xla implementation.

  Args:
    q_index_BTJI: see `pallas_kernels.indexed_topk`.
    k_index_BSI: likewise.
    w_index_BTJ: likewise.
    k: likewise.
    select_rows: (scores_RS, start_R, end_R, *, k) -> indices_RK.
    key_start_BT: see `pallas_kernels.indexed_topk`.
    key_end_BT: likewise.
    k_scale_BS: likewise.
    pages_BN: likewise.
    scale_format: likewise.
    target: where the indexer's kernel is to run.

  Raises:
    NotImplementedError: `select_rows` can't run here.
  """
  q_BTJI, k_BSI, w_BTJ = lax.stop_gradient(
    (q_index_BTJI, k_index_BSI, w_index_BTJ)
  )
  keys = StoredKeys(k_BSI, k_scale_BS, pages_BN)
  B, T = q_BTJI.shape[:2]
  S = keys.num_keys
  start_BT, end_BT = windows.key_ranges(
    key_start_BT, key_end_BT, batch=B, num_queries=T, num_keys=S
  )

  def chunk(
    q_BtJI: Array, w_BtJ: Array, start_Bt: Array, end_Bt: Array
  ) -> Array:
    scores_BtS = _scores(
      q_BtJI, keys, w_BtJ, start_Bt, end_Bt, scale_format, target
    )
    t = scores_BtS.shape[1]
    indices_RK = select_rows(
      scores_BtS.reshape(B * t, S),
      start_Bt.reshape(-1),
      end_Bt.reshape(-1),
      k=k,
    )
    return indices_RK.reshape(B, t, k)

  with jax.named_scope('indexed_topk'):
    indices_BTK = windows.map_query_blocks(
      chunk,
      q_BTJI,
      w_BTJ,
      start_BT,
      end_BT,
      block=config.chunk_queries(batch=B, num_queries=T, num_keys=S),
    )
  return Selection(indices_BTK=indices_BTK)


def _scores(
  q_BtJI: Array,
  keys: StoredKeys,
  w_BtJ: Array,
  start_Bt: Array,
  end_Bt: Array,
  scale_format: str,
  target: mosaic.Target,
) -> Array:
  try:
    return mosaic_chunks.score_stored(
      q_BtJI,
      keys,
      w_BtJ,
      start_Bt,
      end_Bt,
      scale_format=scale_format,
      # Nothing outside the ranges is looked at.
      fill=False,
      target=target,
    )
  except NotImplementedError:
    return indexer_xla.lightning_indexer(
      q_BtJI,
      keys.values,
      w_BtJ,
      key_start_BT=start_Bt,
      key_end_BT=end_Bt,
      k_scale_BS=keys.scale,
      pages_BN=keys.pages_BN,
      scale_format=scale_format,
    )
