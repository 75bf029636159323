"""Samples of a model, drawn through the engine."""

import pytest

from dsv32_jax import inference
from dsv32_jax.agents.sandbox import SandboxPool
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.evaluation.suites import human_eval, runner, sampling
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

TOKENIZER = ByteTokenizer()


CFG = tiny_configs.config(
  vocab_size=300, scan_layers=False, max_position_embeddings=512
)


@pytest.fixture(scope='module')
def engine():
  return inference.Engine(
    DeepSeekV32(CFG),
    tiny_configs.variables(CFG),
    inference.EngineConfig(max_batch=2, max_waiting=4),
    tokenizer=TOKENIZER,
  )


def short_problems(engine, count):
  fits = [
    problem
    for problem in human_eval.problems()
    if len(problem.prompt) < engine.max_tokens - 150
  ]
  return sorted(fits, key=lambda one: len(one.prompt))[:count]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize('mode', sampling.MODES)
def test_samples_are_repeated_and_scored(engine, mode):
  problems = short_problems(engine, 3)
  assert len(problems) == 3

  def draw():
    return sampling.samples(
      engine,
      TOKENIZER,
      problems,
      mode=mode,
      per_problem=2,
      max_new_tokens=4,
      sampling=inference.Sampling(temperature=1.0),
      seed=3,
    )

  first = draw()
  assert first == draw()
  assert [(s.problem.id, s.seed) for s in first] == [
    (problem.id, index) for problem in problems for index in (0, 1)
  ]
  assert all(s.mode == mode and s.steps == 1 and s.tokens for s in first)
  assert all((s.program or '').startswith(s.problem.prompt) for s in first)
  if mode != 'thinking':  # Random weights do not come to the end of a thought.
    assert len({s.program for s in first}) > 3
  with SandboxPool(sandboxes=1) as pool:
    rows = runner.score(first, pool, weights='random')
  assert not any(row.passed for row in rows)


@pytest.mark.slow
def test_another_mode_is_refused(engine):
  with pytest.raises(ValueError, match="mode: got 'loud'"):
    sampling.samples(engine, TOKENIZER, [], mode='loud')


@pytest.mark.slow
def test_prompt_without_room_counts_as_not_passed(engine):
  longest = max(human_eval.problems(), key=lambda one: len(one.prompt))
  assert len(longest.prompt) > engine.max_tokens
  found = sampling.samples(engine, TOKENIZER, [longest], mode='completion')
  assert [(one.program, one.steps) for one in found] == [(None, 0)]
  with SandboxPool(sandboxes=1) as pool:
    (row,) = runner.score(found, pool, weights='random')
  assert (row.passed, row.status) == (False, 'no_room')


def test_hash_follows_the_weights(tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(b'one')
  one = sampling.hash_of_weights(tmp_path)
  path.write_bytes(b'two')
  assert sampling.hash_of_weights(tmp_path) != one
  assert len(one) == 16


def test_directory_without_weights_is_refused(tmp_path):
  with pytest.raises(ValueError, match='expected a sealed stage'):
    sampling.hash_of_weights(tmp_path)
