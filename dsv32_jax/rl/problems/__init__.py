"""Problems that a program can check, by domain (docs/rewards.md)."""

from dsv32_jax.rl.problems.registry import make, names, register
from dsv32_jax.rl.problems.splits import is_held_out
from dsv32_jax.rl.problems.types import (
  DOMAINS,
  MODES,
  Criterion,
  Domain,
  Problem,
  ProblemSource,
  Split,
)

__all__ = [
  'DOMAINS',
  'MODES',
  'Criterion',
  'Domain',
  'Problem',
  'ProblemSource',
  'Split',
  'is_held_out',
  'make',
  'names',
  'register',
]
