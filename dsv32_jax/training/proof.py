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
from dsv32_jax.modules.dsa import AttentionTrace
from dsv32_jax.modules.rope import softmax_scale
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import axes, process_rows
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.training import compiled_step, optimizer

# KL is a difference of float32 sums of a few nats; leaving out one key in a
# thousand shows far above this.
_KL_TOLERANCE = {'rtol': 1e-3, 'atol': 1e-5}
# Of a row: operands of all layers and heads are held at once.
_KL_TOKENS = 1024


def warmup_proof(
  model: DeepSeekV32,
  before: Any,
  after: Any,
  lines: Sequence[Mapping[str, Any]],
  rows: Mapping[str, np.ndarray],
  *,
  parallel: Parallel | None = None,
) -> dict[str, Any]:
  """Compares the variables around a dense warm-up bit by bit.

  Arrays are compared where they lie, part by part; none is gathered.

  Args:
    model: the architecture.
    before: variables at its start.
    after: variables at its end.
    lines: its metrics, one a step.
    rows: one training batch, to take the KL of full rows anew.
    parallel: layout of the variables.

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
    if optimizer.group_of(path) == 'indexer':
      moved[name] = float(_largest_change(old, new))
    else:
      frozen.append(name)
      is_equal, fingerprint = _compare_bits(old, new)
      digest.update(f'{name} {np.asarray(fingerprint).tolist()}'.encode())
      if not is_equal:
        changed.append(name)
  realised = [value for line in lines for value in line['sparsity/realised']]
  with parallel_lib.use(parallel):
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
    'fingerprint_of_the_others': digest.hexdigest(),
    'indexers_moved': min(moved.values()) > 0.0,
    'largest_change_of_each_indexer_array': moved,
    'steps': len(lines),
  }


@jax.jit
def _largest_change(old: Array, new: Array) -> Array:
  return jnp.max(jnp.abs(new - old))


@jax.jit
def _compare_bits(old: Array, new: Array) -> tuple[Array, Array]:
  """Whether all bits agree, and a fingerprint of `new` in any layout.

  The fingerprint is the sum, modulo 2^32, of every word mixed with its place:
  sums of parts add up, so no device needs to see another one's part.
  """
  old, new = (_words(x) for x in (old, new))
  place = jnp.zeros(new.shape, jnp.uint32)
  for axis, size in enumerate(new.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, new.shape, axis
    )
  mixed = _mix(new ^ _mix(place + jnp.uint32(1)))
  return jnp.all(old == new), jnp.sum(mixed, dtype=jnp.uint32)


def _words(x: Array) -> Array:
  """The bits of an array as uint32, several words of a long type in an axis."""
  if x.dtype.itemsize < 4:
    unsigned = {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _mix(x: Array) -> Array:
  """A bijection of uint32 that spreads every bit (MurmurHash3's finaliser)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def full_row_kl(
  model: DeepSeekV32, variables: Any, rows: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """The training loss's KL beside one written out over whole rows.

  Args:
    model: the architecture.
    variables: its variables.
    rows: a batch; its first row is used (one a device that shares rows), the
      first tokens of it if it is long.

  Returns:
    Float64 [L] each, main layers: what the loss computes, and
    sum_s p log(p / softmax(I)) over every preceding token, from the dense
    attention and the scores of the same forward pass.
  """
  layout = parallel_lib.active()
  count = 1
  if layout is not None:
    _, count = process_rows.of(
      layout.sharding(axes.BATCH), layout.shards(axes.BATCH)
    )
  placed = compiled_step.place_rows(
    {
      name: rows[name][:count, :_KL_TOKENS]
      for name in ('tokens', 'segment_ids')
    },
    layout,
  )

  def both(variables: Any, tokens_BT: Array, segments_BT: Array):
    output = model.apply(
      variables,
      tokens_BT,
      segment_ids_BT=segments_BT,
      attention=AttentionMode(selector='all', indexer_kl='all', trace=True),
      compute_logits=False,
    )  # pyrefly: ignore
    start_BT, end_BT = masking.key_ranges(segments_BT)
    valid_BT = end_BT > start_BT
    direct = [
      jnp.sum(jnp.where(valid_BT, kl_BT, 0)) / jnp.sum(valid_BT)
      for kl_BT in (
        _written_out_kl(trace, start_BT, end_BT, scale=softmax_scale(model.cfg))
        for trace in output.trace_L
      )
    ]
    found = output.indexer_kl_L[: len(direct)], jnp.stack(direct)
    return tuple(parallel_lib.constrain(x, None) for x in found)

  found = jax.jit(both)(variables, placed['tokens'], placed['segment_ids'])
  trained_L, direct_L = (np.asarray(x, np.float64) for x in found)
  return trained_L, direct_L


def _written_out_kl(
  trace: AttentionTrace, start_BT: Array, end_BT: Array, *, scale: float
) -> Array:
  """KL of each query, [B, T], from the definitions, a chunk at a time."""

  def kl(q_BtHX, q_index, w_index, start, end):
    p = selectors.head_mean_attention(
      q_BtHX, trace.k_BSHX, start, end, scale=scale
    )
    scores = pallas_kernels.lightning_indexer(
      q_index,
      trace.k_index_BSI,
      w_index,
      key_start_BT=start,
      key_end_BT=end,
      implementation='reference',
    )
    log_q = jax.nn.log_softmax(
      jnp.where(jnp.isfinite(scores), scores, -1e30), axis=-1
    )
    return jnp.sum(jax.scipy.special.xlogy(p, p) - p * log_q, axis=-1)

  return selectors.map_query_chunks(
    kl, trace.q_BTHX, trace.q_index_BTJI, trace.w_index_BTJ, start_BT, end_BT
  )


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
