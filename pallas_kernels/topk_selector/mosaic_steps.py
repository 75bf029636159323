"""The steps of the Mosaic GPU selection, for threads and for the interpreter.

The interpreter cannot run inline code: it gets the same steps in jax.numpy,
with which the order of the steps, the copies and the barriers can be tested.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.topk_selector import config, selecting, threshold, workspace


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a block. All but `release` end with the threads together.

  The first arguments of each are the refs of the list's scores and indices, the
  histogram, the mask and the state.
  """

  start: Any
  append: Any  # (tile, count, turn, first, start, end) -> count
  prune: Any  # (count, turn)
  select: Any  # (count)
  write: Any  # (out, count)
  release: Any  # (): a tile was read, and may be written by a copy


def threads(
  sizes: config.MosaicConfig,
  *,
  k: int,
  mask_words: int,
  dtype: Any,
  as_mask: bool,
) -> Steps:
  """The steps of `selecting` and `threshold`, inlined."""
  from jax.experimental.mosaic import gpu as mgpu
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from pallas_kernels.topk_selector import simt

  scalar = plgpu.Layout.WG_SPLAT
  ref = plgpu.RefType()
  number = plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
  shared = (ref,) * 5

  def space(scores, indices, histogram, mask, state):
    return workspace.Workspace(
      threads=simt.Threads(128 * sizes.warpgroups),
      scores=simt.Memory.of(scores),
      indices=simt.Memory.of(indices),
      histogram=simt.Memory.of(histogram),
      mask=simt.Memory.of(mask),
      state=simt.Memory.of(state),
      capacity=sizes.capacity,
      k=k,
      mask_words=mask_words,
    )

  def word(x):
    return simt.Word(x.registers.item())

  def splat(x):
    return mgpu.FragmentedArray.splat(x.value, (), is_signed=True)

  @plgpu.inline_mgpu(arg_types=shared)
  def start(ctx, *shared):
    del ctx
    selecting.start(space(*shared))

  @plgpu.inline_mgpu(
    arg_types=(*shared, ref, *(scalar,) * 5),
    return_type=number,
  )
  def append(ctx, *args):
    del ctx
    *shared, tile, count, turn, first, start, end = args
    count = selecting.append(
      space(*shared),
      simt.Memory.of(tile),
      size=sizes.tile,
      bfloat16=dtype == jnp.bfloat16,
      count=word(count),
      turn=word(turn),
      first=word(first),
      start=word(start),
      end=word(end),
    )
    return splat(count)

  @plgpu.inline_mgpu(arg_types=(*shared, scalar, scalar))
  def prune(ctx, *args):
    del ctx
    *shared, count, turn = args
    selecting.prune(space(*shared), word(count), word(turn))

  @plgpu.inline_mgpu(arg_types=(*shared, scalar))
  def select(ctx, *args):
    del ctx
    *shared, count = args
    threshold.select(space(*shared), word(count))

  @plgpu.inline_mgpu(arg_types=(*shared, ref, scalar))
  def write(ctx, *args):
    del ctx
    *shared, out, count = args
    selecting.write(
      space(*shared), simt.Memory.of(out), word(count), as_mask=as_mask
    )

  # Loads that a barrier ordered before the copy's issue are done.
  return Steps(start, append, prune, select, write, lambda: None)


def plain(
  sizes: config.MosaicConfig,
  *,
  k: int,
  mask_words: int,
  dtype: Any,
  as_mask: bool,
) -> Steps:
  """The same for the interpreter; the list holds the scores' own bits."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  del dtype
  capacity = sizes.capacity
  none = 32 * mask_words  # no key's index

  def bits(score):
    return lax.bitcast_convert_type(score, jnp.int32)

  def score(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)

  def start(*shared):
    *_, state = shared
    state[...] = jnp.full(state.shape, bits(jnp.float32(-jnp.inf)))

  def append(*args):
    list_scores, list_indices, _, _, state, tile, count, _, *rest = args
    first, start, end = rest
    scores = tile[...].astype(jnp.float32)
    index = first + jnp.arange(sizes.tile, dtype=jnp.int32)
    keep = (scores > score(state[...])[0]) & (index >= start) & (index < end)
    at = count + jnp.cumsum(keep.astype(jnp.int32)) - 1
    at = jnp.where(keep, at, capacity)
    list_scores[...] = list_scores[...].at[at].set(bits(scores), mode='drop')
    list_indices[...] = list_indices[...].at[at].set(index, mode='drop')
    return count + jnp.sum(keep.astype(jnp.int32))

  def keep_best(list_scores, list_indices, count):
    """Sorts the list, the best first; returns the k-th score."""
    used = jnp.arange(capacity, dtype=jnp.int32) < count
    scores = jnp.where(used, score(list_scores[...]), -jnp.inf)
    scores = jnp.where(scores == 0, 0.0, scores)
    index = jnp.where(used, list_indices[...], none)
    scores, index = lax.sort((-scores, index), num_keys=2)
    list_scores[...] = bits(-scores)
    list_indices[...] = index
    return -scores[k - 1]

  def prune(*args):
    list_scores, list_indices, _, _, state, count, _ = args
    floor = keep_best(list_scores, list_indices, count)
    state[...] = jnp.full(state.shape, bits(floor))

  def select(*args):
    list_scores, list_indices, *_, count = args
    keep_best(list_scores, list_indices, count)

  def write(*args):
    *shared, out, count = args
    used = jnp.arange(capacity, dtype=jnp.int32) < jnp.minimum(count, k)
    index = jnp.where(used, shared[1][...], none)
    if as_mask:
      chosen = jnp.zeros((32 * mask_words,), jnp.uint32)
      chosen = chosen.at[index].set(1, mode='drop').reshape(-1, 32)
      bit = jnp.arange(32, dtype=jnp.uint32)[None]
      words = jnp.sum(chosen << bit, axis=1, dtype=jnp.uint32)
      out[...] = lax.bitcast_convert_type(words, jnp.int32)
    else:
      index = jnp.sort(index)[:k]
      out[...] = jnp.where(index == none, -1, index)
    start(*shared)

  # The interpreter wants the order of loads and copies spelt out.
  return Steps(start, append, prune, select, write, plgpu.commit_smem)
