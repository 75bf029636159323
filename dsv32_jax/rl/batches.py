"""From groups of responses to packed rows: what one optimizer step reads.

Several responses share a row, each a document of its own. A response of t
tokens takes t - 1 places: its last token is never fed. Nothing is cut off:
what does not fit is an error.

Letters: B rows, T tokens, N responses of a minibatch, K most ids of a kept
set or most selected keys, L layers, A experts a token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.rl import packing
from dsv32_jax.rl.advantages import group_advantages
from dsv32_jax.rl.types import Group, Response
from dsv32_jax.sharding import process_rows, specs
from dsv32_jax.sharding.parallel import Parallel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingBatch:
  """Packed rows of one minibatch; every array is [B, T, ...].

  Attributes:
    tokens_BT: inputs.
    segment_ids_BT: response of each token, counted in its row; 0 is padding.
    positions_BT: position in the response.
    targets_BT: next tokens.
    response_BT: response in the minibatch, of targets that the policy sampled;
      -1 elsewhere.
    weight_BT: 1 / |o_i| over the number of responses of its group and over the
      number of groups; 0 where nothing was sampled. Sums to 1.
    advantage_BT: A of the response.
    sampling_logprob_BT: as recorded.
    kl_strength_BT: beta of the response's domain.
    temperature_BT: of the draws; 1 where nothing was sampled.
    domain_BT: place of the response's domain in `domains`.
    ref_logprob_BT: of the KL's anchor, to be added (`step.make_score_fn`); None
      has no KL term.
    kept_BTK: ids that could have been drawn, filled up with -1; None is the
      whole vocabulary everywhere.
    experts_BTLA: of each token that is fed, -1 in padding; None if not
      recorded.
    selected_BTLK: selected keys, as places in the row; likewise.
    num_responses: N, the same for all minibatches. Static.
    domains: names. Static.
  """

  tokens_BT: Any
  segment_ids_BT: Any
  positions_BT: Any
  targets_BT: Any
  response_BT: Any
  weight_BT: Any
  advantage_BT: Any
  sampling_logprob_BT: Any
  kl_strength_BT: Any
  temperature_BT: Any
  domain_BT: Any
  ref_logprob_BT: Any = None
  kept_BTK: Any = None
  experts_BTLA: Any = None
  selected_BTLK: Any = None
  num_responses: int = dataclasses.field(default=0, metadata={'static': True})
  domains: tuple[str, ...] = dataclasses.field(
    default=(), metadata={'static': True}
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """A response with what it teaches.

  Attributes:
    response: what was sampled.
    advantage: over its group.
    domain: its problem's.
    group_size: responses of its group.
  """

  response: Response
  advantage: int | float
  domain: str
  group_size: int


def samples(groups: Sequence[Group], grpo: GRPOConfig) -> list[Sample]:
  """The responses of groups in order, with their advantages."""
  found = []
  for group in groups:
    advantages_G = group_advantages(
      group.rewards, divide_by_std=grpo.divide_by_std
    )
    for scored, advantage in zip(group.responses, advantages_G, strict=True):
      found.append(
        Sample(
          response=scored.response,
          advantage=float(advantage),
          domain=group.domain,
          group_size=len(group.responses),
        )
      )
  return found


def minibatches(
  samples: Sequence[Sample], count: int, *, seed: int | Sequence[int]
) -> list[list[Sample]]:
  """Shuffles and deals out; sizes differ by one at most.

  Args:
    samples: of one rollout batch.
    count: of minibatches.
    seed: of the order, such as (run's seed, number of the rollout batch).

  Raises:
    ValueError: fewer samples than minibatches.
  """
  if not 1 <= count <= len(samples):
    raise ValueError(
      f'minibatches: got {count} for {len(samples)} responses, expected 1 to '
      f'{len(samples)}'
    )
  order = np.random.default_rng(seed).permutation(len(samples))
  return [[samples[i] for i in part] for part in np.array_split(order, count)]


def rows_needed(samples: Sequence[Sample], row_tokens: int) -> int:
  """Rows that `make_batch` packs these samples into."""
  return packing.pack(_sizes(samples), row_tokens).num_rows


def make_batch(
  samples: Sequence[Sample],
  *,
  model: ModelConfig,
  grpo: GRPOConfig,
  row_tokens: int,
  rows: int | None = None,
  row_multiple: int = 1,
  domains: Sequence[str] | None = None,
  num_responses: int | None = None,
  kept_cap: int | None = None,
) -> TrainingBatch:
  """Packs one minibatch.

  What was recorded of experts and selections is packed whenever all samples
  have it, also where it is not replayed: mismatches are counted then.

  Args:
    samples: at least one.
    model: whose layers the records are of.
    grpo: which records are needed, and the strengths of the KL.
    row_tokens: T.
    rows: B; None takes as few as are needed.
    row_multiple: B of None is rounded up to a multiple of this, as devices and
      micro-batches need it.
    domains: names that reports are divided by; None takes the samples'.
    num_responses: N, at least as many as samples; None takes their number.
    kept_cap: K of kept sets, the rollouts' top_k; None takes the largest here,
      and no array at all where none is limited.

  Returns:
    Host arrays, without reference log-probabilities.

  Raises:
    ValueError: a response that is too long, too few rows, a domain that is not
      listed, a record that is missing or does not fit the model.
  """
  if not samples:
    raise ValueError('samples: got none, expected at least one response')
  N = len(samples) if num_responses is None else num_responses
  if N < len(samples):
    raise ValueError(
      f'num_responses: got {N} for {len(samples)} responses, expected at least '
      'as many'
    )
  if domains is None:
    domains = sorted({sample.domain for sample in samples})
  unknown = {sample.domain for sample in samples} - set(domains)
  if unknown:
    raise ValueError(
      f'domains: got {list(domains)} without {sorted(unknown)}, expected every '
      "response's"
    )
  places = packing.pack(_sizes(samples), row_tokens, rows, row_multiple)
  shape = (places.num_rows, row_tokens)
  arrays = {
    'tokens_BT': np.zeros(shape, np.int32),
    'segment_ids_BT': np.zeros(shape, np.int32),
    'positions_BT': np.zeros(shape, np.int32),
    'targets_BT': np.zeros(shape, np.int32),
    'response_BT': np.full(shape, -1, np.int32),
    'weight_BT': np.zeros(shape, np.float32),
    'advantage_BT': np.zeros(shape, np.float32),
    'sampling_logprob_BT': np.zeros(shape, np.float32),
    'kl_strength_BT': np.zeros(shape, np.float32),
    'temperature_BT': np.ones(shape, np.float32),
    'domain_BT': np.zeros(shape, np.int32),
  }
  share = 1 / sum(1 / sample.group_size for sample in samples)
  for number, sample in enumerate(samples):
    response, place = sample.response, places.of(number)
    is_policy = response.is_policy[1:]
    weight = share / sample.group_size / max(response.num_policy_tokens, 1)
    beta = grpo.kl_strength_of(sample.domain)
    for name, value in (
      ('tokens_BT', response.tokens[:-1]),
      ('segment_ids_BT', places.segment[number]),
      ('positions_BT', np.arange(is_policy.size)),
      ('targets_BT', response.tokens[1:]),
      ('response_BT', np.where(is_policy, number, -1)),
      ('weight_BT', np.where(is_policy, weight, 0)),
      ('advantage_BT', np.where(is_policy, sample.advantage, 0)),
      ('sampling_logprob_BT', response.sampling_logprobs[1:]),
      ('kl_strength_BT', np.where(is_policy, beta, 0)),
      ('temperature_BT', np.where(is_policy, response.temperature, 1)),
      ('domain_BT', list(domains).index(sample.domain)),
    ):
      arrays[name][place] = value
  responses = [sample.response for sample in samples]
  return TrainingBatch(
    **arrays,
    kept_BTK=packing.kept_sets(
      responses, places, cap=kept_cap, vocab_size=model.vocab_size
    )
    if grpo.keep_sampling_mask
    else None,
    experts_BTLA=packing.experts(
      responses, places, model, needed=grpo.keep_routing
    ),
    selected_BTLK=packing.selections(
      responses, places, model, needed=grpo.keep_selection
    ),
    num_responses=N,
    domains=tuple(domains),
  )


def place(batch: Any, parallel: Parallel | None) -> Any:
  """Puts a batch's rows on the devices that share them."""
  if parallel is None:
    return jax.device_put(batch, jax.local_devices()[0])
  leaves, tree = jax.tree.flatten(batch)
  placed = process_rows.place(
    {str(number): leaf for number, leaf in enumerate(leaves)},
    lambda ndim: specs.rows(parallel, ndim),
  )
  return jax.tree.unflatten(tree, [placed[str(i)] for i in range(len(leaves))])


def _sizes(samples: Sequence[Sample]) -> list[int]:
  return [sample.response.tokens.size - 1 for sample in samples]
