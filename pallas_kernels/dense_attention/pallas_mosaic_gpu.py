"""Dense attention over ranges of keys on Hopper GPUs, with its gradients.

Letters: B batch, T query tokens, S key tokens, H heads, X query and key width,
U value width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.dense_attention import (
  config,
  mosaic_dkv,
  mosaic_dq,
  mosaic_forward,
  mosaic_tiles,
)

_TILE = 2 * mosaic_tiles.ROWS

DEVICE_WIDTHS = ((192, 128), (128, 128), (64, 64))
"""(X, U) that have been compared with the oracle on a GPU."""


def dense_attention(
  q_BTHX: Float[Array, 'B T H X'],
  k_BSHX: Float[Array, 'B S H X'],
  v_BSHU: Float[Array, 'B S H U'],
  key_start_BT: Int[Array, 'B T'],
  key_end_BT: Int[Array, 'B T'],
  *,
  scale: float,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> tuple[Float[Array, 'B T H U'], Float[Array, 'B T H']]:
  """Softmax attention over a range of keys a query, and its log-sum-exp.

  Differentiable in q, k and v, with sums in an order that doesn't change
  between runs. The residuals are named 'attention_out' and 'attention_lse' for
  `jax.checkpoint` policies.

  Args:
    q_BTHX: bfloat16 queries.
    k_BSHX: bfloat16 keys.
    v_BSHU: bfloat16 values.
    key_start_BT: int32 first valid key of each query.
    key_end_BT: int32, one past the last.
    scale: factor of the scores.
    target: where the kernels run.

  Returns:
    out_BTHU in bfloat16, 0 in a row with no valid key; lse_BTH in float32,
    natural, -inf in such a row, without gradient.

  Raises:
    NotImplementedError: another type than bfloat16, widths X and U that are
      not among `DEVICE_WIDTHS`, or no Hopper GPU.
  """
  check(q_BTHX, k_BSHX, v_BSHU, target)
  num_queries, num_keys = q_BTHX.shape[1], k_BSHX.shape[1]
  q_BTHX = _pad(q_BTHX)
  k_BSHX, v_BSHU = _pad(k_BSHX), _pad(v_BSHU)
  # Padding queries have the empty range; padding keys lie past every range.
  start_BT = _pad(key_start_BT.astype(jnp.int32))
  end_BT = _pad(jnp.minimum(key_end_BT, num_keys).astype(jnp.int32))
  out_BTHU, lse_BHT = _attention(
    q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, float(scale), target
  )
  lse_BTH = jnp.swapaxes(jax.lax.stop_gradient(lse_BHT), 1, 2)
  return out_BTHU[:, :num_queries], lse_BTH[:, :num_queries]


def check(
  q_BTHX: Array, k_BSHX: Array, v_BSHU: Array, target: mosaic.Target
) -> None:
  """Returns if the kernels take these; NotImplementedError says why not."""
  if not q_BTHX.dtype == k_BSHX.dtype == v_BSHU.dtype == jnp.bfloat16:
    raise NotImplementedError(
      'dense_attention on Mosaic GPU takes bfloat16, got '
      f'{q_BTHX.dtype}, {k_BSHX.dtype} and {v_BSHU.dtype}'
    )
  widths = q_BTHX.shape[3], v_BSHU.shape[3]
  if target is mosaic.Target.DEVICE and widths not in DEVICE_WIDTHS:
    raise NotImplementedError(
      f'dense_attention on Mosaic GPU takes (X, U) in {DEVICE_WIDTHS}, got '
      f'{widths}'
    )
  mosaic.require(target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, scale, target):
  return mosaic_forward.forward(
    q_BTHX,
    k_BSHX,
    v_BSHU,
    start_BT,
    end_BT,
    scale=scale,
    block=config.ForwardConfig(),
    target=target,
  )


def _forward(q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, scale, target):
  out_BTHU, lse_BHT = _attention(
    q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, scale, target
  )
  out_BTHU = checkpoint_name(out_BTHU, 'attention_out')
  lse_BHT = checkpoint_name(lse_BHT, 'attention_lse')
  residuals = (q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, out_BTHU, lse_BHT)
  return (out_BTHU, lse_BHT), residuals


def _backward(scale, target, residuals, cotangents):
  q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, out_BTHU, lse_BHT = residuals
  d_out_BTHU = cotangents[0].astype(q_BTHX.dtype)
  delta_BHT = jnp.einsum(
    'bthu,bthu->bht',
    out_BTHU.astype(jnp.float32),
    d_out_BTHU.astype(jnp.float32),
  )
  # Rows without keys are masked; any finite stand-in does.
  lse_BHT = jnp.where(lse_BHT == -jnp.inf, 0.0, lse_BHT)
  arguments = (
    q_BTHX,
    k_BSHX,
    v_BSHU,
    d_out_BTHU,
    lse_BHT * mosaic_tiles.LOG2_E,
    delta_BHT,
    start_BT,
    end_BT,
  )
  options = {'scale': scale, 'target': target}
  d_q_BTHX = mosaic_dq.query_gradient(
    *arguments, block=config.BackwardConfig(), **options
  )
  d_k_BSHX, d_v_BSHU = mosaic_dkv.key_gradients(
    *arguments, block=config.BackwardConfig(), **options
  )
  return d_q_BTHX, d_k_BSHX, d_v_BSHU, None, None


_attention.defvjp(_forward, _backward)


def _pad(x: Array) -> Array:
  """Zeros up to a multiple of the tile along axis 1."""
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, -x.shape[1] % _TILE)
  return jnp.pad(x, widths)
