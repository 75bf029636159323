"""What the Mosaic GPU kernels share: where they run, and jax's moving API.

Mosaic GPU says of itself that it may change weekly. This is the only module
that knows which jax has it in the form used here (0.11), so that a port to the
next release starts, and mostly ends, in this file.

A kernel is built for a `Target`. On a Hopper GPU it runs; on a CPU jax can
interpret it, barriers and asynchronous copies included; and on any machine it
can be lowered for CUDA, which finds errors of shapes, layouts and shared
memory. The interpreter cannot run inline PTX: a kernel that needs it has a
plain Pallas body for that step, chosen by `Target.interprets`.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any

import jax

SHARED_MEMORY_BYTES = 232_448
"""What a block may use on a Hopper GPU."""


class Target(enum.Enum):
  """What a kernel is built for.

  Attributes:
    DEVICE: to run on this process's Hopper GPU.
    INTERPRET: to run on a CPU, step by step.
    INTERPRET_RACES: likewise, and fail at accesses that nothing orders.
    LOWER: only to be lowered for CUDA, on any machine.
  """

  DEVICE = 'device'
  INTERPRET = 'interpret'
  INTERPRET_RACES = 'interpret_races'
  LOWER = 'lower'

  @property
  def interprets(self) -> bool:
    """Whether inline PTX is out of reach."""
    return self in (Target.INTERPRET, Target.INTERPRET_RACES)


def require(target: Target) -> None:
  """Returns if kernels can be built for `target` here.

  Raises:
    NotImplementedError: with the reason why not.
  """
  if not has_api():
    raise NotImplementedError(
      'Mosaic GPU kernels need jax 0.11 or later; this is jax '
      f'{jax.__version__}'
    )
  if target is Target.DEVICE:
    _require_hopper()


@functools.cache
def has_api() -> bool:
  """Whether this jax has the Mosaic GPU API of 0.11."""
  try:
    from jax.experimental.pallas import mosaic_gpu
  except ImportError:
    return False
  return hasattr(mosaic_gpu, 'InterpretGPUParams')


@functools.cache
def _require_hopper() -> None:
  if jax.default_backend() != 'gpu':
    raise NotImplementedError(
      'Mosaic GPU kernels run on Hopper GPUs; the default backend is '
      f'{jax.default_backend()!r}'
    )
  capability = getattr(jax.devices()[0], 'compute_capability', 'unknown')
  if capability != '9.0':
    raise NotImplementedError(
      'Mosaic GPU kernels run on GPUs of compute capability 9.0 (Hopper); '
      f'this is {jax.devices()[0].device_kind}, {capability}'
    )


@functools.cache
def num_multiprocessors(target: Target) -> int:
  """Blocks that run at once, one each; few where every block is interpreted."""
  if target.interprets:
    return 2
  if target is Target.LOWER:
    return 132
  return jax.devices()[0].core_count


def kernel(
  body: Callable[..., None],
  *,
  target: Target,
  compiler_params: Any = None,
  **arguments: Any,
) -> Callable[..., Any]:
  """`plgpu.kernel` for a target.

  Args:
    body: gets the refs of inputs, outputs and scratch.
    target: where it is to run.
    compiler_params: `plgpu.CompilerParams`; by default Lane semantics with
      approximate mathematics and no barriers but the body's own.
    **arguments: as `plgpu.kernel` takes them.

  Returns:
    A function of the inputs.

  Raises:
    NotImplementedError: the target is out of reach here.
  """
  require(target)
  from jax.experimental.pallas import mosaic_gpu as plgpu

  if compiler_params is None:
    compiler_params = plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
  if target.interprets:
    arguments['interpret'] = plgpu.InterpretGPUParams(
      detect_races=target is Target.INTERPRET_RACES
    )
  call = plgpu.kernel(body, compiler_params=compiler_params, **arguments)
  return lambda *operands: _differing_as(operands, call(*operands))


def _differing_as(operands: Any, outputs: Any) -> Any:
  """`outputs`, differing by type along the mesh axes that an operand does.

  Under `jax.shard_map(check_vma=True)` jax would take them to be the same on
  every device, and leave out sums over devices: wrong gradients, silently.
  """

  def axes(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying

  differing = frozenset().union(*map(axes, operands))
  return jax.tree.map(
    lambda x: jax.lax.pcast(
      x, tuple(sorted(differing - axes(x))), to='varying'
    ),
    outputs,
  )


def in_place(call: Callable[..., Any]) -> Callable[..., Any]:
  """A kernel that changes its last operand, as a function without effects.

  jax's autodiff takes programs apart: what it knows early, or computes again
  in the backward pass (`jax.checkpoint`). It does that to each operation on a
  reference by itself, and so freezes references that no kernel has added to.
  A function with a batching rule of its own stays in one piece.

  Args:
    call: of arrays and, last, a reference.

  Returns:
    A function of the arrays and the reference's first value, that returns what
    `call` returns and the reference's last value. Without gradients and
    without `jax.vmap`.
  """

  @jax.custom_batching.custom_vmap
  def function(*operands):
    ref = jax.new_ref(operands[-1])
    outputs = call(*operands[:-1], ref)
    return outputs, jax.freeze(ref)

  @function.def_vmap
  def _(axis_size, in_batched, *operands):
    del axis_size, in_batched, operands
    raise NotImplementedError(
      'Mosaic GPU kernels that add to an operand have no jax.vmap; give them '
      'the batch as their leading dimension'
    )

  return function


def i32(value: int) -> Any:
  """An int32 constant of inline code."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  return arith.constant(ir.IntegerType.get_signless(32), value)


def i64(value: int) -> Any:
  """An int64 constant of inline code."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import arith

  return arith.constant(ir.IntegerType.get_signless(64), value)


def asm(text: str, *operands: Any) -> None:
  """Emits PTX that returns nothing; `$0`, `$1`... are the operands."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import llvm

  letters = {'i64': 'l', 'i32': 'r', 'f32': 'f', 'i16': 'h'}
  constraints = ','.join(letters[str(x.type)] for x in operands)
  llvm.inline_asm(
    ir.Type.parse('!llvm.void'),
    list(operands),
    text,
    constraints,
    has_side_effects=True,
  )
