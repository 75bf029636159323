"""What the benchmark knows of an op: shapes, arguments, functions to time."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks import costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
  """One op of the benchmark.

  Attributes:
    name: as the table shows it.
    specs: named shapes.
    implementations: names, best first.
    directions: 'forward'; with gradients 'gradients' (forward and backward
      together), and 'backward' where the forward pass leaves work to it.
    cost: (spec, direction, bytes an element) -> `costs.Cost`.
    make: (spec, dtype, seed) -> arguments.
    call: (implementation, spec, *arguments) -> outputs.
    differentiable: positions of the arguments with gradients, which are of
      the first output.
    row_arguments: positions of the arguments with an entry a query (axis 1).
    is_positional: what a query sees depends on which one it is; otherwise any
      queries can be had by themselves.
    sample: (spec, arguments, rows) -> arguments of the last (first) rows; by
      default the `row_arguments`' last.
    sample_gradients: (arguments, cotangent, gradients) -> the same of a part
      whose gradients depend on nothing else.
    rows: how many rows of outputs the spec has.
    reference_bytes: of the definition, a row.
    takes_last: whether `sample` takes the last rows.
    row_axis: axis of the outputs that holds the rows.
    is_selection: outputs are sets of indices.
    compared: which output the error is of; None for all.
  """

  name: str
  specs: Mapping[str, Any]
  implementations: Sequence[str]
  directions: Sequence[str]
  cost: Callable[[Any, str, int], costs.Cost]
  make: Callable[[Any, Any, int], tuple]
  call: Callable[..., Any]
  differentiable: Sequence[int] = ()
  row_arguments: Sequence[int] = ()
  is_positional: bool = True
  sample: Callable[[Any, tuple, int], tuple] | None = None
  sample_gradients: Callable[[tuple, Any, tuple], tuple] | None = None
  rows: Callable[[Any], int]
  reference_bytes: Callable[[Any], int]
  takes_last: bool = True
  row_axis: int = 1
  is_selection: bool = False
  compared: int | None = 0

  def last_rows(self, spec: Any, arguments: tuple, rows: int) -> tuple:
    """Arguments of some rows, for which the definition fits."""
    if self.sample is not None:
      return self.sample(spec, arguments, rows)
    return tuple(
      x[:, -rows:] if i in self.row_arguments else x
      for i, x in enumerate(arguments)
    )

  def forward(self, implementation: str, spec: Any) -> Callable[..., Any]:
    """The function of the arguments."""
    return functools.partial(self.call, implementation, spec)

  def with_pullback(self, implementation: str, spec: Any):
    """The function of the arguments that returns (first output, pullback).

    The pullback is a pytree, so both may leave a jitted function; its leaves
    are what the backward pass keeps of the forward pass.
    """
    forward = self.forward(implementation, spec)

    def both(*arguments):
      def of(*some):
        whole = list(arguments)
        for i, x in zip(self.differentiable, some, strict=True):
          whole[i] = x
        return jax.tree.leaves(forward(*whole))[0]

      return jax.vjp(of, *(arguments[i] for i in self.differentiable))

    return both

  def gradients(self, implementation: str, spec: Any):
    """The function of (arguments..., cotangent): first output, gradients.

    The output is returned so that the compiler doesn't leave it out.
    """
    both = self.with_pullback(implementation, spec)

    def gradients(*arguments_and_cotangent):
      *arguments, cotangent = arguments_and_cotangent
      out, pullback = both(*arguments)
      return out, pullback(cotangent.astype(out.dtype))

    return gradients

  def cotangent(self, spec: Any, arguments: tuple, seed: int) -> jax.Array:
    """Random, of the shape and type of the first output."""
    outputs = jax.eval_shape(self.forward('reference', spec), *arguments)
    out = jax.tree.leaves(outputs)[0]
    key = jax.random.key(seed + 1)
    if not out.ndim:  # A loss.
      return jnp.ones((), out.dtype)
    return jax.random.normal(key, out.shape, out.dtype)


def pull_back(pullback: Callable[..., Any], cotangent: jax.Array) -> Any:
  """The backward pass alone, of what `Op.with_pullback` returned."""
  return pullback(cotangent)
