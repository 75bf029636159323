"""Caches in 8 bits give what a model gives that rounds before it uses.

`index_fp8` and `latent_fp8` round in the forward pass what the caches keep in
8 bits.
"""

import dataclasses

import jax
import numpy as np
import pytest

from dsv32_jax import AttentionMode, inference
from dsv32_jax.inference import Record, Request
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

# The 656-byte row is made for V3.2's widths.
CFG = tiny_configs.config(
  kv_lora_rank=512,
  qk_rope_head_dim=64,
  index_head_dim=64,
  index_hadamard=True,
  max_position_embeddings=128,
)
LENGTH, NEW = 64, 12


def _variables(cfg):
  """Of 512 latents as many small contributions as of 16 large ones."""

  def smaller(path, leaf):
    from_latents = path[-1].key in ('w_uk', 'w_uv')
    return leaf * (16 / cfg.kv_lora_rank) ** 0.5 if from_latents else leaf

  return jax.tree_util.tree_map_with_path(smaller, tiny_configs.variables(cfg))


def _compare(cfg, **formats):
  """Largest difference of a log-probability, and share of equal sets."""
  variables = _variables(cfg)
  generator = np.random.default_rng(0)
  requests = [
    Request(
      prompt=tuple(generator.integers(0, cfg.vocab_size, size).tolist()),
      max_new_tokens=NEW,
      record=Record(selected=True),
    )
    for size in (3, 17, 40)
  ]
  engine = inference.Engine(
    DeepSeekV32(cfg),
    variables,
    inference.EngineConfig(
      max_batch=4, page_size=16, prefill_chunk=16, **formats
    ),
  )
  tickets = [engine.submit(request) for request in requests]
  engine.run()
  forward = tiny_configs.forward(cfg, AttentionMode(record=True))
  errors, equal = [], []
  for completion in (ticket.result(0) for ticket in tickets):
    tokens = [*completion.prompt, *completion.tokens]
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    output = jax.device_get(forward(variables, padded))
    at = len(completion.prompt) - 1 + np.arange(NEW)
    logprobs_NV = np.asarray(jax.nn.log_softmax(output.logits_BTV[0, at]))
    own_N = logprobs_NV[np.arange(NEW), completion.tokens]
    errors.append(np.abs(own_N - completion.logprobs).max())
    theirs_NLK = output.selected_LBTK[:, 0, at].swapaxes(0, 1)
    equal.append(
      np.sort(completion.selected, axis=-1) == np.sort(theirs_NLK, axis=-1)
    )
  print(f'{formats}: largest difference {max(errors):.1e}')
  return max(errors), np.mean(equal)


@pytest.mark.slow
def test_8_bit_keys_select_as_the_forward_pass_that_rounds_them():
  cfg = dataclasses.replace(CFG, index_fp8=True)
  error, equal = _compare(cfg, index_format='fp8')
  assert error < 1e-5
  assert equal == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_8_bit_rows_give_the_probabilities_of_rounded_latents():
  """Up to the rotary part, which is bfloat16 there, and a latent that falls on
  the other side of a rounding: 2^-4 of itself.
  """
  cfg = dataclasses.replace(CFG, latent_fp8=True)
  error, equal = _compare(cfg, latent_format='fp8')
  assert error < 3e-2
  assert equal > 0.95
