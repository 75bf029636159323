"""What a run computes: FLOPs before RL and of each part of RL.

Model FLOPs: what the architecture needs for the tokens that there are. Padding
and what remat makes again are not counted, so neither part gains by waste. One
multiply-add is two FLOPs, a backward pass counts as two forward passes.

The paper's post-training took more than 10 % of its pre-training
(arXiv:2512.02556, section 3); `Ledger.fraction` is that number for a run.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.config.training import RunConfig
from dsv32_jax.evaluation import flops

Phase = Literal['rollout', 'scoring', 'training', 'evaluation']
# What RL spends to learn; evaluations are for the reader.
RL_PHASES: tuple[Phase, ...] = ('rollout', 'scoring', 'training')


@functools.cache
def forward_flops(
  cfg: ModelConfig, num_tokens: int, *, is_sparse: bool = True
) -> int:
  """Of one forward pass over a sequence, its logits included.

  Decoding it token by token takes the same: what is cached is not made again.

  Args:
    cfg: the architecture; its MTP module is not run.
    num_tokens: tokens fed; 0 costs nothing.
    is_sparse: attention by the indexer's selection, or dense without indexer.
  """
  if num_tokens < 1:
    return 0
  cost = flops.attention_cost(cfg, num_tokens)
  attention = cost.sparse_flops if is_sparse else cost.dense_flops
  products = token_products(cfg, with_indexer=is_sparse)
  return 2 * products * num_tokens + attention


def token_products(cfg: ModelConfig, *, with_indexer: bool = True) -> int:
  """Multiply-adds of a token with the matrices that it meets.

  Of the routed experts only those count that a token is sent to.
  """
  D, H = cfg.hidden_size, cfg.num_attention_heads
  Q = cfg.q_lora_rank
  C, V = cfg.kv_lora_rank, cfg.vocab_size
  N, U = cfg.qk_nope_head_dim, cfg.v_head_dim
  queries = H * cfg.qk_head_dim
  attention = D * cfg.latent_dim + H * C * (N + U) + H * U * D
  attention += D * queries if Q is None else D * Q + Q * queries
  if with_indexer and Q is not None:
    J, I = cfg.index_n_heads, cfg.index_head_dim
    attention += Q * J * I + D * (I + J)
  dense = 3 * D * cfg.intermediate_size
  experts = cfg.num_experts_per_tok + cfg.n_shared_experts
  moe = 3 * D * cfg.moe_intermediate_size * experts + D * cfg.n_routed_experts
  return (
    cfg.num_hidden_layers * attention
    + cfg.first_k_dense_replace * dense
    + cfg.num_moe_layers * moe
    + D * V
  )


def recipe_flops(run: RunConfig) -> dict[str, float]:
  """Of each stage before RL, from its config; rows count as one document."""
  found = {}
  for name in run.order:
    stage, cfg = run.stages[name], run.stage_model(name)
    rows = stage.steps * stage.data.batch_size
    dense = forward_flops(cfg, stage.data.seq_len, is_sparse=False)
    sparse = forward_flops(cfg, stage.data.seq_len)
    match stage.kind:
      case 'pretrain' | 'context_extension':
        once = 3 * dense
      case 'dense_warmup':
        # The main model forward alone; the indexers learn.
        indexer = flops.attention_cost(cfg, stage.data.seq_len).indexer_flops
        once = dense + 3 * indexer
      case _:
        once = 3 * (dense if stage.selector == 'all' else sparse)
    found[name] = float(rows * once)
  return found


@dataclasses.dataclass
class Ledger:
  """FLOPs so far, by phase.

  Attributes:
    before: FLOPs before RL: pre-training and cold start; 0 if unknown.
    spent: of RL, by phase.
  """

  before: float
  spent: dict[str, float] = dataclasses.field(
    default_factory=lambda: dict.fromkeys((*RL_PHASES, 'evaluation'), 0.0)
  )

  def add_forward(
    self, phase: Phase, cfg: ModelConfig, lengths: Sequence[int]
  ) -> None:
    """Sequences of so many fed tokens, forward, with sparse attention."""
    self.spent[phase] += float(sum(forward_flops(cfg, n) for n in lengths))

  def add_training(self, cfg: ModelConfig, lengths: Sequence[int]) -> None:
    """The same, forward and backward."""
    self.spent['training'] += 3.0 * sum(forward_flops(cfg, n) for n in lengths)

  @property
  def rl(self) -> float:
    """FLOPs of RL, evaluations left out."""
    return sum(self.spent[phase] for phase in RL_PHASES)

  @property
  def fraction(self) -> float | None:
    """FLOPs of RL over those before it; None if these are unknown."""
    return self.rl / self.before if self.before else None

  def metrics(self) -> dict[str, float]:
    """For a line of metrics."""
    values = {f'compute/{name}_flops': v for name, v in self.spent.items()}
    values['compute/rl_flops'] = self.rl
    if self.fraction is not None:
      values['compute/rl_over_pretraining'] = self.fraction
    return values

  def state(self) -> dict:
    """What a checkpoint keeps."""
    return {'before': self.before, 'spent': dict(self.spent)}

  @classmethod
  def from_state(cls, state: Mapping) -> 'Ledger':
    """Undoes `state`."""
    return cls(before=state['before'], spent=dict(state['spent']))
