"""Float64 throughout: what differs then differs in meaning, not in rounding.

The library's float32 islands say `jnp.float32` when they are traced. Here that
name stands for float64, so that two programs for the same function, as those of
one device and of eight, agree to about 1e-13 wherever they sum in another
order.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import jaxtyping

from dsv32_jax.config import model as model_config
from dsv32_jax.config.model import Precision
from pallas_kernels.topk_selector import xla as topk


@contextlib.contextmanager
def double_precision() -> Iterator[Precision]:
  """Makes every float64; gives the `Precision` of a config for it.

  Configs, arrays and compiled functions of tests under it belong inside: trace
  nothing outside of what was made here.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(mock.patch.object(jnp, 'float32', jnp.float64))
    stack.enter_context(mock.patch.object(topk, '_ordered_int', _ranks))
    stack.enter_context(
      mock.patch.object(
        model_config, '_DTYPES', (*model_config._DTYPES, 'float64')
      )
    )
    # Signatures that promise float32.
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update('jaxtyping_disable', True)
    stack.callback(jaxtyping.config.update, 'jaxtyping_disable', checked)
    yield Precision(param='float64', compute='float64', logits='float64')


def _ranks(scores: jax.Array) -> jax.Array:
  """`topk._ordered_int`, which reads the bits of a float32: here, ranks."""

  def rank(row):
    row = jnp.where(jnp.isnan(row), -jnp.inf, row)
    return jnp.searchsorted(jnp.sort(row), row).astype(jnp.int32)

  flat = scores.reshape(-1, scores.shape[-1])
  ranks = jax.vmap(rank)(flat).reshape(scores.shape)
  lowest = jnp.iinfo(jnp.int32).min
  return jnp.where(scores > -jnp.inf, ranks, lowest)
