"""Parts of the indexer's loss that other packages have kernels for.

The target with scores, divergence and the gradient with respect to the scores,
the target alone, and the gradients of the indexer's inputs from those of the
scores. They call the kernels with what `indexer_kl` gives them.

Letters: B batch, T queries, S keys, J indexer heads, I indexer width, G key
heads, H heads, X width, K selected keys, r rows of a step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.benchmarks import costs, inputs
from pallas_kernels.benchmarks.costs import FORWARD
from pallas_kernels.benchmarks.indexer_kl_ops import arrays
from pallas_kernels.benchmarks.op import Op


def indexer_target_selected() -> Op:
  """Stage 2: target, scores, divergence, and the gradient of the scores."""

  def make(spec, dtype, seed):
    shape = (spec.batch, spec.num_queries)
    weight = jnp.full(shape, 1 / (shape[0] * shape[1]), jnp.float32)
    q_index, k_index, w_index, q, k = arrays(spec, dtype, seed)
    # Scores of unit size, as the model's constants in w make them.
    w_index *= (spec.index_heads * spec.index_dim) ** -0.5
    indices = inputs.random_indices(seed, spec)
    lse = inputs.log_sum_exp(spec, q, k, indices)
    return q_index, k_index, w_index, q, k[:, :, 0], lse, weight, indices

  return Op(
    name='indexer_target_selected',
    specs=_one_key_head(selected=True),
    implementations=tuple(_SELECTED),
    directions=(FORWARD,),
    cost=functools.partial(costs.indexer_target, is_selected=True),
    make=make,
    call=lambda implementation, spec, *x: _SELECTED[implementation](spec, *x),
    row_arguments=(0, 2, 3, 5, 6, 7),
    is_positional=False,
    rows=lambda spec: spec.num_queries,
    reference_bytes=_gathered_bytes,
    compared=None,
  )


def indexer_target_all() -> Op:
  """Stage 1: the target alone, over causal keys, which all heads share."""

  def make(spec, dtype, seed):
    q, k = arrays(spec, dtype, seed)[3:]
    return q, k[:, :, 0], inputs.log_sum_exp(spec, q, k, None)

  return Op(
    name='indexer_target_all',
    specs=_one_key_head(selected=False),
    implementations=tuple(_ALL),
    directions=(FORWARD,),
    cost=functools.partial(costs.indexer_target, is_selected=False),
    make=make,
    call=lambda implementation, spec, *x: _ALL[implementation](spec, *x),
    row_arguments=(0, 2),
    rows=lambda spec: spec.num_queries,
    reference_bytes=lambda spec: (
      4 * spec.batch * spec.num_heads * spec.num_keys
    ),
  )


def indexer_gradients() -> Op:
  """Gradients of the indexer's inputs from those of selected scores."""

  def make(spec, dtype, seed):
    q, k, w = arrays(spec, dtype, seed)[:3]
    indices = inputs.random_indices(seed, spec)
    (g,) = inputs.normal(seed + 1, jnp.float32, indices.shape)
    g = jnp.where(indices < 0, 0.0, g)
    return q, k, w.astype(jnp.float32), g, indices

  return Op(
    name='indexer_gradients',
    specs=_one_key_head(selected=True),
    implementations=tuple(_GRADIENTS),
    directions=(FORWARD,),
    cost=costs.indexer_gradients,
    make=make,
    call=lambda implementation, spec, *x: _GRADIENTS[implementation](spec, *x),
    row_arguments=(0, 2, 3, 4),
    is_positional=False,
    rows=lambda spec: spec.num_queries,
    # It goes through the rows by itself.
    reference_bytes=lambda spec: 1,
    compared=None,
  )


def _one_key_head(*, selected: bool) -> dict[str, Any]:
  specs = inputs.module('indexer_kl', 'arg_specs').BENCHMARK_SPECS
  return {
    name: spec
    for name, spec in specs.items()
    if spec.num_key_heads == 1 and (selected or not spec.sees_all_keys)
  }


def _gathered_bytes(spec: Any) -> int:
  widths = spec.num_heads + spec.index_heads + spec.width + spec.index_dim
  return 4 * spec.batch * spec.topk * widths


def _kernels(spec: Any):
  """The modules of the kernels, and their pipelines."""
  mosaic.require(mosaic.Target.DEVICE)
  if (spec.index_heads, spec.index_dim) != (64, 128) or spec.batch != 1:
    raise NotImplementedError(
      f'{spec.index_heads} indexer heads of {spec.index_dim}, batch '
      f'{spec.batch}: parts of the loss are measured on 64 heads of 128 and '
      'one sequence; the whole loss takes others'
    )
  names = ('mosaic_target', 'mosaic_scores', 'mosaic_gradients')
  config = inputs.module('indexer_kl', 'config').mosaic_config(
    num_heads=spec.num_heads, width=spec.width
  )
  return *(inputs.module('indexer_kl', name) for name in names), config


