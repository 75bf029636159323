"""Sums of products in registers, and operands that stay out of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic


def add_products(
  total: jax.Array,
  factors: Any,
  target: mosaic.Target,
  meanwhile: Callable[[], Any] | None = None,
  results: Any = (),
) -> Any:
  """`total` plus the sum of `a @ b` over `factors`, in registers.

  The interpreter has no accumulator that starts with a value, so there the
  products are added afterwards.

  Args:
    total: float32, in wgmma's layout.
    factors: pairs of operands.
    target: what the kernel is built for.
    meanwhile: called when the products are under way; returns a tuple.
    results: shapes and types of what it returns.

  Returns:
    The sum, or a pair of it and of what `meanwhile` returned.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  def products(total_ref):
    for a, b in factors:
      plgpu.wgmma(total_ref, a, b)

  if target.interprets:

    def scoped(total_ref):
      products(total_ref)
      return total_ref[...]

    num_rows, num_columns = total.shape
    accumulator = plgpu.ACC((num_rows, num_columns), jnp.float32)
    result = None if meanwhile is None else meanwhile()
    total += pl.run_scoped(scoped, accumulator)
    return total if meanwhile is None else (total, result)

  if meanwhile is None:
    return pl.run_state(products)(plgpu.ACC.init(total))

  def both(refs):
    total_ref, result_refs = refs
    products(total_ref)
    for ref, x in zip(result_refs, meanwhile(), strict=True):
      ref[...] = x

  # What the results are before they are assigned is of no consequence.
  initial = tuple(jnp.zeros(shape, dtype) for shape, dtype in results)
  return pl.run_state(both)((plgpu.ACC.init(total), initial))


def opaque(value: int, target: mosaic.Target) -> Any:
  """`value`, unknown to the compiler.

  An index that it knows makes the addresses of a loop's operands constants,
  which it then computes before the loop: dozens of registers, all spilled.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if target.interprets:
    return value

  @plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct(
      (), jnp.int32, layout=plgpu.Layout.WG_SPLAT
    )
  )
  def hide(ctx):
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    del ctx
    hidden: Any = llvm.inline_asm(
      ir.IntegerType.get_signless(32),
      [],
      f'mov.u32 $0, {value};',
      '=r',
      has_side_effects=True,
    )
    return mgpu.FragmentedArray.splat(hidden, (), is_signed=True)

  return hide()
