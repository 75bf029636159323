"""Token selection in Mosaic GPU; see `mosaic_kernel`.

Letters: B batch, T query tokens, S key tokens, K selected tokens, R rows, one
for each query of the batch, W words of 32 keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import mosaic
from pallas_kernels.topk_selector import (
  by_rows,
  config,
  mosaic_kernel,
  workspace,
)

# Bytes of a bulk copy, and of its addresses, are multiples of this.
_COPY_BYTES = 16
# Of shared memory, for the state, the barriers and gaps.
_OTHER_BYTES = 4096


def select_rows(
  scores_RS: Float[Array, 'R S'],
  start_R: Int32[Array, ' R'] | None = None,
  end_R: Int32[Array, ' R'] | None = None,
  *,
  k: int,
  target: mosaic.Target = mosaic.Target.DEVICE,
  sizes: config.MosaicConfig | None = None,
) -> Int32[Array, 'R K']:
  """Ascending indices of the k best keys of each row, then -1.

  Args:
    scores_RS: float32 or bfloat16.
    start_R: first key that counts; tiles before it are not read.
    end_R: one past the last. None for both: every key.
    k: width of the result.
    target: what to build for.
    sizes: None for those of `config`.

  Raises:
    NotImplementedError: the target is out of reach, or k is too large.
  """
  return _run(
    scores_RS, start_R, end_R, k=k, target=target, sizes=sizes, as_mask=False
  )


select_topk = functools.partial(by_rows.select_topk, select_rows=select_rows)
"""See `pallas_kernels.select_topk`; raises as `select_rows`."""

indexed_topk = functools.partial(by_rows.indexed_topk, select_rows=select_rows)
"""See `pallas_kernels.indexed_topk`; raises as `select_rows`."""


@functools.partial(jax.jit, static_argnames='k')
def selection_mask(
  scores_BTS: Float[Array, 'B T S'], *, k: int
) -> Bool[Array, 'B T S']:
  """See `pallas_kernels.selection_mask`.

  Raises:
    NotImplementedError: as `select_rows`.
  """
  scores_BTS = lax.stop_gradient(scores_BTS)
  mask_RS = mask_rows(scores_BTS.reshape(-1, scores_BTS.shape[2]), k=k)
  return mask_RS.reshape(scores_BTS.shape)


def mask_rows(
  scores_RS: Float[Array, 'R S'],
  *,
  k: int,
  target: mosaic.Target = mosaic.Target.DEVICE,
  sizes: config.MosaicConfig | None = None,
) -> Bool[Array, 'R S']:
  """The set of `select_rows` as a mask."""
  words_RW = _run(
    scores_RS, None, None, k=k, target=target, sizes=sizes, as_mask=True
  )
  bit = jnp.arange(32, dtype=jnp.int32)[None, None]
  mask_RWb = jnp.right_shift(words_RW[..., None], bit) & 1 != 0
  return mask_RWb.reshape(len(scores_RS), -1)[:, : scores_RS.shape[1]]


def _run(
  scores_RS: Array,
  start_R: Array | None,
  end_R: Array | None,
  *,
  k: int,
  target: mosaic.Target,
  sizes: config.MosaicConfig | None,
  as_mask: bool,
) -> Array:
  mosaic.require(target)
  R, S = scores_RS.shape
  # No row has more keys than it has: its list never holds more.
  wanted = min(k, S)
  itemsize = scores_RS.dtype.itemsize
  if sizes is None:
    sizes = config.mosaic_config(
      num_rows=R,
      num_keys=S,
      k=wanted,
      num_multiprocessors=mosaic.num_multiprocessors(target),
      interprets=target.interprets,
    )
  share = 4 * 128 * sizes.warpgroups
  if sizes.tile % share and not target.interprets:
    raise ValueError(f'tile is {sizes.tile}; expected a multiple of {share}')
  if wanted + sizes.tile > sizes.capacity:
    raise ValueError(
      f'capacity is {sizes.capacity}; expected at least k + tile, '
      f'{wanted + sizes.tile}'
    )
  num_words = _mask_words(S, sizes)
  needed = (
    sizes.stages * sizes.tile * itemsize
    + 8 * sizes.capacity
    + 4 * (max(workspace.BINS, wanted) + num_words)
  )
  if needed + _OTHER_BYTES > mosaic.SHARED_MEMORY_BYTES:
    raise NotImplementedError(
      f'the Mosaic selection of the best {k} of {S} keys needs {needed} bytes '
      f'of shared memory; there are {mosaic.SHARED_MEMORY_BYTES - _OTHER_BYTES}'
    )
  if R * S == 0:
    if as_mask:
      return jnp.zeros((R, num_words), jnp.int32)
    return jnp.full((R, k), -1, jnp.int32)
  if start_R is None or end_R is None:
    # Cheap beside the scores, and one kernel less.
    start_R, end_R = jnp.zeros((R,), jnp.int32), jnp.full((R,), S, jnp.int32)
  start_R = jnp.clip(start_R, 0, S)
  end_R = jnp.clip(end_R, start_R, S)
  scores_RS = _fit(scores_RS, sizes)
  call = mosaic_kernel.kernel(
    num_rows=R,
    num_keys=scores_RS.shape[1],
    dtype=scores_RS.dtype,
    k=wanted,
    target=target,
    sizes=sizes,
    mask_words=num_words,
    as_mask=as_mask,
  )
  out_RX = call(scores_RS, start_R, end_R)
  if as_mask:
    return out_RX
  return jnp.pad(out_RX, ((0, 0), (0, k - wanted)), constant_values=-1)


def _mask_words(num_keys: int, sizes: config.MosaicConfig) -> int:
  """Words of a row's mask, as many for each thread."""
  num_threads = 128 * sizes.warpgroups
  return math.ceil(num_keys / (32 * num_threads)) * num_threads


def _fit(scores_RS: Array, sizes: config.MosaicConfig) -> Array:
  """Fills rows up to what can be copied: whole 16 bytes, and one tile."""
  S = scores_RS.shape[1]
  multiple = _COPY_BYTES // scores_RS.dtype.itemsize
  missing = max(sizes.tile, math.ceil(S / multiple) * multiple) - S
  if not missing:
    return scores_RS
  return jnp.pad(scores_RS, ((0, 0), (0, missing)), constant_values=-jnp.inf)
