"""Expert routing: scores, group-limited top-k and the bias correction.

Letters: E experts, A experts a token, g groups of E / g consecutive experts;
before these any dims of a batch, which are never merged: dims cut over devices
stay cut.

Sources: DeepSeek-V3 (arXiv:2412.19437) Eq. 12-16 and section 2.1.2 for
`noaux_tc`, DeepSeek-V2 (arXiv:2405.04434) section 2.2.2 for the rest.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from dsv32_jax.functional import precision
from dsv32_jax.functional import recorded as recorded_lib
from dsv32_jax.functional.recorded import Recorded

SCORING_FUNCS = ('sigmoid', 'softmax')
TOPK_METHODS = ('noaux_tc', 'group_limited_greedy', 'greedy')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """Which experts each token goes to, and with what weight.

  Attributes:
    expert_index: int32 [..., A], distinct experts of a token, best first.
    gate: float32 [..., A], their weights, differentiable in the logits.
    scores: float32 [..., E], the unbiased scores of all experts.
    mismatch: how recorded experts differ from those that the scores would
      choose now, if any are given.
  """

  # Any, as jax rebuilds pytrees with shapes, specs or stacked arrays inside.
  expert_index: Any
  gate: Any
  scores: Any
  mismatch: Any = None


def route(
  logits: Float[Array, '*batch E'],
  bias_E: Float[Array, ' E'] | None,
  *,
  num_experts_per_tok: int,
  n_group: int = 1,
  topk_group: int = 1,
  routed_scaling_factor: int | float = 1.0,
  norm_topk_prob: bool = True,
  scoring_func: str = 'sigmoid',
  topk_method: str = 'noaux_tc',
  recorded: Recorded | None = None,
  valid: Bool[Array, '*batch'] | None = None,
) -> Routing:
  """Chooses the experts of every token and weighs them.

  The bias takes part in the choice only, never in the weights, and gets no
  gradient. Experts of dropped groups score -inf, not 0: with a negative bias
  a 0 would win. Ties go to the lowest index.

  Args:
    logits: router outputs; computed in float32 by the caller, who also keeps
      the router's matrix product in float32.
    bias_E: `e_score_correction_bias`; None means zero. Only `noaux_tc` has it.
    num_experts_per_tok: A.
    n_group: number of groups the experts fall into.
    topk_group: number of groups kept for a token.
    routed_scaling_factor: factor on the weights, after normalisation.
    norm_topk_prob: divide the chosen scores by their sum.
    scoring_func: 'sigmoid' (V3) or 'softmax' (V2).
    topk_method: 'noaux_tc' (groups by the sum of their two best biased
      scores), 'group_limited_greedy' (groups by their best score) or 'greedy'
      (no groups).
    recorded: experts that were chosen before. They replace the choice, bias and
      groups included; the weights follow the current scores (spec 2.4).
    valid: False for padding, whose record does not count; needed with
      `recorded`.

  Raises:
    ValueError: an unknown name, sizes that do not fit each other, or a bias
      given to a method without one.
  """
  num_experts = logits.shape[-1]
  _check(
    num_experts=num_experts,
    num_experts_per_tok=num_experts_per_tok,
    n_group=n_group,
    topk_group=topk_group,
    scoring_func=scoring_func,
    topk_method=topk_method,
    has_bias=bias_E is not None,
  )
  logits = logits.astype(precision.accumulator(logits.dtype))
  if scoring_func == 'sigmoid':
    scores = jax.nn.sigmoid(logits)
  else:
    scores = jax.nn.softmax(logits, axis=-1)

  choice = jax.lax.stop_gradient(scores)
  if bias_E is not None:
    bias_E = jax.lax.stop_gradient(bias_E.astype(scores.dtype))
    choice = choice + bias_E.reshape((1,) * (choice.ndim - 1) + bias_E.shape)
  if topk_method != 'greedy' and topk_group < n_group:
    choice = _drop_groups(
      choice,
      n_group=n_group,
      topk_group=topk_group,
      num_counted=2 if topk_method == 'noaux_tc' else 1,
    )
  expert_index = top_experts(choice, k=num_experts_per_tok)
  mismatch = None
  if recorded is not None:
    assert valid is not None
    expert_index, mismatch = recorded_lib.replayed(
      expert_index, recorded, valid
    )
  gate = gates(
    scores,
    expert_index,
    routed_scaling_factor=routed_scaling_factor,
    norm_topk_prob=norm_topk_prob,
  )
  return Routing(
    expert_index=expert_index, gate=gate, scores=scores, mismatch=mismatch
  )


def top_experts(
  choice: Float[Array, '*batch E'], *, k: int
) -> Int[Array, '*batch k']:
  """Indices of the k largest scores, best first; ties by the lowest index.

  The result of `lax.top_k`, by k passes of a maximum: jax's top-k cannot be
  partitioned, so with sharded tokens every device would gather all scores,
  and for the few experts of a token the passes are faster on CPU as well.

  Args:
    choice: scores without NaN, at least k of them above -inf.
    k: number of indices, at most E.

  Returns:
    int32 [..., k].
  """
  num_experts = choice.shape[-1]
  expert = jax.lax.broadcasted_iota(jnp.int32, choice.shape, choice.ndim - 1)
  indices = []
  for _ in range(k):
    best = jnp.max(choice, axis=-1, keepdims=True)
    # The fill stays in range, so a NaN cannot give an index out of bounds.
    index = jnp.where(choice == best, expert, num_experts - 1)
    index = jnp.min(index, axis=-1, keepdims=True)
    indices.append(index)
    choice = jnp.where(expert == index, -jnp.inf, choice)
  return jnp.concatenate(indices, axis=-1)


def gates(
  scores: Float[Array, '*batch E'],
  expert_index: Int[Array, '*batch A'],
  *,
  routed_scaling_factor: int | float,
  norm_topk_prob: bool,
) -> Float[Array, '*batch A']:
  """Weights of experts that are already chosen (Eq. 13).

  Apart from `route` because a replayed routing brings its own experts and
  still needs weights that follow the current scores.

  Args:
    scores: unbiased scores.
    expert_index: experts of each token.
    routed_scaling_factor: factor on the result.
    norm_topk_prob: divide by the sum over A.

  Returns:
    [..., A] in the scores' type.
  """
  # A masked sum rather than a gather: its gradient is a masked broadcast,
  # where a gather's is a scatter-add, slow on every backend.
  chosen_AE = _is_expert(expert_index, scores.shape[-1])
  gate = jnp.sum(jnp.where(chosen_AE, scores[..., None, :], 0.0), axis=-1)
  if norm_topk_prob:
    # Scores that all underflow would otherwise give 0 / 0.
    gate = gate / (jnp.sum(gate, axis=-1, keepdims=True) + 1e-20)
  return gate * routed_scaling_factor


def expert_load(
  expert_index: Int[Array, '*batch A'],
  valid: Bool[Array, '*batch'] | None,
  *,
  num_experts: int,
) -> Int[Array, ' E']:
  """Counts the tokens that each expert receives.

  Args:
    expert_index: experts of each token.
    valid: tokens to count, None for all; padding must not steer the bias.
    num_experts: E.

  Returns:
    int32 [E].
  """
  hit_AE = _is_expert(expert_index, num_experts)
  if valid is not None:
    hit_AE = hit_AE & valid[..., None, None]
  batch = tuple(range(hit_AE.ndim - 1))
  return jnp.sum(hit_AE, axis=batch, dtype=jnp.int32)


def update_bias(
  bias_E: Float[Array, ' E'],
  load_E: Num[Array, ' E'],
  *,
  gamma: int | float | Float[Array, ''],
) -> Float[Array, ' E']:
  """Moves the selection bias towards balance, once an optimizer step.

  b_e + gamma * sign(mean(c) - c_e): up for an expert that got less than the
  mean, down for one that got more (arXiv:2412.19437, section 2.1.2;
  arXiv:2408.15664 for the sign rule).

  Args:
    bias_E: current bias.
    load_E: tokens per expert of the whole batch: all micro-batches, all
      devices.
    gamma: step; 0 leaves the bias as it is.
  """
  load_E = load_E.astype(jnp.float32)
  return bias_E + gamma * jnp.sign(jnp.mean(load_E) - load_E).astype(
    bias_E.dtype
  )


def _is_expert(
  expert_index: Int[Array, '*batch A'], num_experts: int
) -> Bool[Array, '*batch A E']:
  """Whether a choice is this expert."""
  shape = (*expert_index.shape, num_experts)
  expert = jax.lax.broadcasted_iota(expert_index.dtype, shape, len(shape) - 1)
  return expert_index[..., None] == expert


def _drop_groups(
  choice: Array, *, n_group: int, topk_group: int, num_counted: int
) -> Array:
  """Sets the scores outside the best `topk_group` groups to -inf."""
  *batch, num_experts = choice.shape
  # [..., groups, experts of a group]; beside them c counted, k kept.
  choice_ge = choice.reshape(*batch, n_group, num_experts // n_group)
  best_gc = top_experts(choice_ge, k=num_counted)
  is_counted_gce = _is_expert(best_gc, choice_ge.shape[-1])
  is_counted_ge = jnp.any(is_counted_gce, axis=-2)
  rank_g = jnp.sum(jnp.where(is_counted_ge, choice_ge, 0.0), axis=-1)
  kept_k = top_experts(rank_g, k=topk_group)
  keep_g = jnp.any(_is_expert(kept_k, n_group), axis=-2)
  choice_ge = jnp.where(keep_g[..., None], choice_ge, -jnp.inf)
  return choice_ge.reshape(choice.shape)


def _check(
  *,
  num_experts: int,
  num_experts_per_tok: int,
  n_group: int,
  topk_group: int,
  scoring_func: str,
  topk_method: str,
  has_bias: bool,
) -> None:
  """Refuses combinations that no routing can satisfy."""
  if scoring_func not in SCORING_FUNCS:
    raise ValueError(
      f'scoring_func={scoring_func!r} must be one of {SCORING_FUNCS}'
    )
  if topk_method not in TOPK_METHODS:
    raise ValueError(
      f'topk_method={topk_method!r} must be one of {TOPK_METHODS}'
    )
  if has_bias and topk_method != 'noaux_tc':
    raise ValueError(
      f"bias_E must be None with topk_method={topk_method!r}; only 'noaux_tc' "
      'selects with a bias'
    )
  available = num_experts
  if topk_method != 'greedy':
    if n_group < 1 or num_experts % n_group:
      raise ValueError(
        f'n_group={n_group} must divide the number of experts {num_experts}'
      )
    if not 1 <= topk_group <= n_group:
      raise ValueError(
        f'topk_group={topk_group} must lie in 1..n_group={n_group}'
      )
    group_size = num_experts // n_group
    available = topk_group * group_size
    if topk_method == 'noaux_tc' and topk_group < n_group and group_size < 2:
      raise ValueError(
        f'n_group={n_group} leaves {group_size} expert a group; noaux_tc ranks '
        'groups by their two best and needs at least 2'
      )
  if not 1 <= num_experts_per_tok <= available:
    raise ValueError(
      f'num_experts_per_tok={num_experts_per_tok} must lie in 1..{available}, '
      'the experts of the kept groups'
    )
