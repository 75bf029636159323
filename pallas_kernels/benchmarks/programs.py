"""Compiled programs of an op, which may be built before there are arguments.

So a table of many kernels can be compiled in threads, beside its rivals.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks.costs import BACKWARD, FORWARD
from pallas_kernels.benchmarks.op import Op, pull_back

# Of (arguments, cotangent): a function without arguments, to be timed. It
# returns the outputs of each of its calls.
Program = Callable[[tuple, Any], Callable[[], Sequence[Any]]]


def build(
  op: Op,
  implementation: str,
  spec: Any,
  direction: str,
  *,
  dtype: Any,
  calls: int = 1,
) -> Program:
  """Compiles an op for a shape.

  Args:
    op: what to compute.
    implementation: its name.
    spec: its shape.
    direction: 'forward', 'backward' (the pullback alone, whose residuals are
      arguments) or 'gradients'.
    dtype: of the arguments.
    calls: how often the program computes it, forward only: more than once
      where a call is shorter than its launch. The first argument is another
      each time, so that no call can be left out.

  Raises:
    NotImplementedError: the implementation doesn't run here.
  """
  arguments = jax.eval_shape(lambda: op.make(spec, dtype, 0))
  if direction == FORWARD:
    return _forward(op.forward(implementation, spec), arguments, calls)
  if calls != 1:
    raise ValueError(f'calls={calls} of direction {direction!r}: must be 1')

  cotangent = jax.eval_shape(lambda *x: op.cotangent(spec, x, 0), *arguments)
  if direction != BACKWARD:
    function = jax.jit(op.gradients(implementation, spec))
    run = function.lower(*arguments, cotangent).compile()
    return lambda arguments, cotangent: lambda: [run(*arguments, cotangent)[1]]

  traced = jax.jit(op.with_pullback(implementation, spec)).trace(*arguments)
  out, pullback = traced.out_info
  forward = traced.lower().compile()
  # Of the type that this implementation's output has.
  cotangent = jax.ShapeDtypeStruct(cotangent.shape, out.dtype)
  backward = jax.jit(pull_back).lower(pullback, cotangent).compile()

  def program(arguments, cotangent):
    out, pullback = forward(*arguments)
    cotangent = cotangent.astype(out.dtype)
    del out
    return lambda: [backward(pullback, cotangent)]

  return program


def _forward(
  function: Callable[..., Any], arguments: tuple, calls: int
) -> Program:
  # Jitted by itself, a kernel is lowered once, however often it is called.
  function = jax.jit(function)

  @jax.jit
  def several(firsts, *others):
    return [function(first, *others) for first in firsts]

  first, *others = arguments
  run = several.lower([first] * calls, *others).compile()

  def program(arguments, _):
    first, *others = arguments
    firsts = [jnp.roll(first, i, axis=-1) for i in range(calls)]
    return lambda: run(firsts, *others)

  return program
