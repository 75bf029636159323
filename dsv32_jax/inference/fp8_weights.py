"""Weights of an FP8 checkpoint, made ready for products in FP8.

`checkpoints.load_hf(..., quantized='keep')` gives matrices of float8 values and
scales. Without more they are multiplied out at every use. Prepared, they are
multiplied with as they are: on a Hopper GPU by its FP8 tensor cores, elsewhere
with the same numbers (`functional.fp8_matmul`; spec section 3.6). Activations
are rounded to FP8 on the way, so results differ from those of dequantised
weights by what that costs.
"""

from typing import Any

import jax

from dsv32_jax.functional import fp8_matmul, quantization
from dsv32_jax.functional.quantization import QuantizedArray
from dsv32_jax.sharding import parallel

# Dims of each matrix that its product sums over.
_SUMMED = {
  'w_dq': 1,
  'w_dkv': 1,
  'w_kr': 1,
  'w_uq': 1,
  'w_qr': 1,
  'w_o': 2,
  'w_iq': 1,
  'w_ik': 1,
  'w_gate': 1,
  'w_up': 1,
  'w_down': 1,
}
# Absorbed mode multiplies with these across heads, and not along their blocks;
# they are small.
_DEQUANTIZED = ('w_uk', 'w_uv')
_EXPERTS = 'experts'


def prepare_fp8(variables: dict, *, dtype: Any) -> dict:
  """Returns the variables with products in FP8 where they can be.

  The routed experts stay float8 with scales and are multiplied out at use, a
  layer at a time: there is no grouped product in FP8 here.

  Example:
    >>> model, variables = checkpoints.load_hf(path, quantized='keep')
    >>> model, variables = inference.unroll(model, variables)
    >>> variables = inference.prepare_fp8(
    ...   variables, dtype=model.cfg.precision.compute
    ... )

  Args:
    variables: of an unrolled model.
    dtype: for what is not multiplied in FP8.

  Raises:
    ValueError: no matrix is quantised, layers are stacked, or a layout is
      active.
  """
  if parallel.active() is not None:
    raise ValueError(
      'prepare_fp8: got an active layout, expected one device: these products '
      'are not cut over a mesh'
    )
  count = 0

  def prepare(path: tuple, leaf: Any) -> Any:
    nonlocal count
    if not isinstance(leaf, QuantizedArray):
      return leaf
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if 'layers' in names:
      raise ValueError(
        f'{"/".join(names)}: got stacked layers, expected those of '
        'inference.unroll'
      )
    if _EXPERTS in names:
      return leaf
    if names[-1] in _DEQUANTIZED:
      return quantization.dequantize(leaf).astype(dtype)
    count += 1
    return fp8_matmul.prepare(leaf, contract_dims=_SUMMED[names[-1]])

  prepared = jax.tree_util.tree_map_with_path(
    prepare, variables, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray)
  )
  if not count:
    raise ValueError(
      'prepare_fp8: got no float8 matrix, expected variables of load_hf(..., '
      "quantized='keep')"
    )
  return prepared
