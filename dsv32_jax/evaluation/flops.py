"""Pairs and floating-point operations of attention, dense against sparse.

Source: spec section 1 ("Attention cost per (query, key) pair") and 3.5.
"""

import dataclasses

from dsv32_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCost:
  """Cost of one sequence through all main layers, forward.

  Attributes:
    seq_len: tokens.
    dense_pairs: (query, key) pairs a layer's dense causal attention reads.
    sparse_pairs: pairs that a layer's sparse attention reads.
    indexer_pairs: pairs that the indexer scores.
    dense_flops: attention FLOPs of all layers, MHA mode.
    sparse_flops: the same, sparse in MQA mode, the indexer included.
    indexer_flops: the indexer's share of `sparse_flops`.
  """

  seq_len: int
  dense_pairs: int
  sparse_pairs: int
  indexer_pairs: int
  dense_flops: int
  sparse_flops: int
  indexer_flops: int


def attention_cost(cfg: ModelConfig, seq_len: int) -> AttentionCost:
  """Counts causal attention over one document of `seq_len` tokens.

  One multiply-add is two FLOPs. Projections are left out: they are the same
  in both modes. Documents of at most k tokens need no indexer.

  Args:
    cfg: the architecture.
    seq_len: tokens, at least 1.

  Returns:
    Exact counts.
  """
  k = min(cfg.index_topk, seq_len)
  dense_pairs = seq_len * (seq_len + 1) // 2
  sparse_pairs = k * (k + 1) // 2 + (seq_len - k) * k
  heads = cfg.num_attention_heads
  mha = heads * (cfg.qk_head_dim + cfg.v_head_dim)
  mqa = heads * (cfg.latent_dim + cfg.kv_lora_rank)
  per_score = cfg.index_n_heads * (cfg.index_head_dim + 1)
  layers = cfg.num_hidden_layers
  indexer = 2 * layers * per_score * dense_pairs
  return AttentionCost(
    seq_len=seq_len,
    dense_pairs=dense_pairs,
    sparse_pairs=sparse_pairs,
    indexer_pairs=dense_pairs,
    dense_flops=2 * layers * mha * dense_pairs,
    sparse_flops=2 * layers * mqa * sparse_pairs + indexer,
    indexer_flops=indexer,
  )