def _selected_mosaic(
  spec, q_index, k_index, w_index, q, k, lse, weight, indices
):
  target, scores, _, config = _kernels(spec)
  divergence = inputs.module('indexer_kl', 'mosaic_sweep').divergence
  device = mosaic.Target.DEVICE
  p_TK = target.target(
    q[0],
    k[0],
    lse[0],
    indices[0],
    None,
    None,
    scale=spec.scale,
    blocks=config.target,
    on=device,
    mean_over=spec.num_heads,
  )
  scores_TK = scores.scores(
    q_index[0],
    k_index[0],
    w_index[0].astype(jnp.float32),
    (indices[0],),
    num_columns=indices.shape[2],
    blocks=config.scores,
    on=device,
  )
  kl_T, g_TK = divergence(scores_TK, p_TK, indices[0] >= 0, weight[0])
  return g_TK[None], kl_T[None]


def _selected_reference(
  spec, q_index, k_index, w_index, q, k, lse, weight, indices
):
  b = jnp.arange(indices.shape[0])[:, None, None]
  is_valid = indices >= 0
  products = functools.partial(jnp.einsum, precision='highest')
  scores_BTHK = spec.scale * products('bthx,btkx->bthk', q, k[b, indices])
  p = jnp.mean(jnp.exp(scores_BTHK - lse[..., None]), axis=2)
  p = jnp.where(is_valid, p, 0.0)
  dots_BTJK = products('btji,btki->btjk', q_index, k_index[b, indices])
  index_scores = products('btj,btjk->btk', w_index, jax.nn.relu(dots_BTJK))
  log_q = jax.nn.log_softmax(index_scores, axis=-1, where=is_valid)
  log_q = jnp.where(is_valid, log_q, 0.0)
  kl_BT = jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, axis=-1)
  g = weight[..., None] * (jnp.where(is_valid, jnp.exp(log_q), 0.0) - p)
  return g, kl_BT


def _all_mosaic(spec, q, k, lse):
  target, _, _, config = _kernels(spec)
  end_T = jnp.arange(spec.num_queries, dtype=jnp.int32) + 1
  end_T += spec.num_keys - spec.num_queries
  p_TS = target.target(
    q[0],
    k[0],
    lse[0],
    None,
    jnp.zeros_like(end_T),
    end_T,
    scale=spec.scale,
    blocks=config.target,
    on=mosaic.Target.DEVICE,
    mean_over=spec.num_heads,
    num_columns=spec.num_keys,
  )
  return (p_TS[None],)


def _all_reference(spec, q, k, lse):
  scores = spec.scale * jnp.einsum('bthx,bsx->bths', q, k, precision='highest')
  p_BTS = jnp.mean(jnp.exp(scores - lse[..., None]), axis=2)
  is_seen_TS = jnp.tril(
    jnp.ones(p_BTS.shape[1:], bool), p_BTS.shape[2] - p_BTS.shape[1]
  )
  # Elements without a definition: not compared.
  return (jnp.where(is_seen_TS[None], p_BTS, jnp.nan),)


def _gradients_mosaic(spec, q, k, w, g, indices):
  _, _, gradients, config = _kernels(spec)
  dq_TJI, dw_TJ, dk_SI = gradients.gradients(
    q[0],
    k[0],
    w[0],
    g[0],
    indices[0],
    (),
    jnp.zeros(k.shape[1:], jnp.float32),
    blocks=config.gradients,
    on=mosaic.Target.DEVICE,
  )
  return dq_TJI[None], dk_SI[None], dw_TJ[None]


def _gradients_reference(spec, q, k, w, g, indices):
  """By automatic differentiation of gathered scores, some rows at a time."""
  queries = q.shape[1]
  limit = max(2**28 // (_gathered_bytes(spec) // spec.batch), 1)
  rows = next(n for n in range(min(limit, queries), 0, -1) if queries % n == 0)

  def scores(q_BrJI, k_BSI, w_BrJ, indices_BrK):
    b = jnp.arange(k.shape[0])[:, None, None]
    dots = jnp.einsum(
      'btji,btki->btjk', q_BrJI, k_BSI[b, indices_BrK], precision='highest'
    )
    return jnp.einsum(
      'btj,btjk->btk', w_BrJ, jax.nn.relu(dots), precision='highest'
    )

  def add(dk, block):
    q_BrJI, w_BrJ, g_BrK, indices_BrK = block
    _, pullback = jax.vjp(
      functools.partial(scores, indices_BrK=indices_BrK), q_BrJI, k, w_BrJ
    )
    dq_BrJI, more, dw_BrJ = pullback(g_BrK)
    return dk + more, (dq_BrJI, dw_BrJ)

  def blocks(x):
    return jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)

  dk, (dq, dw) = jax.lax.scan(
    add, jnp.zeros_like(k), tuple(blocks(x) for x in (q, w, g, indices))
  )
  dq, dw = (jnp.moveaxis(x, 0, 1) for x in (dq, dw))
  return dq.reshape(q.shape), dk, dw.reshape(w.shape)


_SELECTED = {'mosaic_gpu': _selected_mosaic, 'reference': _selected_reference}
_ALL = {'mosaic_gpu': _all_mosaic, 'reference': _all_reference}
_GRADIENTS = {
  'mosaic_gpu': _gradients_mosaic,
  'reference': _gradients_reference,
}
