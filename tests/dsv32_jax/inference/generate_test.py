"""Decoding with caches against transformers, and against itself.

The tests share shapes (two requests, capacity 32, pieces of 16 tokens), so
that the few programs behind them are compiled once.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import DENSE, SPARSE, AttentionMode, checkpoints, inference
from dsv32_jax.inference.cached import extend
from dsv32_jax.inference.sampling import Sampling

FIXTURE = pathlib.Path(__file__).parents[2] / 'fixtures' / 'hf_tiny_v32'
# Bar 3 of the parity with transformers; measured 1.6e-6.
LOGIT_TOLERANCE = 1e-5
CAPACITY = 32
CHUNK = 16

MODES = {
  'absorbed': AttentionMode(absorbed=True),
  'mha': AttentionMode(absorbed=False),
}


@pytest.fixture(scope='module')
def expected():
  return dict(np.load(FIXTURE / 'expected.npz'))


@pytest.fixture(scope='module')
def loaded():
  return inference.unroll(*checkpoints.load_hf(FIXTURE))


def _prefill(loaded, tokens_BT, *, capacity=CAPACITY, mode=SPARSE, **options):
  model, variables = loaded
  state = inference.init_state(
    model.cfg, batch=len(tokens_BT), capacity=capacity
  )
  return inference.prefill(
    model,
    variables,
    state,
    tokens_BT,
    attention=mode,
    chunk=CHUNK,
    **options,
  )


def _generate(loaded, prompts, **options):
  return inference.generate(
    *loaded, prompts, prefill_chunk=CHUNK, max_new_tokens=12, **options
  )


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('length', [1, 7, 8, 9, 24])
def test_prefill_and_decode_steps_match_transformers(
  loaded, expected, length, mode
):
  """T5 with a cache, around k = 8: prompt, then token after token."""
  model, variables = loaded
  ids_BT, logits_BTV = expected['input_ids'], expected['logits']
  mode = MODES[mode]
  logits_BV, state = _prefill(loaded, ids_BT[:, :length], mode=mode)
  worst = np.abs(logits_BV - logits_BTV[:, length - 1]).max()
  for t in range(length, CAPACITY):
    logits_BV, state = inference.decode_step(
      model, variables, state, ids_BT[:, t], attention=mode
    )
    worst = max(worst, np.abs(logits_BV - logits_BTV[:, t]).max())
  np.testing.assert_array_equal(state.length_B, [CAPACITY, CAPACITY])
  print(f'length={length}: largest error {worst:.2e}')
  assert worst < LOGIT_TOLERANCE


@pytest.mark.parametrize('mode', MODES)
def test_generate_greedy_ids_match_transformers(loaded, expected, mode):
  length = int(expected['prompt_len'])
  new = _generate(
    loaded, expected['input_ids'][:, :length].tolist(), attention=MODES[mode]
  )
  np.testing.assert_array_equal(new.tokens_BN, expected['greedy_ids'])
  np.testing.assert_array_equal(new.num_tokens_B, [12, 12])


def test_prefill_in_pieces_of_any_size_matches_transformers(loaded, expected):
  """The second piece begins where the first one ended, not at 0."""
  ids_BT, logits_BTV = expected['input_ids'], expected['logits']
  model, variables = loaded
  for cuts in ((5, 14), (1, 3, 17)):
    state = inference.init_state(model.cfg, batch=2, capacity=CAPACITY)
    begin = 0
    for end in cuts:
      logits_BV, state = inference.prefill(
        model, variables, state, ids_BT[:, begin:end], chunk=CHUNK
      )
      error = np.abs(logits_BV - logits_BTV[:, end - 1]).max()
      assert error < LOGIT_TOLERANCE
      begin = end


def test_prefill_of_different_lengths_matches_transformers(loaded, expected):
  ids_BT, logits_BTV = expected['input_ids'], expected['logits']
  lengths_B = np.array([5, 19], np.int32)
  tokens_BT = ids_BT[:, :19].copy()
  tokens_BT[0, 5:] = 99  # Padding, whatever it holds.
  logits_BV, state = _prefill(loaded, tokens_BT, lengths_B=lengths_B)
  np.testing.assert_array_equal(state.length_B, lengths_B)
  for row, length in enumerate(lengths_B):
    error = np.abs(logits_BV[row] - logits_BTV[row, length - 1]).max()
    assert error < LOGIT_TOLERANCE
  # The next token goes over the padding.
  model, variables = loaded
  next_B = ids_BT[np.arange(2), lengths_B]
  logits_BV, state = inference.decode_step(model, variables, state, next_B)
  for row, length in enumerate(lengths_B):
    error = np.abs(logits_BV[row] - logits_BTV[row, length]).max()
    assert error < LOGIT_TOLERANCE


def test_generate_does_not_depend_on_the_batch(loaded, expected):
  length = int(expected['prompt_len'])
  long, short = expected['input_ids'][0, :length], [3, 1, 4, 1, 5]
  mixed = _generate(loaded, [long.tolist(), short])
  twice = _generate(loaded, [short, [9] * length])
  np.testing.assert_array_equal(mixed.tokens_BN[0], expected['greedy_ids'][0])
  np.testing.assert_array_equal(mixed.tokens_BN[1], twice.tokens_BN[0])


def test_generate_logprobs_are_those_of_a_forward_pass(loaded, expected):
  length = int(expected['prompt_len'])
  prompts_BT = expected['input_ids'][:, :length]
  new = _generate(loaded, prompts_BT.tolist())
  whole_BT = np.concatenate([prompts_BT, new.tokens_BN], axis=1)
  model, variables = checkpoints.load_hf(FIXTURE)
  logits_BTV = jax.jit(lambda v, x: model.apply(v, x).logits_BTV)(
    variables, whole_BT
  )
  logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, length - 1 : -1], axis=-1)
  expected_BN = np.take_along_axis(
    np.asarray(logprobs_BTV), new.tokens_BN[..., None], axis=-1
  )[..., 0]
  np.testing.assert_allclose(new.logprobs_BN, expected_BN, atol=LOGIT_TOLERANCE)
  np.testing.assert_array_equal(new.sampling_logprobs_BN, 0)


def test_generate_stops_a_request_after_its_end_token(loaded, expected):
  length = int(expected['prompt_len'])
  greedy_BN = expected['greedy_ids']
  # One request ends with its 5th token; the other one goes on.
  eos = int(greedy_BN[0, 4])
  assert eos not in greedy_BN[0, :4]
  assert eos not in greedy_BN[1]
  new = _generate(loaded, expected['input_ids'][:, :length].tolist(), eos=[eos])
  np.testing.assert_array_equal(new.num_tokens_B, [5, 12])
  assert new.sequences() == [
    greedy_BN[0, :5].tolist(),
    greedy_BN[1].tolist(),
  ]
  np.testing.assert_array_equal(new.tokens_BN[0, 5:], eos)
  np.testing.assert_array_equal(new.logprobs_BN[0, 5:], 0)
  assert (new.logprobs_BN[0, :5] < 0).all()
  # Both requests are the one that ends: decoding itself stops.
  prompt = expected['input_ids'][0, :length].tolist()
  new = _generate(loaded, [prompt, prompt], eos=[eos])
  np.testing.assert_array_equal(new.num_tokens_B, [5, 5])
  np.testing.assert_array_equal(new.tokens_BN[:, 5:], eos)


@pytest.mark.slow
def test_generate_draws_follow_each_request_and_its_seed(loaded):
  sampling = Sampling(temperature=1.0, top_k=40)
  a, b = [5, 6, 7], [8, 9, 10, 11]
  first = _generate(loaded, [a, b], seeds=[7, 9], sampling=sampling)
  swapped = _generate(loaded, [b, a], seeds=[9, 7], sampling=sampling)
  other = _generate(loaded, [a, b], seeds=[8, 9], sampling=sampling)
  np.testing.assert_array_equal(first.tokens_BN, swapped.tokens_BN[::-1])
  np.testing.assert_array_equal(first.tokens_BN[1], other.tokens_BN[1])
  assert (first.tokens_BN[0] != other.tokens_BN[0]).any()
  # Truncation can only raise the probability of what it kept.
  assert (first.sampling_logprobs_BN >= first.logprobs_BN).all()


def test_generate_dense_differs_from_sparse_beyond_k(loaded, expected):
  length = int(expected['prompt_len'])
  dense, _ = _prefill(loaded, expected['input_ids'][:, :length], mode=DENSE)
  error = np.abs(dense - expected['logits'][:, length - 1]).max()
  assert error > 0.1
  short, _ = _prefill(loaded, expected['input_ids'][:, :8], mode=DENSE)
  assert np.abs(short - expected['logits'][:, 7]).max() < LOGIT_TOLERANCE


def test_decode_step_updates_the_caches_in_place(loaded, expected):
  """The old state is given up, and no cache is copied on the way."""
  model, variables = loaded
  _, state = _prefill(loaded, expected['input_ids'][:, :9])
  tokens_B = np.array([1, 2], np.int32)
  _, longer = inference.decode_step(model, variables, state, tokens_B)
  assert state.caches[0].latent_AOX.is_deleted()
  with pytest.raises(RuntimeError, match='deleted'):
    np.asarray(state.caches[1].k_index_AOI)
  compiled = extend.lower(
    model,
    variables,
    longer,
    tokens_B[:, None],
    np.ones((2,), np.int32),
    attention=MODES['absorbed'],
  ).compile()
  cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(longer.caches))
  assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
  copies = re.findall(
    rf'= f32\[2,{CAPACITY},(?:16|24)\]\S* copy\(', compiled.as_text()
  )
  assert not copies


def test_decode_step_reads_the_prefix_from_the_caches_only(loaded, expected):
  """A step gets one token: with wiped caches it can't know the prefix."""
  model, variables = loaded
  ids_BT = expected['input_ids']
  _, state = _prefill(loaded, ids_BT[:, :20])
  wiped = inference.DecodeState(
    caches=jax.tree.map(jnp.zeros_like, state.caches),
    length_B=jnp.array(state.length_B),
  )
  kept, _ = inference.decode_step(model, variables, state, ids_BT[:, 20])
  lost, _ = inference.decode_step(model, variables, wiped, ids_BT[:, 20])
  assert np.abs(kept - expected['logits'][:, 20]).max() < LOGIT_TOLERANCE
  assert np.abs(lost - kept).max() > 0.1


