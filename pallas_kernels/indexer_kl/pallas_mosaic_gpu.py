"""The indexer's loss and its gradients on Hopper GPUs.

Three kernels and little between them, a block of queries at a time
(`mosaic_sweep`): the head-summed target p (`mosaic_target`, or
`mosaic_target_heads` where every head has its own keys), the index scores I
(`mosaic_scores`) and, from g = row_weight * (softmax(I) - p), the gradients
(`mosaic_gradients`). A selection is gathered; without one the rows are a range,
and tiles outside of it are skipped.

The key gradient is summed by atomic additions in float32, in any order: equal
inputs give results that differ in the last bits.

Letters: B batch, T queries, S keys, J indexer heads, I indexer width, G key
heads of the main attention, H its heads, X its width, K selected keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.indexer_kl import config as config_lib
from pallas_kernels.indexer_kl import mosaic_sweep
from pallas_kernels.indexer_kl.mosaic_rows import TILE

_MAX_HEADS = 128


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
  config: config_lib.MosaicConfig | None = None,
  target: mosaic.Target = mosaic.Target.DEVICE,
) -> tuple[Float[Array, ''], Float[Array, 'B T']]:
  """Loss and divergence of each row; see `api`.

  Raises:
    NotImplementedError: for shapes, dtypes or devices out of reach.
  """
  mosaic.require(target)
  selected = indices_BTK is not None
  _check(q_index_BTJI, k_index_BSI, q_BTHX, k_BSGX, selected=selected)
  num_heads, width = q_BTHX.shape[2:]
  per_head = k_BSGX.shape[2] != 1
  if config is None:
    config = config_lib.mosaic_config(
      num_heads=mosaic_sweep.round_up(num_heads, 8),
      width=mosaic_sweep.round_up(width, TILE),
    )
  if (config.heads_stages if per_head else config.target.stages) < 1:
    raise NotImplementedError(
      f'H={num_heads} heads of X={width}: the Mosaic GPU kernels keep a query '
      'and a tile of 64 keys in shared memory, 2 * (H + 64) * X bytes of '
      '228000; with keys per head X is at most 384'
    )
  used_BT = row_weight_BT != 0
  if selected:
    valid = (jnp.where(used_BT[..., None], indices_BTK, -1),)
  else:
    assert key_start_BT is not None, 'api fills it'
    assert key_end_BT is not None, 'api fills it'
    num_keys = k_BSGX.shape[1]
    start_BT = jnp.clip(key_start_BT, 0, num_keys)
    end_BT = jnp.clip(key_end_BT, 0, num_keys)
    valid = (start_BT, jnp.where(used_BT, end_BT, start_BT))
  # A head without a normaliser has no mass: exp(score - inf) is 0.
  lse_BTH = jnp.where(lse_BTH == -jnp.inf, jnp.inf, lse_BTH)
  lse_BTH = lse_BTH.astype(jnp.float32)
  arrays = (q_index_BTJI, k_index_BSI, w_index_BTJ, q_BTHX, k_BSGX, lse_BTH)
  return _loss(
    arrays, row_weight_BT, valid, float(scale), config, target, head_axis
  )


def _check(
  q_index_BTJI: Array,
  k_index_BSI: Array,
  q_BTHX: Array,
  k_BSGX: Array,
  *,
  selected: bool,
) -> None:
  """Raises NotImplementedError for shapes and dtypes without kernels."""
  for name, x in (
    ('q_index_BTJI', q_index_BTJI),
    ('k_index_BSI', k_index_BSI),
    ('q_BTHX', q_BTHX),
    ('k_BSGX', k_BSGX),
  ):
    if x.dtype != jnp.bfloat16:
      raise NotImplementedError(
        f'{name}.dtype={x.dtype}: the Mosaic GPU kernels take bfloat16'
      )
  num_heads, key_heads = q_BTHX.shape[2], k_BSGX.shape[2]
  if key_heads != 1 and (selected or key_heads != num_heads):
    raise NotImplementedError(
      f'k_BSGX has G={key_heads} heads, q_BTHX H={num_heads}: the Mosaic GPU '
      'kernels take one key head or, without a selection, as many as H'
    )
  if key_heads == 1 and num_heads > _MAX_HEADS:
    raise NotImplementedError(
      f'H={num_heads}: the Mosaic GPU kernels take up to {_MAX_HEADS} heads'
    )
  index_heads, index_width = q_index_BTJI.shape[2:]
  most_heads, most_width = mosaic_sweep.INDEX_HEADS, mosaic_sweep.INDEX_WIDTH
  if index_heads > most_heads or index_width > most_width:
    raise NotImplementedError(
      f'q_index_BTJI.shape={q_index_BTJI.shape}: the Mosaic GPU kernels take '
      f'up to {most_heads} indexer heads of up to {most_width}'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _loss(arrays, row_weight_BT, valid, scale, config, target, head_axis):
  kl_BT, _ = mosaic_sweep.sweep(
    arrays, row_weight_BT, valid, scale, config, target, head_axis, False
  )
  return jnp.sum(row_weight_BT * kl_BT), kl_BT


def _loss_forward(
  arrays, row_weight_BT, valid, scale, config, target, head_axis
):
  kl_BT, gradients = mosaic_sweep.sweep(
    arrays, row_weight_BT, valid, scale, config, target, head_axis, True
  )
  gradients = tuple(
    checkpoint_name(g.astype(x.dtype), 'indexer_kl_grads')
    for g, x in zip(gradients, arrays[:3], strict=True)
  )
  return (jnp.sum(row_weight_BT * kl_BT), kl_BT), gradients


def _loss_backward(scale, config, target, head_axis, gradients, cotangents):
  del scale, config, target, head_axis
  d_loss = cotangents[0]
  gradients = tuple((d_loss * g).astype(g.dtype) for g in gradients)
  return (*gradients, None, None, None), None, None


_loss.defvjp(_loss_forward, _loss_backward)
