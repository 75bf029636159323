"""The backward kernel's pass over half of the columns: d_kv of all its heads.

  d_kv = p^T @ d_out + d_s^T @ q, summed over one or two 64s of heads

The warpgroups share the columns, or take turns by tile where there are too few;
the rotary columns, which go with the right half, they take in turns. A slot of
tiles is given back before its sums are added, so that more arrives meanwhile.
One multiplies while the other adds.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_mla_attention import (
  mosaic_backward_plan,
  mosaic_gather,
  mosaic_scatter,
)
from pallas_kernels.sparse_mla_attention.mosaic_backward_plan import (
  CHUNK,
  D_S,
  HEADS,
  P,
  Plan,
  Refs,
)


def compute(plan: Plan, refs: Refs, me: int, i: Any, half: int) -> None:
  """What warpgroup `me` does in task `i` for the left (0) or right (1) half."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  row, _ = plan.locate(i)
  shared = plan.half > CHUNK
  width = plan.half // 2 if shared else plan.half
  mine = me * width if shared else 0
  rope_column, rope_width = plan.columns[2]
  plgpu.barrier_wait(refs.halves_ready[half])

  def step(block, _):
    slot = lax.rem(block, 2)
    indices = mosaic_backward_plan.load_indices(
      plan, refs, row, block, plgpu.Layout.WGMMA.reduce(1)
    )
    indices = jnp.where(indices < 0, -1, indices + plan.first_key(row))
    plgpu.barrier_wait(refs.tile_ready.at[slot])
    plgpu.barrier_wait(refs.turn.at[me])

    def gradients(factors, columns):
      def scoped(total_ref):
        for tiles, parts in factors:
          for group in range(plan.groups):
            plgpu.wgmma(
              total_ref,
              tiles.at[slot, group].transpose((1, 0)),
              mosaic_backward_plan.hidden(parts[group], plan.target).at[
                :, columns
              ],
            )
        return total_ref[...]

      accumulator = mosaic_backward_plan.accumulator(columns.size)
      return pl.run_scoped(scoped, accumulator)

    def give_back():
      plgpu.barrier_arrive(refs.turn.at[1 - me])
      plgpu.barrier_arrive(refs.tile_free.at[slot])

    def add(x, column):
      mosaic_scatter.add_rows(
        refs.sums, indices, x, column=column, target=plan.target
      )

    def rope():
      parts = (refs.q_smem[2], refs.rope_smem)
      x = gradients([(refs.d_s_tiles, parts)], pl.ds(0, rope_width))
      add(x, rope_column)

    def latents(then=lambda: None):
      factors = (refs.d_s_tiles, refs.q_smem), (refs.p_tiles, refs.d_out_smem)
      x = gradients(factors, pl.ds(mine, width))
      then()
      add(x, plan.columns[half][0] + mine)

    if half == 1:
      pl.when(slot != me)(rope)
    if shared:
      latents(then=give_back)
    else:
      pl.when(slot == me)(latents)
      give_back()
    return ()

  lax.fori_loop(0, plan.num_blocks, step, ())
  plgpu.barrier_arrive(refs.done)


def bring(plan: Plan, refs: Refs, i: Any, half: int) -> None:
  """Brings what `compute` works on; the memory must be free."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  row, first = plan.locate(i)
  here, rope = (pl.ds(*plan.columns[part]) for part in (half, 2))
  mosaic_gather.fence(plan.target)
  for group in range(plan.groups):
    heads = pl.ds((first + group) * HEADS, HEADS)
    copies = [
      (refs.q.at[row, heads, here], refs.q_smem[group]),
      (refs.d_out.at[row, heads, here], refs.d_out_smem[group]),
    ]
    if half == 1:
      rope_smem = refs.rope_smem if group else refs.q_smem[2]
      copies.append((refs.q.at[row, heads, rope], rope_smem))
    for source, smem in copies:
      plgpu.copy_gmem_to_smem(source, smem.at[0], refs.halves_ready[half])

  def step(block, _):
    slot = lax.rem(block, 2)

    @pl.when(block >= 2)
    def _wait():
      plgpu.barrier_wait(refs.tile_free.at[slot])

    for group in range(plan.groups):
      for which, tiles in ((P, refs.p_tiles), (D_S, refs.d_s_tiles)):
        plgpu.copy_gmem_to_smem(
          refs.weights.at[plan.weights_tile(which, group, block)],
          tiles.at[slot, group],
          refs.tile_ready.at[slot],
        )
    return ()

  lax.fori_loop(0, plan.num_blocks, step, ())
  for block in range(max(0, plan.num_blocks - 2), plan.num_blocks):
    plgpu.barrier_wait(refs.tile_free.at[block % 2])
