"""The engine against requests alone, and against a plain forward pass.

Tests share one model, one set of sizes and so few compiled programs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import AttentionMode, inference
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.inference import Record, Request, Sampling, rounds, sampling
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

CFG = tiny_configs.config(
  vocab_size=300,
  num_nextn_predict_layers=1,
  scan_layers=False,
  max_position_embeddings=128,
)
CONFIG = inference.EngineConfig(
  max_batch=4, num_pages=24, page_size=8, prefill_chunk=16, decode_steps=3
)
RECORD = Record(experts=True, kept=True, selected=True)
FULL = AttentionMode(record=True)
LOGPROB_TOLERANCE = 1e-5
# Drafting takes every path that plain decoding takes, and more.
PLAIN = [pytest.mark.slow, pytest.mark.exhaustive]
MODES = [pytest.param(False, marks=PLAIN), True]


@pytest.fixture(scope='module')
def loaded():
  return DeepSeekV32(CFG), tiny_configs.variables(CFG)


def _engine(loaded, tokenizer=None, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  return inference.Engine(*loaded, config, tokenizer=tokenizer)


def _prompt(generator, most=60):
  size = int(generator.integers(1, most))
  return tuple(generator.integers(0, CFG.vocab_size, size).tolist())


def _complete(engine, *requests):
  tickets = [engine.submit(request) for request in requests]
  engine.run()
  return [ticket.result(0) for ticket in tickets]


@functools.lru_cache
def _forward(cfg, length):
  model = DeepSeekV32(cfg)
  return tiny_configs.jit(
    lambda variables, tokens_BT: model.apply(
      variables, tokens_BT, attention=FULL
    )
  )


def _check_against_forward(cfg, variables, completion, *, speculative=False):
  """Log-probabilities, experts and selected sets of a plain forward pass."""
  length = 96
  tokens = [*completion.prompt, *completion.tokens]
  padded = np.zeros((1, length), np.int32)
  padded[0, : len(tokens)] = tokens
  output = jax.device_get(_forward(cfg, length)(variables, padded))
  first = len(completion.prompt) - 1
  at = np.arange(first, len(tokens) - 1)
  logprobs = np.asarray(jax.nn.log_softmax(output.logits_BTV[0], axis=-1))
  np.testing.assert_allclose(
    completion.logprobs,
    logprobs[at, completion.tokens],
    atol=LOGPROB_TOLERANCE,
  )
  if completion.experts is not None:
    experts_TLA = output.expert_index_LBTA[:, 0].swapaxes(0, 1)
    np.testing.assert_array_equal(completion.experts, experts_TLA[at])
    np.testing.assert_array_equal(
      completion.prompt_experts, experts_TLA[:first]
    )
  if completion.selected is not None:
    selected_TLK = output.selected_LBTK[:, 0].swapaxes(0, 1)
    ours_TLK = [*completion.prompt_selected, *completion.selected]
    theirs_TLK = selected_TLK[: len(tokens) - 1]
    for ours, theirs in zip(ours_TLK, theirs_TLK, strict=True):
      for layer, layer_theirs in zip(ours, theirs, strict=True):
        assert set(layer[layer >= 0]) == set(layer_theirs[layer_theirs >= 0])
  return output.logits_BTV[0, at]


@pytest.mark.parametrize('speculative', MODES)
def test_64_mixed_requests_with_cancellations_equal_each_alone(
  loaded, speculative
):
  generator = np.random.default_rng(3)
  requests = [
    Request(
      prompt=_prompt(generator), max_new_tokens=int(generator.integers(1, 24))
    )
    for _ in range(64)
  ]
  engine = _engine(loaded, speculative=speculative)
  tickets, waiting, cancelled = [], list(requests), set()
  while waiting or engine.step():
    for _ in range(generator.integers(0, 4)):
      if waiting:
        tickets.append(engine.submit(waiting.pop(0)))
    if tickets and generator.random() < 0.15:
      ticket = tickets[generator.integers(len(tickets))]
      if not ticket.done:
        engine.cancel(ticket)
        cancelled.add(ticket.id)
    if waiting:
      engine.step()
  stats = engine.stats()
  assert (stats.running, stats.waiting) == (0, 0)
  assert stats.free_pages == stats.total_pages == 24
  alone = _engine(loaded)
  whole = 0
  for ticket in tickets:
    ours = ticket.result(0)
    (expected,) = _complete(alone, ticket.request)
    if ours.finish_reason == 'cancelled':
      assert ticket.id in cancelled
      assert ours.tokens == expected.tokens[: len(ours.tokens)]
    else:
      assert ours.finish_reason == 'length'
      assert ours.tokens == expected.tokens
      np.testing.assert_allclose(
        ours.logprobs, expected.logprobs, atol=LOGPROB_TOLERANCE
      )
      whole += 1
  assert whole > 40
  assert len(cancelled) > 4


@pytest.mark.slow
@pytest.mark.parametrize('speculative', MODES)
def test_what_is_recorded_is_that_of_a_forward_pass(loaded, speculative):
  generator = np.random.default_rng(5)
  setting = Sampling(temperature=1.3, top_k=12, top_p=0.9, min_p=0.01)
  requests = [
    Request(
      prompt=_prompt(generator),
      max_new_tokens=20,
      sampling=setting,
      seed=index,
      record=RECORD,
      top_logprobs=4,
    )
    for index in range(5)
  ]
  engine = _engine(loaded, speculative=speculative)
  params = sampling.stack([setting])
  for completion in _complete(engine, *requests):
    logits_NV = _check_against_forward(CFG, loaded[1], completion)
    target_NV = np.asarray(
      sampling.target_logits(jnp.asarray(logits_NV)[None], params)[0]
    )
    for n, token in enumerate(completion.tokens):
      kept = np.flatnonzero(target_NV[n] > -np.inf)
      np.testing.assert_array_equal(completion.kept[n], kept)
      assert token in kept
      top = [token for token, _ in completion.top_logprobs[n]]
      np.testing.assert_array_equal(top, np.argsort(-logits_NV[n])[:4])
    np.testing.assert_allclose(
      completion.sampling_logprobs,
      jax.nn.log_softmax(target_NV)[np.arange(20), completion.tokens],
      atol=1e-4,
    )
  stats = engine.stats()
  assert stats.new_tokens == 100
  if speculative:
    # One token of each request comes from its prompt, the rest from steps.
    assert 0 < stats.accepted < stats.drafted == stats.steps
    assert stats.steps < 95


@pytest.mark.slow
def test_sampled_tokens_are_those_of_generate(loaded):
  generator = np.random.default_rng(7)
  prompts = [_prompt(generator, most=20) for _ in range(3)]
  setting = Sampling(temperature=0.8, top_k=20)
  batch = inference.generate(
    *loaded, prompts, max_new_tokens=9, sampling=setting, seeds=[4, 5, 6]
  )
  completions = _complete(
    _engine(loaded),
    *(
      Request(prompt=prompt, max_new_tokens=9, sampling=setting, seed=seed)
      for prompt, seed in zip(prompts, (4, 5, 6), strict=True)
    ),
  )
  assert [list(c.tokens) for c in completions] == batch.sequences()


def test_requests_with_settings_of_their_own_do_not_touch_each_other(loaded):
  request = Request(prompt=(1, 2, 3), max_new_tokens=8, seed=11)
  other = dataclasses.replace(
    request, sampling=Sampling(temperature=2.0, top_k=9)
  )
  engine = _engine(loaded)
  (alone,) = _complete(engine, other)
  beside = _complete(engine, request, other, request)
  assert beside[1].tokens == alone.tokens
  assert beside[0].tokens == beside[2].tokens


def _check_as_alone(loaded, requests, together):
  alone = _engine(loaded)
  for request, ours in zip(requests, together, strict=True):
    (expected,) = _complete(alone, request)
    assert ours.tokens == expected.tokens
    np.testing.assert_allclose(
      ours.logprobs, expected.logprobs, atol=LOGPROB_TOLERANCE
    )
    np.testing.assert_array_equal(ours.prompt_experts, expected.prompt_experts)
    np.testing.assert_array_equal(ours.experts, expected.experts)


def test_prompts_run_together_give_what_each_gives_alone(loaded):
  generator = np.random.default_rng(11)
  requests = [
    Request(
      prompt=_prompt(generator), max_new_tokens=5, seed=seed, record=RECORD
    )
    for seed in range(7)
  ]
  # Three at most, so calls of four rows never come and one waits its turn;
  # decode steps begin before the last ones are read.
  engine = _engine(loaded, prefill_rows=3, fill_first=True, run_ahead=True)
  together = _complete(engine, *requests)
  assert engine.stats().running == 0
  _check_as_alone(loaded, requests, together)


@pytest.mark.slow
@pytest.mark.parametrize(
  'run_ahead', [pytest.param(False, marks=pytest.mark.exhaustive), True]
)
def test_rows_become_fewer_as_requests_end(loaded, run_ahead, monkeypatch):
  generator = np.random.default_rng(13)
  lengths = [2, 24, 3, 9, 2, 17, 5]
  requests = [
    Request(
      prompt=_prompt(generator, 12), max_new_tokens=n, seed=n, record=RECORD
    )
    for n in lengths
  ]
  engine = _engine(
    loaded,
    max_batch=7,
    num_pages=35,
    fill_first=True,
    least_rows=2,
    decode_steps=2,
    run_ahead=run_ahead,
  )
  decode, widths = rounds.decode, []

  def watched(model, variables, memory, rows, *args, **more):
    widths.append(len(rows.place_B))
    return decode(model, variables, memory, rows, *args, **more)

  monkeypatch.setattr(rounds, 'decode', watched)
  together = _complete(engine, *requests)
  assert {2, 7} < set(widths) <= {2, 3, 4, 6, 7}
  assert widths[-1] == 2
  _check_as_alone(loaded, requests, together)
  assert engine.stats().steps == sum(lengths) - len(lengths)
  with pytest.raises(ValueError, match='least_rows: got 2 with speculative'):
    inference.EngineConfig(least_rows=2, speculative=True)


@pytest.mark.slow
def test_what_is_compiled_ahead_serves_every_number_of_rows(
  loaded, monkeypatch
):
  generator = np.random.default_rng(17)
  requests = [
    Request(
      prompt=_prompt(generator, 12), max_new_tokens=n, seed=n, record=RECORD
    )
    for n in (2, 3, 9, 14)
  ]
  sizes = {'max_batch': 4, 'num_pages': 20, 'decode_steps': 2, 'least_rows': 1}
  expected = _complete(_engine(loaded, **sizes), *requests)
  engine = _engine(loaded, **sizes)
  engine.compile_ahead(requests[0], threads=2)

  def not_again(**_):
    pytest.fail('decode steps were compiled ahead, and are compiled again')

  monkeypatch.setattr(rounds, 'decode', not_again)
  ticket = engine.submit(requests[0])
  with pytest.raises(RuntimeError, match='compile_ahead: called while 1'):
    engine.compile_ahead(requests[0])
  engine.cancel(ticket)
  engine.step()
  engine.release()
  found = _complete(engine, *requests)
  assert [c.tokens for c in found] == [c.tokens for c in expected]


def test_new_weights_give_what_an_engine_made_with_them_gives(loaded):
  model, variables = loaded
  changed = jax.tree.map(lambda x: x * 1.1, variables)
  request = Request(prompt=(5, 6, 7), max_new_tokens=8)
  engine = _engine(loaded)
  (before,) = _complete(engine, request)
  engine.release()
  engine.update_variables(changed)
  # What was handed over may be given away: the engine has a copy.
  expected_engine = _engine((model, jax.tree.map(jnp.copy, changed)))
  jax.tree.map(lambda x: x.delete(), changed)
  (after,) = _complete(engine, request)
  (expected,) = _complete(expected_engine, request)
  assert after.tokens == expected.tokens
  assert after.logprobs == expected.logprobs
  assert after.logprobs != before.logprobs


def test_new_weights_that_do_not_fit_are_refused(loaded):
  _, variables = loaded
  engine = _engine(loaded)
  params = variables['params']
  smaller = {**params, 'embedding': params['embedding'][:-1]}
  with pytest.raises(ValueError, match='params/embedding of shape'):
    engine.update_variables({**variables, 'params': smaller})
  missing = {name: x for name, x in params.items() if name != 'final_norm'}
  with pytest.raises(ValueError, match=r'another model.*params/final_norm'):
    engine.update_variables({**variables, 'params': missing})
  engine.submit(Request(prompt=(1,), max_new_tokens=1))
  with pytest.raises(RuntimeError, match='1 requests wait or run'):
    engine.update_variables(variables)
  with pytest.raises(RuntimeError, match='release: called while 1 requests'):
    engine.release()


def test_stop_ids_and_strings_end_a_request(loaded):
  engine = _engine(loaded, tokenizer=ByteTokenizer())
  request = Request(prompt=(9, 8, 7), max_new_tokens=12)
  (free,) = _complete(engine, request)
  assert free.finish_reason == 'length'
  stop = free.tokens[5]
  (by_id,) = _complete(engine, dataclasses.replace(request, stop_ids=(stop,)))
  assert by_id.finish_reason == 'stop'
  assert by_id.tokens == free.tokens[: free.tokens.index(stop) + 1]
  part = free.text[3:5]
  progress = []
  ticket = engine.submit(
    dataclasses.replace(request, stop_strings=('never', part)), progress.append
  )
  engine.run()
  by_text = ticket.result(0)
  assert by_text.finish_reason == 'stop'
  assert by_text.text == free.text[: free.text.index(part)]
  assert len(by_text.tokens) < 12
  assert ''.join(p.text for p in progress) == by_text.text
  assert sum((p.tokens for p in progress), ()) == by_text.tokens
  assert [p.finish_reason for p in progress][-1] == 'stop'
  assert all(p.finish_reason is None for p in progress[:-1])


def test_impossible_requests_are_refused_at_once(loaded):
  engine = _engine(loaded, max_waiting=2, max_tokens=64)
  with pytest.raises(inference.RequestTooLong, match='together 70, expected'):
    engine.submit(Request(prompt=(1,) * 60, max_new_tokens=10))
  with pytest.raises(ValueError, match='prompt: got ids from 1 to 300'):
    engine.submit(Request(prompt=(1, 300), max_new_tokens=1))
  with pytest.raises(ValueError, match='stop_strings: got some'):
    engine.submit(Request(prompt=(1,), max_new_tokens=1, stop_strings=('a',)))
  for _ in range(2):
    engine.submit(Request(prompt=(1,), max_new_tokens=1))
  with pytest.raises(inference.QueueFull, match='2 requests wait already'):
    engine.submit(Request(prompt=(1,), max_new_tokens=1))
  engine.close()
  assert engine.stats().finished == {'cancelled': 2}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'prompt': ()}, 'prompt: got no token'),
    ({'max_new_tokens': 0}, 'max_new_tokens: got 0'),
    ({'seed': -1}, 'seed: got -1'),
    ({'top_logprobs': 21}, 'top_logprobs: got 21'),
    ({'stop_strings': ('',)}, 'stop_strings: got an empty'),
  ],
)
def test_request_with_an_impossible_field_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    Request(**({'prompt': (1,), 'max_new_tokens': 1} | changes))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'max_batch': 0}, 'max_batch: got 0'),
    ({'latent_format': 'int4'}, "latent_format: got 'int4'"),
    ({'max_waiting': -1}, 'max_waiting: got -1'),
  ],
)
def test_config_with_an_impossible_field_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_engine_refuses_what_the_model_cannot_do(loaded):
  with pytest.raises(ValueError, match='expected rows of 576'):
    _engine(loaded, latent_format='fp8')
  model = DeepSeekV32(dataclasses.replace(CFG, num_nextn_predict_layers=0))
  with pytest.raises(ValueError, match='without an MTP module'):
    _engine((model, loaded[1]), speculative=True)


def test_running_ahead_changes_nothing_that_requests_get(loaded):
  """Ends of every kind, newcomers and a cancelled one, with two places."""
  generator = np.random.default_rng(5)
  requests = [
    Request(
      prompt=_prompt(generator, 12),
      max_new_tokens=int(generator.integers(1, 20)),
      sampling=Sampling(top_k=7, top_p=0.9),
      stop_ids=(1, 2, 3),
      stop_strings=(chr(97 + number),),
      seed=number,
      record=RECORD,
    )
    for number in range(12)
  ]
  found = []
  for run_ahead in (False, True):
    engine = _engine(
      loaded, tokenizer=ByteTokenizer(), max_batch=4, run_ahead=run_ahead
    )
    tickets = [engine.submit(request) for request in requests]
    doomed = engine.submit(requests[0])
    for _ in range(9):
      engine.step()
    engine.cancel(doomed)
    engine.run()
    assert doomed.done
    stats = engine.stats()
    assert stats.free_pages == stats.total_pages
    found.append([ticket.result(0) for ticket in tickets])
  for plain, ahead in zip(*found, strict=True):
    assert ahead.tokens == plain.tokens
    assert ahead.text == plain.text
    assert ahead.finish_reason == plain.finish_reason
    np.testing.assert_allclose(ahead.logprobs, plain.logprobs, atol=1e-6)
    for ours, theirs in zip(ahead.kept, plain.kept, strict=True):
      np.testing.assert_array_equal(ours, theirs)
      assert len(ours) <= 7
    np.testing.assert_array_equal(ahead.experts, plain.experts)


def test_few_pages_make_requests_wait_and_all_end(loaded):
  """Room for one of these at a time."""
  engine = _engine(loaded)
  requests = [Request(prompt=(n,) * 100, max_new_tokens=20) for n in range(4)]
  tickets = [engine.submit(request) for request in requests]
  while engine.step():
    assert engine.stats().running <= 1
  assert [t.result(0).finish_reason for t in tickets] == ['length'] * 4


def test_probabilities_that_are_not_finite_end_a_request_with_an_error(loaded):
  model, variables = loaded
  broken = jax.tree.map(jnp.asarray, variables)
  broken['params']['final_norm'] = jax.tree.map(
    lambda x: x * jnp.nan, broken['params']['final_norm']
  )
  (ended,) = _complete(
    _engine((model, broken)), Request(prompt=(1, 2), max_new_tokens=4)
  )
  assert ended.finish_reason == 'error'
  assert ended.error == 'the model gave a value that is not finite'
  assert ended.tokens == ()


def test_request_that_goes_wrong_spoils_no_other(loaded):
  """Its first tokens are NaN; its pages are used again, and beside others."""
  model, variables = loaded
  broken = jax.tree.map(jnp.asarray, variables)
  broken['params']['embedding'] = (
    broken['params']['embedding'].at[7].set(jnp.nan)
  )
  sound = Request(prompt=(1, 2, 3, 4, 5, 6, 8, 9, 10), max_new_tokens=8)
  wrong = Request(prompt=(7,) * 3 + (1,) * 60, max_new_tokens=8)
  (expected,) = _complete(_engine(loaded), sound)
  engine = _engine((model, broken))
  ended = _complete(engine, wrong, sound, wrong, sound)
  ended += _complete(engine, sound)
  assert [c.finish_reason for c in ended[::2]] == ['error', 'error', 'length']
  assert {c.tokens for c in (ended[1], ended[3], ended[4])} == {expected.tokens}


def test_thread_serves_many_threads_and_ends_with_all_told(loaded):
  engine = _engine(loaded, max_waiting=64)
  request = Request(prompt=(5, 6), max_new_tokens=6)
  with inference.EngineThread(engine) as running:
    tickets = [running.submit(request) for _ in range(10)]
    completions = [ticket.result(60) for ticket in tickets]
    assert {c.tokens for c in completions} == {completions[0].tokens}
    last = [
      running.submit(Request(prompt=(1,), max_new_tokens=100)) for _ in range(6)
    ]
  assert not running.alive
  for ticket in last:
    assert ticket.result(0).finish_reason in ('cancelled', 'length')
  with pytest.raises(RuntimeError, match='it was closed'):
    running.submit(request)


def test_thread_that_dies_tells_why_and_leaves_nobody_waiting(loaded):
  engine = _engine(loaded)
  with inference.EngineThread(engine) as running:
    # Bytes that no program takes.
    engine._variables = {'params': None}
    ticket = running.submit(Request(prompt=(1, 2), max_new_tokens=4))
    completion = ticket.result(60)
  assert completion.finish_reason == 'error'
  assert completion.error == running.error is not None
  with pytest.raises(RuntimeError, match='does not run'):
    running.submit(Request(prompt=(1, 2), max_new_tokens=4))
