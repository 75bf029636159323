"""The indexer's loss in plain XLA: loss and gradients in one sweep.

The gradient with respect to the index scores has a closed form,
dI = row_weight * (softmax(I) - p) on the valid keys, which needs nothing from
the backward pass but a scalar. So the forward rule computes the gradients as
it goes, and the backward rule multiplies. `xla_blocked` walks key blocks (all
preceding keys, or a selection as a mask), `xla_gather` reads selected rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels.indexer_kl import config as config_lib
from pallas_kernels.indexer_kl import xla_blocked, xla_gather
from pallas_kernels.sparse_mla_attention import config as attention_config


def indexer_kl(
  q_index_BTJI: Float[Array, 'B T J I'],
  k_index_BSI: Float[Array, 'B S I'],
  w_index_BTJ: Float[Array, 'B T J'],
  q_BTHX: Float[Array, 'B T H X'],
  k_BSGX: Float[Array, 'B S G X'],
  lse_BTH: Float[Array, 'B T H'],
  row_weight_BT: Float[Array, 'B T'],
  *,
  scale: int | float,
  indices_BTK: Int[Array, 'B T K'] | None = None,
  key_start_BT: Int[Array, 'B T'] | None = None,
  key_end_BT: Int[Array, 'B T'] | None = None,
  head_axis: str | tuple[str, ...] | None = None,
  config: attention_config.XlaConfig | None = None,
) -> tuple[Float[Array, ''], Float[Array, 'B T']]:
  """Loss and divergence of each row; see `api`."""
  if config is None:
    config = config_lib.xla_config(
      batch=q_BTHX.shape[0],
      num_queries=q_BTHX.shape[1],
      num_keys=k_BSGX.shape[1],
      num_heads=max(q_BTHX.shape[2], q_index_BTJI.shape[2]),
      width=k_BSGX.shape[2] * k_BSGX.shape[3] + k_index_BSI.shape[2],
      topk=None if indices_BTK is None else indices_BTK.shape[2],
    )
  # Rows of weight 0 are rows without keys: nothing is computed from them.
  row_weight_BT = row_weight_BT.astype(jnp.float32)
  used_BT = row_weight_BT != 0
  if indices_BTK is None:
    assert key_start_BT is not None, 'api fills it'
    assert key_end_BT is not None, 'api fills it'
    valid = (key_start_BT, jnp.where(used_BT, key_end_BT, key_start_BT))
  else:
    valid = (jnp.where(used_BT[..., None], indices_BTK, -1),)
  # A head without a normaliser has no mass: exp(score - inf) is 0.
  lse_BTH = jnp.where(lse_BTH == -jnp.inf, jnp.inf, lse_BTH)
  arrays = (q_index_BTJI, k_index_BSI, w_index_BTJ, q_BTHX, k_BSGX, lse_BTH)
  return _loss(arrays, row_weight_BT, valid, float(scale), config, head_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _loss(arrays, row_weight_BT, valid, scale, config, head_axis):
  kl_BT, _ = _sweep(
    arrays, row_weight_BT, valid, scale, config, head_axis, False
  )
  return jnp.sum(row_weight_BT * kl_BT), kl_BT


def _loss_forward(arrays, row_weight_BT, valid, scale, config, head_axis):
  kl_BT, gradients = _sweep(
    arrays, row_weight_BT, valid, scale, config, head_axis, True
  )
  gradients = tuple(
    checkpoint_name(g.astype(x.dtype), 'indexer_kl_grads')
    for g, x in zip(gradients, arrays[:3], strict=True)
  )
  return (jnp.sum(row_weight_BT * kl_BT), kl_BT), gradients


def _loss_backward(scale, config, head_axis, gradients, cotangents):
  del scale, config, head_axis
  d_loss = cotangents[0]
  gradients = tuple((d_loss * g).astype(g.dtype) for g in gradients)
  return (*gradients, None, None, None), None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _sweep(
  arrays, row_weight_BT, valid, scale, config, head_axis, with_gradients
):
  sweep = xla_gather.sweep if config.form == 'gather' else xla_blocked.sweep
  q_index_BTJI, k_index_BSI, w_index_BTJ, q_BTHX, k_BSGX, lse_BTH = arrays
  return sweep(
    q_index_BTJI,
    k_index_BSI,
    w_index_BTJ,
    q_BTHX,
    k_BSGX,
    lse_BTH,
    row_weight_BT,
    valid,
    scale=scale,
    config=config,
    head_axis=head_axis,
    with_gradients=with_gradients,
  )
