"""The written proof that a dense warm-up was one.

Four things have to hold (arXiv:2512.02556, section 2.1.1; each of them failed
silently in some public code base): the forward pass was dense, the KL covered
every preceding token, nothing but the indexers moved, and the indexers did.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import pallas_kernels
from dsv32_jax.config.model import AttentionMode
from dsv32_jax.functional import masking
from dsv32_jax.modules import selectors
from dsv32_jax.modules.rope import softmax_scale
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import optimizer

# KL is a difference of float32 sums of a few nats; leaving out one key in a
# thousand shows far above this.
_KL_TOLERANCE = {'rtol': 1e-3, 'atol': 1e-5}


def warmup_proof(
  model: DeepSeekV32,
  before: Any,
  after: Any,
  lines: Sequence[Mapping[str, Any]],
  rows: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Compares the variables around a dense warm-up bit by bit.

  Args:
    model: the architecture.
    before: variables at its start.
    after: variables at its end.
    lines: its metrics, one a step.
    rows: one training batch, to take the KL of full rows anew.

  Returns:
    JSON-able: four statements that must be true (`dense_forward`,
    `full_row_kl`, `others_bit_identical`, `indexers_moved`) with the numbers
    that they follow from.
  """
  moved, frozen, changed = {}, [], []
  old_leaves = jax.tree_util.tree_leaves_with_path(before)
  new_leaves = jax.tree_util.tree_leaves_with_path(after)
  digest = hashlib.sha256()
  for (path, old), (_, new) in zip(old_leaves, new_leaves, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    old, new = np.asarray(old), np.asarray(new)
    if optimizer.group_of(path) == 'indexer':
      moved[name] = float(np.max(np.abs(new - old)))
    else:
      frozen.append(name)
      digest.update(new.tobytes())
      if old.tobytes() != new.tobytes():
        changed.append(name)
  realised = [value for line in lines for value in line['sparsity/realised']]
  trained_L, direct_L = full_row_kl(model, after, rows)
  return {
    'dense_forward': max(map(abs, realised)) == 0.0,
    'largest_share_of_pairs_left_out': max(map(abs, realised)),
    'full_row_kl': bool(np.allclose(trained_L, direct_L, **_KL_TOLERANCE)),
    'kl_of_the_training_loss': trained_L.tolist(),
    'kl_over_every_preceding_token': direct_L.tolist(),
    'others_bit_identical': not changed,
    'arrays_compared': len(frozen),
    'arrays_changed': changed,
    'sha256_of_the_others': digest.hexdigest(),
    'indexers_moved': min(moved.values()) > 0.0,
    'largest_change_of_each_indexer_array': moved,
    'steps': len(lines),
  }


def full_row_kl(
  model: DeepSeekV32, variables: Any, rows: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """The training loss's KL beside one written out over whole rows.

  Args:
    model: the architecture.
    variables: its variables.
    rows: a batch; its first row is used.

  Returns:
    Float64 [L] each, main layers: what the loss computes, and
    sum_s p log(p / softmax(I)) over every preceding token, from the dense
    attention and the scores of the same forward pass.
  """
  tokens_BT = jnp.asarray(rows['tokens'][:1])
  segments_BT = jnp.asarray(rows['segment_ids'][:1])
  output = model.apply(
    variables,
    tokens_BT,
    segment_ids_BT=segments_BT,
    attention=AttentionMode(selector='all', indexer_kl='all', trace=True),
    compute_logits=False,
  )  # pyrefly: ignore
  start_BT, end_BT = masking.key_ranges(segments_BT)
  scale = softmax_scale(model.cfg)

  def kl(operands: Any, start: Array, end: Array) -> Array:
    q, k, q_index, k_index, w_index = operands
    p = selectors.head_mean_attention(q, k, start, end, scale=scale)
    scores = pallas_kernels.lightning_indexer(
      q_index,
      k_index,
      w_index,
      key_start_BT=start,
      key_end_BT=end,
      implementation='reference',
    )
    log_q = jax.nn.log_softmax(
      jnp.where(jnp.isfinite(scores), scores, -1e30), axis=-1
    )
    return jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, axis=-1)

  valid_BT = np.asarray(end_BT > start_BT)
  direct = []
  for trace in output.trace_L:
    operands = (
      trace.q_BTHX,
      trace.k_BSHX,
      trace.q_index_BTJI,
      trace.k_index_BSI,
      trace.w_index_BTJ,
    )
    kl_BT = np.asarray(kl(operands, start_BT, end_BT), np.float64)
    direct.append(kl_BT[valid_BT].mean())
  layers = len(direct)
  return np.asarray(output.indexer_kl_L, np.float64)[:layers], np.array(direct)


def require(found: Mapping[str, Any]) -> None:
  """Refuses a warm-up whose proof fails.

  Raises:
    RuntimeError: naming the statement that is false.
  """
  for name in (
    'dense_forward',
    'full_row_kl',
    'others_bit_identical',
    'indexers_moved',
  ):
    if not found[name]:
      raise RuntimeError(
        f'dense warm-up: {name} is false, so this was no dense warm-up; see '
        'proof.json'
      )
