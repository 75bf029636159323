import dataclasses
import json

import pytest

from dsv32_jax.config import convert
from dsv32_jax.config.problems import DomainConfig
from dsv32_jax.config.rewards import DomainReward, RewardConfig
from dsv32_jax.config.rl import GRPOConfig, RLConfig, UpdateConfig
from dsv32_jax.config.rollout import RolloutConfig
from tests.support import rl_runs


def test_config_goes_through_json_unchanged():
  config = rl_runs.config()
  text = json.dumps(convert.to_dict(config))
  assert convert.from_dict(RLConfig, json.loads(text)) == config


def test_config_tells_the_shape_of_a_minibatch():
  config = rl_runs.config()
  # 16 responses in 2 minibatches; 32 fed tokens at most, two in a row of 64.
  assert config.responses_per_minibatch == 8
  assert (config.row_tokens, config.most_rows, config.rows) == (64, 4, 4)
  update = dataclasses.replace(
    config.update, row_tokens=None, rows=3, micro_batches=3
  )
  other = rl_runs.config(update=update)
  assert (other.row_tokens, other.most_rows, other.rows) == (48, 9, 3)
  assert config.kept_cap == 272
  assert (
    rl_runs.config(
      rollout=dataclasses.replace(config.rollout, top_k=20)
    ).kept_cap
    == 20
  )
  assert (
    rl_runs.config(
      rollout=dataclasses.replace(config.rollout, top_p=1.0)
    ).kept_cap
    is None
  )


def test_config_places_demonstrations_where_stages_read_them():
  run = rl_runs.config().start_run('/data/demonstrations')
  (source,) = run.stages['cold_start'].data.sources
  assert source.path == '/data/demonstrations/start.jsonl'


def test_rewards_of_a_mode_come_before_those_of_its_domain():
  thinking, other = DomainReward(length_penalty=0.5), DomainReward()
  rewards = RewardConfig(domains={'a/thinking': thinking, 'a': other})
  assert rewards.of('a', 'thinking') is thinking
  assert rewards.of('a', 'chat') is other
  assert rewards.of('b', 'chat') is rewards.default


def test_kl_strength_of_a_domain_comes_before_the_default():
  grpo = GRPOConfig(kl_strength=0.5, domain_kl_strength={'a': 0.0})
  assert (grpo.kl_strength_of('a'), grpo.kl_strength_of('b')) == (0.0, 0.5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'batches': 0}, r'batches: got 0, expected at least 1'),
    ({'init_from': 'somewhere'}, r'init_from: got .* either a checkpoint or'),
    ({'order': ('other',)}, r"order: got 'other', expected one of"),
    ({'demonstrations': {}}, r"got path 'demonstrations:start', expected"),
    (
      {'domains': {'mathematics': DomainConfig(weight=0.0)}},
      r'domains: got none with a weight above 0',
    ),
    (
      {'grpo': GRPOConfig(domain_kl_strength={'poetry': 1.0})},
      r"domain_kl_strength: got 'poetry', expected names of domains",
    ),
    (
      {'update': UpdateConfig(minibatches=3, max_prompt_tokens=8)},
      r'minibatches: got 3, expected a divisor of the 16 responses',
    ),
    (
      {
        'update': UpdateConfig(
          minibatches=2, max_prompt_tokens=28, row_tokens=32
        )
      },
      r'row_tokens: got 32, expected at least 33',
    ),
    (
      {'update': UpdateConfig(minibatches=2, max_prompt_tokens=60)},
      r'max_position_embeddings 64',
    ),
  ],
)
def test_config_that_cannot_run_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    rl_runs.config(**changes)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: RolloutConfig(group_size=1), r'group_size: got 1, expected at'),
    (lambda: RolloutConfig(temperature=0.0), r'temperature: got 0.0'),
    (
      lambda: RolloutConfig(prompts_per_batch=6, chunk_prompts=4),
      r'chunk_prompts: got 4, expected 0 or a divisor of prompts_per_batch 6',
    ),
    (lambda: GRPOConfig(clip_epsilon=0.0), r'clip_epsilon: got 0.0'),
    (lambda: DomainConfig(), r'sources: got none with weight 1.0'),
  ],
)
def test_part_of_a_config_that_cannot_be_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_nucleus_of_a_large_vocabulary_needs_a_bound():
  config = rl_runs.config()
  model = dataclasses.replace(config.model, vocab_size=5000)
  with pytest.raises(ValueError, match=r'rollout.top_k: got None with top_p'):
    rl_runs.config(model=model)
  bounded = dataclasses.replace(config.rollout, top_k=256)
  assert rl_runs.config(model=model, rollout=bounded).kept_cap == 256
