"""Is the indexer any good: what its selection keeps of dense attention.

Measured on the operands of a dense forward pass (`AttentionMode(trace=True)`):
the dense attention distribution p, summed over heads and L1-normalised
(arXiv:2512.02556, Eq. 3's target), and the index scores over the same keys.
Four selectors spend the same k: the indexer, the oracle (top-k of p), the
sliding window and a random draw.

Only rows with more than k valid keys count: shorter ones select everything.

Letters: B batch, T query tokens, S key tokens, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

import pallas_kernels
from dsv32_jax.config.model import AttentionMode
from dsv32_jax.functional import masking
from dsv32_jax.modules import selectors
from dsv32_jax.modules.dsa import AttentionTrace
from dsv32_jax.modules.rope import softmax_scale
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel, specs
from dsv32_jax.sharding.parallel import Parallel
from pallas_kernels import topk_selector

SELECTORS = ('indexer', 'oracle', 'window', 'random')
TRACED = AttentionMode(selector='all', trace=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionQuality:
  """Sums over rows, one entry a layer; divide by `rows` (see `means`).

  Attributes:
    rows: rows counted, those with more than k valid keys.
    sums: name -> float32 [L] sum over those rows of
      `mass/<selector>`: dense attention mass kept;
      `overlap`: share of the oracle's set that the indexer selects;
      `kl`: KL(p || softmax(I)) over all valid keys, nats;
      `tie`: 1 if the k-th best score also occurs outside the set;
      `zero_boundary`: 1 if the k-th best score is exactly 0;
      `zero_scores`: share of the valid keys whose score is exactly 0;
      `first_kept`, `self_kept`: 1 if the document's first token, or the query
      itself, is selected;
      `recent_kept`: share of the k/8 most recent tokens selected;
      `first_mass`, `recent_mass`: dense mass on the first token and on the
      k/8 most recent ones.
  """

  rows: Any
  sums: Any

  def __add__(self, other: 'SelectionQuality') -> 'SelectionQuality':
    return jax.tree.map(jnp.add, self, other)

  def means(self) -> dict[str, list[float]]:
    """Row averages as plain numbers, one a layer."""
    rows = max(float(self.rows), 1.0)
    return {
      name: [float(value) / rows for value in values]
      for name, values in self.sums.items()
    }


def selection_quality(
  model: DeepSeekV32,
  variables: dict,
  tokens_BT: Int[Array | np.ndarray, 'B T'],
  segment_ids_BT: Int[Array | np.ndarray, 'B T'],
  key: Array,
  *,
  k: int | None = None,
) -> SelectionQuality:
  """Runs the model densely and rates every layer's selection.

  Args:
    model: the model; its MTP block is left out.
    variables: its variables.
    tokens_BT: token ids.
    segment_ids_BT: documents, 0 for padding.
    key: seeds the random selector.
    k: selected tokens; None takes the model's index_topk.

  Returns:
    Sums over rows for each main layer.
  """
  rows = specs.padded_rows(
    {'tokens': np.asarray(tokens_BT), 'segment_ids': np.asarray(segment_ids_BT)}
  )
  return _selection_quality(
    variables,
    rows['tokens'],
    rows['segment_ids'],
    key,
    model=model,
    k=model.cfg.index_topk if k is None else k,
    layout=parallel.active(),
  )


# Static in the model: one compilation serves training runs and reports alike.
@functools.partial(jax.jit, static_argnames=('model', 'k', 'layout'))
def _selection_quality(
  variables: dict,
  tokens_BT: Array,
  segment_ids_BT: Array,
  key: Array,
  *,
  model: DeepSeekV32,
  k: int,
  layout: Parallel | None,
) -> SelectionQuality:
  del layout
  output = model.apply(
    variables,
    tokens_BT,
    segment_ids_BT=segment_ids_BT,
    attention=TRACED,
    compute_logits=False,
  )  # pyrefly: ignore
  start_BT, end_BT = masking.key_ranges(segment_ids_BT)
  counted_BT = (end_BT - start_BT > k).astype(jnp.float32)
  layers = [
    _layer_quality(
      trace,
      start_BT,
      end_BT,
      counted_BT,
      jax.random.fold_in(key, layer),
      k=k,
      scale=softmax_scale(model.cfg),
    )
    for layer, trace in enumerate(output.trace_L)
  ]
  quality = SelectionQuality(
    rows=jnp.sum(counted_BT),
    sums=jax.tree.map(lambda *values: jnp.stack(values), *layers),
  )
  return jax.tree.map(
    lambda x: parallel.constrain(x, *([None] * x.ndim)), quality
  )


def _layer_quality(
  trace: AttentionTrace,
  start_BT: Array,
  end_BT: Array,
  counted_BT: Array,
  key: Array,
  *,
  k: int,
  scale: float,
) -> dict[str, Array]:
  num_keys = trace.k_BSHX.shape[1]
  recent = max(k // 8, 1)
  query_BT = jnp.broadcast_to(
    jnp.arange(start_BT.shape[1])[None, :], start_BT.shape
  )

  def chunk(q_BtHX, qi, wi, start_Bt, end_Bt, query_Bt):
    p = selectors.head_mean_attention(
      q_BtHX, trace.k_BSHX, start_Bt, end_Bt, scale=scale
    )
    scores = pallas_kernels.lightning_indexer(
      qi, trace.k_index_BSI, wi, key_start_BT=start_Bt, key_end_BT=end_Bt
    )
    key_S = jnp.arange(num_keys)[None, None, :]
    valid = (key_S >= start_Bt[:, :, None]) & (key_S < end_Bt[:, :, None])
    draw = jax.random.uniform(jax.random.fold_in(key, query_Bt[0, 0]), p.shape)

    def best(values):
      return topk_selector.selection_mask(
        jnp.where(valid, values, -jnp.inf), k=k
      )

    keeps = {
      'indexer': topk_selector.selection_mask(scores, k=k),
      'oracle': best(p),
      'window': valid & (key_S >= (end_Bt - k)[:, :, None]),
      'random': best(draw),
    }
    rows = {
      f'mass/{name}': jnp.sum(jnp.where(keep, p, 0.0), -1)
      for name, keep in keeps.items()
    }
    mine = keeps['indexer']
    is_recent = valid & (key_S >= (end_Bt - recent)[:, :, None])
    is_first = key_S == start_Bt[:, :, None]
    is_self = key_S == (end_Bt - 1)[:, :, None]
    finite = jnp.where(valid, scores, -1e30)
    log_q = jax.nn.log_softmax(finite, axis=-1)
    kth = jnp.min(jnp.where(mine, scores, jnp.inf), axis=-1, keepdims=True)
    rows |= {
      'overlap': jnp.sum(mine & keeps['oracle'], -1) / k,
      'kl': jnp.sum(
        jax.scipy.special.xlogy(p, p) - jnp.where(valid, p * log_q, 0.0), -1
      ),
      'tie': jnp.any(valid & ~mine & (scores == kth), -1),
      'zero_boundary': kth[..., 0] == 0.0,
      'zero_scores': jnp.sum(valid & (scores == 0.0), -1)
      / jnp.maximum(jnp.sum(valid, -1), 1),
      'first_kept': jnp.any(mine & is_first, -1),
      'self_kept': jnp.any(mine & is_self, -1),
      'recent_kept': jnp.sum(mine & is_recent, -1) / recent,
      'first_mass': jnp.sum(jnp.where(is_first, p, 0.0), -1),
      'recent_mass': jnp.sum(jnp.where(is_recent, p, 0.0), -1),
    }
    return {name: row.astype(jnp.float32) for name, row in rows.items()}

  rows_BT = selectors.map_query_chunks(
    chunk,
    trace.q_BTHX,
    trace.q_index_BTJI,
    trace.w_index_BTJ,
    start_BT,
    end_BT,
    query_BT,
  )
  return jax.tree.map(
    lambda row_BT: jnp.sum(jnp.where(counted_BT > 0, row_BT, 0.0)), rows_BT
  )
