"""Models that compile in seconds, and rows for them.

Compiling takes nearly all the time of a model test, so the sizes here are far
below those of `presets.tiny`, LLVM is told to optimise nothing, and compiled
functions are cached by configuration: let tests share shapes.

Letters: B batch, T tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config.model import SPARSE, AttentionMode, ModelConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import state

LENGTH = 20
"""Row length of most tests; more than three times `index_topk`."""


def config(**changes: Any) -> ModelConfig:
  """One dense and one MoE layer of width 16.

  Eight indexer heads, since fewer give tied scores at random (spec 3.5).
  """
  sizes: dict[str, Any] = {
    'vocab_size': 32,
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'first_k_dense_replace': 1,
    'num_attention_heads': 2,
    'q_lora_rank': 12,
    'kv_lora_rank': 8,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 6,
    'intermediate_size': 24,
    'moe_intermediate_size': 8,
    'n_routed_experts': 8,
    'num_experts_per_tok': 2,
    'n_shared_experts': 1,
    'n_group': 4,
    'topk_group': 2,
    'index_n_heads': 8,
    'index_head_dim': 8,
    'index_topk': 6,
    'max_position_embeddings': 64,
    'remat': 'none',
  }
  return ModelConfig(**(sizes | changes))


def jit(function: Callable, **options: Any) -> Callable:
  """`jax.jit` that compiles fast and runs slowly; the maths is the same."""
  return jax.jit(
    function, compiler_options={'xla_backend_optimization_level': 0}, **options
  )


def random_tree(tree: Any, seed: int = 0) -> Any:
  """Weights large enough that every part of a model changes its output.

  Matrices are normal(0, 1 / sqrt(fan-in)) times 1.5, norm scales near 1, biases
  near 0 but not 0: with the usual initialisers attention would be flat, and
  biases without effect.
  """
  generator = np.random.default_rng(seed)

  def draw(path: tuple, leaf: Any) -> jax.Array:
    value = generator.standard_normal(leaf.shape)
    match path[-1].key:
      case 'scale':
        value = 1 + 0.1 * value
      case 'bias' | 'e_score_correction_bias':
        value = 0.1 * value
      case 'embedding':
        pass
      case _:
        value = 1.5 * value / np.sqrt(16)
    return jnp.asarray(value, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, tree)


@functools.lru_cache
def variables(cfg: ModelConfig, seed: int = 0) -> dict:
  """Random variables of a model; do not change them in place."""
  return random_tree(state.variable_shapes(DeepSeekV32(cfg)), seed)


@functools.lru_cache
def forward(
  cfg: ModelConfig, attention: AttentionMode = SPARSE, **static: Any
) -> Callable:
  """Compiled `model.apply`: (variables, tokens_BT, **arrays) -> ModelOutput."""
  model = DeepSeekV32(cfg)

  def apply(variables, tokens_BT, **arrays):
    return model.apply(
      variables, tokens_BT, attention=attention, **static, **arrays
    )

  return jit(apply)


def rows(
  documents: Sequence[Sequence[int]],
  *,
  length: int = LENGTH,
  vocab_size: int = 32,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Rows of packed random documents, as the data pipeline yields them.

  Args:
    documents: for each row the lengths of its documents; the rest of the row is
      padding.
    length: T.
    vocab_size: tokens are drawn below it.
    seed: of the tokens.

  Returns:
    The arrays of a batch. The last token of a document has no target.
  """
  generator = np.random.default_rng(seed)
  shape = (len(documents), length)
  tokens = generator.integers(0, vocab_size, shape, dtype=np.int32)
  segment_ids = np.zeros(shape, np.int32)
  positions = np.zeros(shape, np.int32)
  loss_weight = np.zeros(shape, np.float32)
  for row, lengths in enumerate(documents):
    assert sum(lengths) <= length
    start = 0
    for number, size in enumerate(lengths, 1):
      segment_ids[row, start : start + size] = number
      positions[row, start : start + size] = np.arange(size)
      loss_weight[row, start : start + size - 1] = 1
      start += size
  tokens = np.where(segment_ids > 0, tokens, 0)
  targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  return {
    'tokens': tokens,
    'targets': np.where(loss_weight > 0, targets, 0).astype(np.int32),
    'loss_weight': loss_weight,
    'segment_ids': segment_ids,
    'positions': positions,
  }
