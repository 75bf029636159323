"""The one table of tolerances, and the assertion that uses it.

The table starts from jax's own test tolerances (float32 1e-6, bfloat16 1e-2,
float8 1e-1; gradients float32 2e-3, bfloat16 1e-1). A figure is the largest
|actual - desired| / (rms(desired) + |desired|) that 99 % of the elements may
have; the last 1 % may reach four times that. Say here why, when a figure
changes.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import testing

VALUES = {
  'float32': 1e-6,
  'bfloat16': 1e-2,
  'float8_e4m3fn': 1e-1,
  'float8_e5m2': 1e-1,
}
GRADIENTS = {
  'float32': 2e-3,
  'bfloat16': 1e-1,
}
FRACTION = 0.99
OUTLIER_FACTOR = 4.0


def tolerance(dtype: Any, *, gradient: bool = False) -> dict[float, float]:
  """Fraction of elements -> largest scaled error, for `dtype`.

  Args:
    dtype: the lowest precision on the way (inputs or computation), e.g.
      bfloat16 when bfloat16 inputs give a float32 result.
    gradient: use the table for gradients.

  Raises:
    KeyError: the table has no such dtype.
  """
  limit = (GRADIENTS if gradient else VALUES)[jnp.dtype(dtype).name]
  return {FRACTION: limit, 1.0: OUTLIER_FACTOR * limit}


def assert_close(
  actual: Any,
  desired: Any,
  *,
  dtype: Any = np.float32,
  gradient: bool = False,
  label: str = '',
) -> testing.ErrorSummary:
  """Asserts closeness by fraction at the table's tolerance for `dtype`.

  Takes arrays or trees of arrays. Infinities and NaN must be equal on both
  sides. The message, and the summary returned, report max and mean error.
  """
  return testing.assert_close(
    actual,
    desired,
    tolerance=tolerance(dtype, gradient=gradient),
    label=label,
  )
