import jax
import pytest

from dsv32_jax.checkpoints import CheckpointManager
from dsv32_jax.config.problems import ProblemSourceConfig
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.rl import answers, models, problems
from tests.support import tiny_configs

ORDER = ProblemSourceConfig(
  name='logic', options={'family': 'order', 'size': 3}, weight=3.0
)
WORDS = ProblemSourceConfig(name='programming', options={'level': 'words'})


def distinct(*sources, split='train', mode='chat', count=80):
  return answers.distinct_problems(sources, split=split, mode=mode, count=count)


@pytest.mark.parametrize('split', ['train', 'held_out'])
def test_distinct_problems_differ_and_are_of_their_split(split):
  found = distinct(ORDER, split=split)
  assert len({problem.prompt for problem in found}) == 80
  for problem in found:
    assert problems.is_held_out(problem.prompt) == (split == 'held_out')


def test_distinct_problems_are_the_same_in_both_modes_and_every_time():
  chat, thinking = distinct(ORDER), distinct(ORDER, mode='thinking')
  assert [p.prompt for p in chat] == [p.prompt for p in thinking]
  assert chat == distinct(ORDER)
  # More of them begin with the same.
  assert distinct(ORDER, count=90)[:80] == chat


def test_distinct_problems_share_sources_by_weight():
  found = distinct(ORDER, WORDS, count=200)
  shares = [problem.domain for problem in found]
  assert 125 < shares.count('logical_reasoning') < 175


def test_distinct_problems_more_than_there_are_is_refused():
  few = ProblemSourceConfig(
    name='programming', options={'level': 'words', 'steps': 1, 'most': 5}
  )
  with pytest.raises(ValueError, match=r'problems: got 50 of .* at most the'):
    distinct(few, count=50)


@pytest.mark.slow
def test_hand_on_copies_parameters_and_names_them(tmp_path):
  model = tiny_configs.config()
  variables = tiny_configs.variables(model)
  with CheckpointManager(tmp_path / 'training') as checkpoints:
    state = {**variables, 'opt_state': {'mu': variables['params']}}
    checkpoints.save(7, state, {})
    checkpoints.wait()
  mark = models.hand_on(
    tmp_path / 'training', tmp_path / 'model', model, {'note': 'x'}
  )
  loaded = models.load(tmp_path / 'model', model)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: bool((a == b).all()), loaded, dict(variables))
  )
  assert models.fingerprint_of(tmp_path / 'model') == mark
  assert models.fingerprint(loaded) == mark
  moved = jax.tree.map(lambda leaf: leaf + 1, loaded)
  assert models.fingerprint(moved) != mark


@pytest.mark.slow
def test_answerer_keeps_parts_and_makes_only_those_that_are_missing(tmp_path):
  model = tiny_configs.config(vocab_size=272)
  asked = answers.Asked(
    problems=distinct(ORDER, count=5),
    samples=2,
    max_new_tokens=4,
    sampling=Sampling(),
    seed=0,
    part=2,
  )

  def record(found):
    return [[a.problem.id, a.num_tokens, a.is_correct] for a in found]

  said = []
  with answers.Answerer(
    model,
    tiny_configs.variables(model),
    ByteTokenizer(),
    RewardConfig(),
    RolloutConfig(max_batch=4, max_new_tokens=4, prefill_chunk=16, page_size=8),
    max_tokens=32,
    report=said.append,
  ) as answerer:
    whole = answerer.parts(asked, tmp_path / 'a', record, name='x')
    assert len(said) == 3
    (tmp_path / 'a' / 'part-00001.json').unlink()
    again = answerer.parts(asked, tmp_path / 'a', record, name='x')
  assert len(said) == 4
  assert again == whole
  assert [len(part) for part in whole] == [4, 4, 2]
  ids = [line[0] for part in whole for line in part]
  assert ids == [p.id for p in asked.problems for _ in range(2)]
