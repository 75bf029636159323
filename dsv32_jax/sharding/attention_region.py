"""Attention on shares of the rows, of the sequence and of the heads.

One `jax.shard_map` over every mesh axis. A device holds the queries of its rows
and of its share of the sequence, and the matrices of its heads. The keys of a
token are one latent row and one indexer key (704 values in V3.2), so the keys
of the whole sequence are gathered, the only thing that is: scores, selections,
per-head queries and outputs stay where their queries are. Gathered keys are put
into natural order, so that selection, ties and ranges are those of one device.
The outputs of the heads are summed over their axis, and so are the losses over
rows and sequence.

Sizes that mesh axes do not divide (a short batch of an evaluation, one token of
a decode step) are laid whole over those axes: every member does the same then.

Letters: B batch, T query tokens, S key tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from dsv32_jax.sharding import axes, zigzag
from dsv32_jax.sharding.parallel import Parallel, active


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Mesh axes that one attention call is cut over.

  Attributes:
    rows: for the rows of the batch.
    sequence: for the queries of a row.
    heads: for the heads.
  """

  rows: tuple[str, ...]
  sequence: tuple[str, ...]
  heads: tuple[str, ...]

  @classmethod
  def of(
    cls, parallel: Parallel, *, batch: int, length: int, num_heads: int
  ) -> 'Layout':
    return cls(
      rows=parallel.fitting_axes(axes.BATCH, batch),
      sequence=parallel.fitting_axes(axes.SEQUENCE, length),
      heads=parallel.fitting_axes(axes.HEADS, num_heads),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attended:
  """What attention gives for some of the rows, queries and heads.

  Attributes:
    u_BTD: the output, summed over the heads there are.
    indexer_kl: sum of the queries' weighted KL, float32.
    num_pairs: (query, key) pairs attended to, float32.
    indices_BTK: the selected sets, or None.
    mismatch: counts of where own and recorded selections differ, or None.
  """

  u_BTD: Any
  indexer_kl: Any
  num_pairs: Any
  indices_BTK: Any = None
  mismatch: Any = None


def attend(
  make_core: Callable[..., Callable[..., Attended]],
  weights: Any,
  queries: Any,
  keys: Any,
  key: Array | None,
  *,
  weight_axes: Any,
  num_heads: int,
  sequence_shards: int = 1,
  whole_keys: bool = False,
  policy: Callable[..., bool] | None = None,
) -> Attended:
  """Runs an attention core under the active layout.

  Args:
    make_core: gives the computation of one device, of (weights, queries, keys,
      key), from what it must know of the others: `head_axis`, the mesh axes
      over which the heads are cut or None, and `sequence_parts`, into how many
      parts the queries of a row are cut.
    weights: matrices with heads.
    queries: what belongs to queries; every leaf is [B, T, ...].
    keys: what belongs to keys; every leaf is [B, S, ...], S = T unless
      `whole_keys`.
    key: a random key or None; the same on every device.
    weight_axes: logical axes of each of `weights`.
    num_heads: of all devices.
    sequence_shards: the order that the tokens are in (`zigzag`); 1 is natural.
    whole_keys: the keys are a cache's, in natural order: never cut.
    policy: what the backward pass keeps of the region, for a caller that is
      not itself under a `jax.checkpoint`: without one it would keep all that is
      gathered.

  Returns:
    The core's result for all rows, queries and heads.

  Raises:
    ValueError: a zigzag order for another number of shards than there are.
  """
  parallel = active()
  if parallel is None:
    if not whole_keys:
      keys = _natural(keys, sequence_shards)
    core = make_core(head_axis=None, sequence_parts=1)
    return core(weights, queries, keys, key)
  batch, length = jax.tree.leaves(queries)[0].shape[:2]
  layout = Layout.of(parallel, batch=batch, length=length, num_heads=num_heads)
  parts = parallel.size(*layout.sequence)
  if sequence_shards not in (1, parts):
    raise ValueError(
      f'sequence_shards: got {sequence_shards}, expected {parts}, the parts '
      f'that rules {parallel.rules.name!r} cut a sequence of {length} into'
    )
  core = make_core(head_axis=layout.heads or None, sequence_parts=parts)

  specs = jax.tree.map(
    lambda x, logical: parallel.fitting_spec(x.shape, *logical),
    weights,
    weight_axes,
  )

  def member(weights, queries, keys, key):
    with jax.named_scope('gather_weights'):
      weights = jax.tree.map(_with_heads_cut, weights, specs, weight_axes)
    if layout.sequence and not whole_keys:
      with jax.named_scope('gather_keys'):
        keys = _natural(_gathered(keys, layout.sequence), sequence_shards)
    result = core(weights, queries, keys, key)
    return dataclasses.replace(
      result,
      u_BTD=_sum(result.u_BTD, layout.heads),
      indexer_kl=_sum(result.indexer_kl, layout.rows + layout.sequence),
      num_pairs=_sum(result.num_pairs, layout.rows + layout.sequence),
      mismatch=jax.tree.map(
        lambda x: _sum(x, layout.rows + layout.sequence), result.mismatch
      ),
    )

  if policy is not None:
    member = jax.checkpoint(member, policy=policy, prevent_cse=False)
  # Positions and ranges are the same in every layer. In a scan over layers JAX
  # would take what follows from them alone, masks and rotations, out of the
  # scan and of this region, and keep it. Tied to keys they vary with the layer.
  queries, keys = lax.optimization_barrier((queries, keys))
  whole = PartitionSpec()
  rows = PartitionSpec(layout.rows or None)
  own = PartitionSpec(layout.rows or None, layout.sequence or None)
  # Unchecked: cotangents are then summed over the axes that an input is not cut
  # over, and shared out over those that an output is not cut over, which is
  # right for whatever all members of an axis compute alike.
  return jax.shard_map(
    member,
    mesh=parallel.mesh,
    in_specs=(specs, own, rows if whole_keys else own, whole),
    out_specs=Attended(own, whole, whole, own, whole),
    check_vma=False,
  )(weights, queries, keys, key)


def on_rows(function: Callable[..., Any], *operands: Any) -> Any:
  """Runs a function of whole requests where the requests are.

  Args:
    function: of the operands; each request's result is of its own operands.
    *operands: every leaf is [B, ...], or an area of memory [A, ...] that is
      shared by the requests of a device.

  Returns:
    Its result, cut as the operands are.
  """
  parallel = active()
  if parallel is None:
    return function(*operands)
  count = math.gcd(*(leaf.shape[0] for leaf in jax.tree.leaves(operands)))
  rows = PartitionSpec(parallel.fitting_axes(axes.BATCH, count) or None)
  return jax.shard_map(
    function,
    mesh=parallel.mesh,
    in_specs=rows,
    out_specs=rows,
    check_vma=False,
  )(*operands)


def _with_heads_cut(
  x: Array, spec: PartitionSpec, logical: tuple[str, ...]
) -> Array:
  """A matrix of this device's heads, gathered along its other dims."""
  for dim, names in enumerate(spec):
    if names and logical[dim] != axes.HEADS:
      x = lax.all_gather(x, names, axis=dim, tiled=True)
  return x


def _gathered(keys: Any, names: tuple[str, ...]) -> Any:
  return jax.tree.map(
    lambda x_BS: lax.all_gather(x_BS, names, axis=1, tiled=True), keys
  )


def _natural(keys: Any, sequence_shards: int) -> Any:
  return jax.tree.map(
    lambda x_BS: zigzag.to_natural(x_BS, sequence_shards), keys
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(x: Array, names: tuple[str, ...]) -> Array:
  """The sum over members, none of which has a result of its own.

  All members get the same cotangent, so backward there is nothing to send:
  their shares of it add up to as many times one's own.
  """
  return lax.psum(x, names) if names else x


def _sum_forward(x: Array, names: tuple[str, ...]) -> tuple[Array, None]:
  return _sum(x, names), None


def _sum_backward(
  names: tuple[str, ...], residuals: None, cotangent: Array
) -> tuple[Array]:
  del residuals
  return (cotangent * lax.axis_size(names) if names else cotangent,)


_sum.defvjp(_sum_forward, _sum_backward)
