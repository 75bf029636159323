"""Configuration of rollouts: how responses are sampled.

Where a default has a source it is named (R1: arXiv:2501.12948); V3.2 gives no
numbers.
"""

import dataclasses
from typing import Literal

from dsv32_jax.config.checks import check_at_least, require
from dsv32_jax.config.model import check_types

SamplerPrecision = Literal['same', 'float32', 'bfloat16', 'fp8']


# Tokens of a nucleus that are recorded at most (as in other code bases).
MOST_KEPT = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
  """How responses are sampled.

  Attributes:
    prompts_per_batch: different prompts a rollout batch (R1: 32 a step).
    group_size: G, responses a prompt (R1: 16).
    temperature: of the draws (R1: 1.0, in its second stage 0.7).
    top_p: nucleus that tokens are drawn from.
    top_k: most tokens of that nucleus; bounds what is recorded of it.
    max_new_tokens: longest response; a domain may have its own.
    precision: of the sampler's weights and arithmetic; 'same' as the trainer's.
    staleness: rollouts are drawn with the weights of so many rollout batches
      ago, as when sampling runs beside training.
    chunk_prompts: prompts that are rolled out and sealed on disk together; 0
      takes the whole batch. What is sealed survives a crash.
    max_batch: responses that are sampled at a time.
    decode_steps: steps between two looks of the host.
    run_ahead: begin the next steps before the host has read the last ones.
    least_rows: rows that steps are run with at least, once responses have
      ended (`inference.EngineConfig`); None always runs max_batch.
    prefill_chunk: tokens of a prompt that are run at a time.
    prefill_rows: prompts that are run at a time.
    page_size: tokens a page of the caches holds.
    release_caches: give the caches' memory back while training, for both on the
      same devices.
    latent_format: of cached latent rows: 'compute' or 'fp8'.
    index_format: of cached indexer keys: 'compute' or 'fp8'.
  """

  prompts_per_batch: int = 32
  group_size: int = 16
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int | None = None
  max_new_tokens: int = 1024
  precision: SamplerPrecision = 'same'
  staleness: int = 0
  chunk_prompts: int = 0
  max_batch: int = 64
  decode_steps: int = 8
  run_ahead: bool = False
  least_rows: int | None = None
  prefill_chunk: int = 512
  prefill_rows: int = 64
  page_size: int = 64
  release_caches: bool = False
  latent_format: Literal['compute', 'fp8'] = 'compute'
  index_format: Literal['compute', 'fp8'] = 'compute'

  def __post_init__(self):
    check_types(self)
    check_at_least(
      self,
      1,
      'prompts_per_batch',
      'top_k',
      'max_new_tokens',
      'max_batch',
      'decode_steps',
      'least_rows',
      'prefill_chunk',
      'prefill_rows',
      'page_size',
    )
    check_at_least(self, 0, 'staleness', 'chunk_prompts')
    require(
      self.group_size >= 2,
      f'group_size: got {self.group_size}, expected at least 2 (an advantage '
      'is relative to the group)',
    )
    require(
      self.temperature > 0,
      f'temperature: got {self.temperature}, expected a positive number '
      '(greedy responses of a group are all equal)',
    )
    require(
      0 < self.top_p <= 1,
      f'top_p: got {self.top_p}, expected 0 < top_p <= 1',
    )
    require(
      self.chunk_prompts == 0
      or self.prompts_per_batch % self.chunk_prompts == 0,
      f'chunk_prompts: got {self.chunk_prompts}, expected 0 or a divisor of '
      f'prompts_per_batch {self.prompts_per_batch}',
    )

  def truncates_too_widely(self, vocab_size: int) -> bool:
    """Whether a nucleus may hold more tokens than can be recorded."""
    most = vocab_size if self.top_k is None else self.top_k
    return self.truncates and most > MOST_KEPT

  @property
  def truncates(self) -> bool:
    """Whether tokens are drawn from less than the whole vocabulary."""
    return self.top_p < 1 or self.top_k is not None

  @property
  def responses_per_batch(self) -> int:
    return self.prompts_per_batch * self.group_size
