"""Rewards of responses: rules, rubrics and their weights (docs/rewards.md)."""

from dsv32_jax.rl.rewards.language import consistency
from dsv32_jax.rl.rewards.length import length_penalty
from dsv32_jax.rl.rewards.model import RewardModel
from dsv32_jax.rl.rewards.types import Job, Mark, Outcome, Sampled

__all__ = [
  'Job',
  'Mark',
  'Outcome',
  'RewardModel',
  'Sampled',
  'consistency',
  'length_penalty',
]
