"""What a step of reinforcement learning reports (spec section 2.7).

Parts of micro-batches add up; only at the end are sums divided by counts.

Letters: B rows, T tokens, N responses.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv32_jax.functional.recorded import Mismatch
from dsv32_jax.rl.batches import TrainingBatch
from dsv32_jax.rl.grpo import Objective, per_response

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
  """Of a (micro-)batch.

  Attributes:
    sums: that add up over micro-batches.
    maxima: of which the largest counts.
  """

  sums: Any
  maxima: Any

  def merged(self, other: 'Parts') -> 'Parts':
    return Parts(
      jax.tree.map(jnp.add, self.sums, other.sums),
      jax.tree.map(jnp.maximum, self.maxima, other.maxima),
    )


def drift_parts(log_ratio_BT: Array, batch: TrainingBatch) -> Parts:
  """Of log r = lp_th - lp_old, 0 where nothing was sampled."""
  is_policy_BT = batch.response_BT >= 0
  ratio_BT = jnp.where(is_policy_BT, jnp.exp(log_ratio_BT), 0.0)
  size_BT = jnp.abs(log_ratio_BT)
  return Parts(
    {
      'policy_tokens': _count(is_policy_BT),
      'ratio': jnp.sum(ratio_BT),
      'log_ratio': jnp.sum(log_ratio_BT),
      'log_ratio_abs': jnp.sum(size_BT),
    },
    {'ratio': jnp.max(ratio_BT), 'log_ratio_abs': jnp.max(size_BT)},
  )


def objective_parts(
  objective: Objective, entropy_BT: Array, batch: TrainingBatch
) -> Parts:
  """Of the objective and the policy's entropy."""
  is_policy_BT = batch.response_BT >= 0
  drift = drift_parts(objective.log_ratio_BT, batch)
  sums = dict(drift.sums)
  sums |= {
    'objective/policy': objective.policy,
    'objective/kl': objective.penalty,
    'clipped': _count(objective.is_clipped_BT),
    'masked': _count(objective.is_masked_N),
    'responses': _count(
      per_response(
        is_policy_BT.astype(jnp.float32),
        batch.response_BT,
        num_responses=batch.num_responses,
      )
      > 0
    ),
    'entropy': jnp.sum(jnp.where(is_policy_BT, entropy_BT, 0.0)),
    'kl': jnp.sum(objective.kl_BT),
  }
  for number, name in enumerate(batch.domains):
    is_own_BT = is_policy_BT & (batch.domain_BT == number)
    sums[f'kl/{name}'] = jnp.sum(jnp.where(is_own_BT, objective.kl_BT, 0.0))
    sums[f'kl_tokens/{name}'] = _count(is_own_BT)
  return Parts(sums, drift.maxima)


def mismatch_sums(routing: Any, selection: Any) -> dict[str, Array]:
  """Counts over all layers, of those that are there."""
  sums = {}
  for name, found in (('routing', routing), ('selection', selection)):
    if found is not None:
      total: Mismatch = jax.tree.map(jnp.sum, found)
      sums |= {
        f'mismatch/{name}/{field.name}': getattr(total, field.name)
        for field in dataclasses.fields(Mismatch)
      }
  return sums


def drift_metrics(parts: Parts, prefix: str) -> Metrics:
  """`<prefix>/ratio_mean` and the like."""
  tokens = jnp.maximum(parts.sums['policy_tokens'], 1.0)
  return {
    f'{prefix}/ratio_mean': parts.sums['ratio'] / tokens,
    f'{prefix}/ratio_max': parts.maxima['ratio'],
    f'{prefix}/log_ratio_mean': parts.sums['log_ratio'] / tokens,
    f'{prefix}/log_ratio_abs_mean': parts.sums['log_ratio_abs'] / tokens,
    f'{prefix}/log_ratio_abs_max': parts.maxima['log_ratio_abs'],
  }


def objective_metrics(parts: Parts, domains: tuple[str, ...]) -> Metrics:
  """Scalars to report of a whole minibatch."""
  sums = parts.sums
  tokens = jnp.maximum(sums['policy_tokens'], 1.0)
  responses = jnp.maximum(sums['responses'], 1.0)
  metrics = drift_metrics(parts, 'grpo') | {
    'loss/policy': -sums['objective/policy'],
    'loss/kl': sums['objective/kl'],
    'grpo/clip_fraction': sums['clipped'] / tokens,
    'grpo/masked_fraction': sums['masked'] / responses,
    'grpo/responses': sums['responses'],
    'policy_tokens': sums['policy_tokens'],
    'entropy': sums['entropy'] / tokens,
    'kl/all': sums['kl'] / tokens,
  }
  for name in domains:
    own = sums[f'kl_tokens/{name}']
    metrics[f'kl/{name}'] = sums[f'kl/{name}'] / jnp.maximum(own, 1.0)
    metrics[f'kl_tokens/{name}'] = own
  return metrics


def mismatch_metrics(sums: dict[str, Array]) -> Metrics:
  """Shares of positions and of choices that are others by now.

  `mismatch/routing` is of (token, layer) pairs whose experts are not the
  recorded ones, `mismatch/routing_choices` of single experts; likewise for
  selections. `replayed/...` counts the pairs.
  """
  metrics = {}
  for name in ('routing', 'selection'):
    if f'mismatch/{name}/positions' not in sums:
      continue
    positions, differing, choices, missing = (
      sums[f'mismatch/{name}/{field.name}']
      for field in dataclasses.fields(Mismatch)
    )
    metrics |= {
      f'mismatch/{name}': differing / jnp.maximum(positions, 1.0),
      f'mismatch/{name}_choices': missing / jnp.maximum(choices, 1.0),
      f'replayed/{name}': positions,
    }
  return metrics


def _count(x: Array) -> Array:
  return jnp.sum(x.astype(jnp.float32))
