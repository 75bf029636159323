"""Decoding beyond k is training: tokens, probabilities, sets, experts.

One document of 8,200 tokens and more, prefilled in pieces into pages and
decoded, against one forward pass of a scanned model over a packed row in which
another document comes first.
"""

import dataclasses

import jax
import numpy as np
import pytest

from dsv32_jax import AttentionMode, inference
from dsv32_jax.inference import Record, Request, Sampling
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

CFG = tiny_configs.config(
  num_nextn_predict_layers=1, index_topk=64, max_position_embeddings=8448
)
BEFORE, PROMPT, NEW = 100, 8180, 40


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
  'speculative', [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
def test_decoding_past_8k_positions_is_the_packed_training_forward(speculative):
  variables = tiny_configs.variables(CFG)
  generator = np.random.default_rng(1)
  prompt = tuple(generator.integers(0, CFG.vocab_size, PROMPT).tolist())
  engine = inference.Engine(
    DeepSeekV32(CFG),
    variables,
    inference.EngineConfig(max_batch=2, page_size=64, speculative=speculative),
  )
  settings = {
    'greedy': Sampling(temperature=0.0),
    'sampled': Sampling(temperature=1.5),
  }
  tickets = [
    engine.submit(
      Request(
        prompt=prompt,
        max_new_tokens=NEW,
        sampling=setting,
        record=Record(experts=True, selected=True),
      )
    )
    for setting in settings.values()
  ]
  engine.run()
  for name, ticket in zip(settings, tickets, strict=True):
    _compare(variables, ticket.result(0), is_greedy=name == 'greedy')
  if speculative:
    assert engine.stats().accepted > 0


def _compare(variables, completion, *, is_greedy):
  generator = np.random.default_rng(2)
  before = generator.integers(0, CFG.vocab_size, BEFORE)
  row_T = np.concatenate([before, completion.prompt, completion.tokens])
  segment_T = np.repeat([1, 2], [BEFORE, PROMPT + NEW])
  cfg = dataclasses.replace(CFG, query_chunk=832)
  output = jax.device_get(
    tiny_configs.forward(cfg, AttentionMode(record=True))(
      variables,
      row_T[None].astype(np.int32),
      segment_ids_BT=segment_T[None].astype(np.int32),
    )
  )
  at = BEFORE + PROMPT - 1 + np.arange(NEW)
  logprobs_NV = np.asarray(jax.nn.log_softmax(output.logits_BTV[0, at]))
  error = np.abs(
    logprobs_NV[np.arange(NEW), completion.tokens] - completion.logprobs
  ).max()
  print(f'largest difference of a log-probability: {error:.1e}')
  assert error < 1e-5
  if is_greedy:
    np.testing.assert_array_equal(logprobs_NV.argmax(-1), completion.tokens)
  experts_NLA = output.expert_index_LBTA[:, 0, at].swapaxes(0, 1)
  np.testing.assert_array_equal(completion.experts, experts_NLA)
  np.testing.assert_array_equal(
    completion.prompt_experts,
    output.expert_index_LBTA[:, 0, BEFORE : at[0]].swapaxes(0, 1),
  )
  selected_NLK = output.selected_LBTK[:, 0, at].swapaxes(0, 1)
  ours_NLK = np.where(completion.selected < 0, -1, completion.selected + BEFORE)
  np.testing.assert_array_equal(
    np.sort(ours_NLK, axis=-1), np.sort(selected_NLK, axis=-1)
  )