def test_decode_step_past_the_capacity_gives_nan(loaded, expected):
  model, variables = loaded
  tokens_BT = np.tile(expected['input_ids'][:, :8], (1, 4))
  _, state = _prefill(loaded, tokens_BT)
  assert state.capacity == int(state.length_B[0]) == CAPACITY
  logits_BV, _ = inference.decode_step(
    model, variables, state, np.array([1, 2], np.int32)
  )
  assert np.isnan(logits_BV).all()


def test_prefill_past_the_capacity_is_refused(loaded, expected):
  ids_BT = expected['input_ids']
  with pytest.raises(ValueError, match=r'capacity: got 32, expected .* 33'):
    _prefill(loaded, ids_BT[:, :33])
  with pytest.raises(ValueError, match='lengths_B'):
    _prefill(loaded, ids_BT[:, :4], lengths_B=np.array([0, 4], np.int32))


@pytest.mark.parametrize(
  ('prompts', 'options', 'message'),
  [
    ([], {}, 'prompts: got none'),
    ([[1], []], {}, r'prompts\[1\]: got no token'),
    ([[1, 128]], {}, r'prompts\[0\]: got ids from 1 to 128, expected 0 to 127'),
    ([[-1]], {}, 'got ids from -1'),
    ([[1] * 150], {}, 'max_position_embeddings 160'),
    ([[1], [2]], {'seeds': [1]}, 'seeds: got 1, expected one a prompt'),
  ],
)
def test_generate_impossible_requests_are_refused(
  loaded, prompts, options, message
):
  with pytest.raises(ValueError, match=message):
    _generate(loaded, prompts, **options)


def test_unroll_gives_the_tree_of_an_unrolled_model(loaded):
  model, variables = loaded
  assert not model.cfg.scan_layers
  direct = checkpoints.load_hf(FIXTURE, scan_layers=False)[1]
  assert jax.tree.structure(variables) == jax.tree.structure(direct)
  jax.tree.map(np.testing.assert_array_equal, variables, direct)
  again, same = inference.unroll(model, variables)
  assert again is model
  assert jax.tree.leaves(same)[0] is jax.tree.leaves(variables)[0]


def test_prefill_of_a_scanned_model_is_refused():
  model, variables = checkpoints.load_hf(FIXTURE)
  with pytest.raises(ValueError, match='scan_layers'):
    _prefill((model, variables), np.zeros((2, 4), np.int32))
