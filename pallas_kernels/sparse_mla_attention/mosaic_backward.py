"""Backward kernel of sparse MLA attention for Hopper GPUs.

The gradients of the keys are sums over all heads and queries, added to global
memory, and the additions are what costs most. So a block of threads takes one
query and 128 of its heads, in four passes, and adds once for all of them:

  for each 64 heads:     p and d_s of every key; d_q += d_s @ kv
                         p and d_s go to memory of the block's own
  for each half of the   d_kv = p^T @ d_out + d_s^T @ q over the 128 heads,
  columns:               from p and d_s; added to global memory

With 64 heads or fewer there is nothing to sum first: one pass over them, which
adds d_kv too. In a pass a warpgroup brings the operands, keys or p and d_s by
tiles of 64 keys, and two warpgroups share the mathematics:
`mosaic_backward_heads` and `mosaic_backward_columns`.

Letters: N rows (batch and queries), H heads (padded to 64 or to 128s), C latent
width, X = C + rope width, W = X padded to 64s, K selected keys (a multiple of
64), S keys of all batches.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.sparse_mla_attention import (
  mosaic_backward_columns,
  mosaic_backward_heads,
  mosaic_backward_plan,
  mosaic_gather,
  mosaic_scatter,
)

KEYS = mosaic_backward_plan.KEYS
REGISTERS = (232, 40)  # Of a thread that computes, and of one that brings.


def backward(
  q_NHW: jax.Array,
  d_out_NHC: jax.Array,
  kv_SX: jax.Array,
  indices_NK: jax.Array,
  lse_NH: jax.Array,
  delta_NH: jax.Array,
  *,
  rows_per_batch: int,
  keys_per_batch: int,
  scale: float,
  target: mosaic.Target,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of q, [N, H, W] of q's type, and of kv, [S, W] in float32.

  Args:
    q_NHW: queries.
    d_out_NHC: the output's gradient.
    kv_SX: keys.
    indices_NK: int32, -1 is none.
    lse_NH: the forward pass's normaliser, finite.
    delta_NH: sum of out * d_out over C.
    rows_per_batch: queries that share a batch's keys.
    keys_per_batch: S of one batch.
    scale: factor of the scores.
    target: what the kernel is built for.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  num_rows, num_heads, tile_width = q_NHW.shape
  plan = mosaic_backward_plan.Plan(
    num_rows=num_rows,
    num_heads=num_heads,
    latent_dim=d_out_NHC.shape[2],
    tile_width=tile_width,
    num_blocks=indices_NK.shape[1] // KEYS,
    rows_per_batch=rows_per_batch,
    keys_per_batch=keys_per_batch,
    scale=scale,
    target=target,
  )

  def body(*all_refs):
    refs = mosaic_backward_plan.Refs.of(plan, all_refs)
    refs.landed.initialize(2)
    thread = lax.axis_index('thread')
    num_local = plan.num_local_tasks(lax.axis_index('program'))

    def tasks(head_group, column_half):
      def task(i, _):
        def step(group, _):
          head_group(i, group)
          return ()

        lax.fori_loop(0, plan.groups, step, ())
        for half in range(2 if plan.groups > 1 else 0):
          column_half(i, half)
        return ()

      lax.fori_loop(0, num_local, task, ())

    def compute(me):
      plgpu.set_max_registers(REGISTERS[0], action='increase')

      def head_group(i, group):
        mosaic_backward_heads.compute(plan, refs, me, i, group)

      def column_half(i, half):
        mosaic_backward_columns.compute(plan, refs, me, i, half)

      if me == 1:  # The first goes first.
        plgpu.barrier_arrive(refs.turn.at[0])
      tasks(head_group, column_half)
      if me == 0:
        plgpu.barrier_wait(refs.turn.at[0])
        if plan.groups == 1:
          plgpu.barrier_wait(refs.second_done)

    def bring():
      plgpu.set_max_registers(REGISTERS[1], action='decrease')

      def head_group(i, group):
        @pl.when(i + group > 0)
        def _wait():
          plgpu.barrier_wait(refs.done)

        mosaic_backward_heads.bring(plan, refs, i, group)

      def column_half(i, half):
        plgpu.barrier_wait(refs.done)
        mosaic_backward_columns.bring(plan, refs, i, half)

      tasks(head_group, column_half)
      plgpu.barrier_wait(refs.done)

    pl.when(thread == 0)(lambda: compute(0))
    pl.when(thread == 1)(lambda: compute(1))
    pl.when(thread == 2)(bring)

  call = mosaic.kernel(
    body,
    target=target,
    compiler_params=mosaic_gather.compiler_params(),
    kernel_name='sparse_mla_attention_backward',
    out_type=(
      jax.ShapeDtypeStruct(q_NHW.shape, q_NHW.dtype),
      jax.ShapeDtypeStruct(plan.weights_shape, jnp.bfloat16),
    ),
    grid=(plan.num_programs,),
    grid_names=('program',),
    num_threads=3,
    thread_name='thread',
    scratch_types=mosaic_backward_plan.scratch(plan),
  )
  (d_q_NHW, _), sums = mosaic.in_place(call)(
    q_NHW,
    d_out_NHC,
    kv_SX,
    indices_NK.reshape(-1),
    lse_NH,
    delta_NH,
    jnp.zeros((kv_SX.shape[0], tile_width), jnp.float32),
  )
  return d_q_NHW, mosaic_scatter.to_column_order(sums)
