import dataclasses
import random
import time

import pytest

from dsv32_jax.agents.sandbox import why_not
from dsv32_jax.chat import EOS, ParseErrorCode
from dsv32_jax.config.rewards import DomainReward, RewardConfig
from dsv32_jax.rl.problems import make
from dsv32_jax.rl.rewards import RewardModel, Sampled, scorers, tools
from dsv32_jax.rl.rewards.types import Mark
from dsv32_jax.rl.rewards.workers import Call

CHAT = make('logic', family='order').problem('train', 0)
THINKING = make('logic', family='order').problem('train', 0, 'thinking')
ANSWER = CHAT.reference['answer']


@pytest.fixture(scope='module')
def model():
  config = RewardConfig(
    default=DomainReward(
      format_weight=0.25,
      language_weight=0.5,
      length_penalty=0.75,
      length_buffer=10,
    ),
    timeout_s=60.0,
  )
  with RewardModel(config, max_new_tokens=20) as made:
    yield made


def outcome(model, problem, text, *, length=5, finish_reason='stop'):
  sample = Sampled(range(length), text, finish_reason)
  return model.score([problem], [sample])[0]


def test_total_is_the_weighted_sum_of_the_components(model):
  found = outcome(
    model, THINKING, f'so 答案 it is</think>{ANSWER}{EOS}', length=15
  )
  # Words: so, it, is, the answer of letters; two characters of another script.
  assert found.components == pytest.approx(
    {'outcome': 1.0, 'format': 1.0, 'language': 4 / 6, 'length': 0.5}
  )
  assert found.total == pytest.approx(1 + 0.25 + 0.5 * 4 / 6 - 0.75 * 0.5)
  assert found.message.content == ANSWER
  assert (found.error, found.parse_error) == (None, None)


@pytest.mark.parametrize(
  ('problem', 'text', 'code'),
  [
    (CHAT, ANSWER, ParseErrorCode.MISSING_EOS),
    (CHAT, f'{ANSWER}</think>{EOS}', ParseErrorCode.CONTROL_IN_TEXT),
    (CHAT, f'{ANSWER}{EOS}x', ParseErrorCode.TEXT_AFTER_EOS),
    (THINKING, f'{ANSWER}{EOS}', ParseErrorCode.REASONING_NOT_CLOSED),
    (THINKING, f'a</think>{ANSWER}', ParseErrorCode.MISSING_EOS),
  ],
)
def test_response_that_does_not_parse_has_no_outcome(
  model, problem, text, code
):
  found = outcome(model, problem, text, finish_reason='length')
  assert found.parse_error == code
  assert found.components['outcome'] == found.components['format'] == 0.0
  assert found.message is None
  assert found.error is None


def test_length_is_that_of_the_tokens_and_the_penalty_is_subtracted(model):
  text = f'{ANSWER}{EOS}'
  totals = [outcome(model, CHAT, text, length=n).total for n in (10, 15, 20)]
  assert totals[0] - totals[1] == pytest.approx(0.375)
  assert totals[1] - totals[2] == pytest.approx(0.375)


def test_weights_go_by_domain_and_mode():
  config = RewardConfig(
    domains={
      'logical_reasoning': DomainReward(outcome_weight=2.0),
      'logical_reasoning/thinking': DomainReward(
        outcome_weight=3.0, length_penalty=1.0, max_length=4
      ),
    }
  )
  texts = [f'{ANSWER}{EOS}', f'a</think>{ANSWER}{EOS}']
  with RewardModel(config, max_new_tokens={'logical_reasoning': 9}) as model:
    found = model.score(
      [CHAT, THINKING], [(range(5), t, 'stop') for t in texts]
    )
  assert [one.total for one in found] == [2.0, 2.0]


def test_threshold_makes_the_outcome_zero_or_one(monkeypatch):
  monkeypatch.setattr(scorers, '_SCORERS', dict(scorers._SCORERS))
  scorers.register('half', scorers.one_by_one(lambda job: 0.5))
  problem = dataclasses.replace(CHAT, scorer='half')
  for threshold, expected in ((1.0, 0.0), (0.5, 1.0), (0.0, 0.5)):
    config = RewardConfig(default=DomainReward(threshold=threshold))
    with RewardModel(config, max_new_tokens=9) as model:
      assert outcome(model, problem, f'a{EOS}').total == expected


def test_components_of_a_scorer_are_kept(monkeypatch):
  monkeypatch.setattr(scorers, '_SCORERS', dict(scorers._SCORERS))
  scorers.register(
    'rich', scorers.one_by_one(lambda job: Mark(1.0, components={'x': 0.3}))
  )
  problem = dataclasses.replace(CHAT, scorer='rich')
  with RewardModel(RewardConfig(), max_new_tokens=9) as model:
    found = outcome(model, problem, f'a{EOS}')
  assert (found.total, found.components['x']) == (1.0, 0.3)


def test_equal_answers_are_marked_once(monkeypatch):
  monkeypatch.setattr(scorers, '_SCORERS', dict(scorers._SCORERS))
  seen = []

  def score(job):
    seen.append(job.message.content)
    return float(job.message.content == 'b')

  scorers.register('counting', scorers.one_by_one(score))
  problem = dataclasses.replace(THINKING, scorer='counting')
  texts = [f'{i}</think>{"ab"[i % 2]}{EOS}' for i in range(10)]
  with RewardModel(RewardConfig(), max_new_tokens=9) as model:
    found = model.score([problem] * 10, [([1], t, 'stop') for t in texts])
  assert sorted(seen) == ['a', 'b']
  assert [one.total for one in found] == [0.0, 1.0] * 5


SLEEPY = """
import os, time

def score(answer):
  if answer == 'hang':
    time.sleep(60)
  if answer == 'die':
    os._exit(1)
  if answer == 'raise':
    raise ValueError('no')
  return 1.0
"""


def test_scorer_that_hangs_dies_or_raises_costs_its_sample_only(
  monkeypatch, tmp_path
):
  path = tmp_path / 'sleepy.py'
  path.write_text(SLEEPY)
  monkeypatch.setitem(tools.MODULES, 'sleepy', path)
  monkeypatch.setattr(scorers, '_SCORERS', dict(scorers._SCORERS))
  scorers.register(
    'sleepy',
    scorers.in_workers(
      lambda job: Call('sleepy', 'score', (job.message.content,))
    ),
  )
  problem = dataclasses.replace(CHAT, scorer='sleepy')
  answers = ['a', 'hang', 'b', 'die', 'raise', 'c']
  config = RewardConfig(timeout_s=2.0)
  with RewardModel(config, max_new_tokens=9) as model:
    found = model.score(
      [problem, problem, problem, problem, problem, problem],
      [([1], f'{answer}{EOS}', 'stop') for answer in answers],
    )
    again = model.score([problem], [([1], f'd{EOS}', 'stop')])
  assert [one.total for one in found] == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
  assert found[1].error == 'the scorer took longer than 2 s'
  assert found[3].error == 'the scorer died'
  assert found[4].error == 'ValueError: no'
  assert again[0].total == 1.0


def test_reward_does_not_depend_on_the_rest_of_the_batch(model):
  source = make('mathematics', wording='short', mode='thinking')
  rng = random.Random(0)
  problems, responses = [], []
  for index in range(20):
    problem = source.problem('train', index)
    reply = source.demonstration(problem, rng)
    content = reply.content if rng.random() < 0.5 else r'\boxed{7}'
    text = f'{reply.reasoning}</think>{content}{EOS}'
    problems.append(problem)
    responses.append(([1] * rng.randint(1, 20), text, 'stop'))
  whole = model.score(problems, responses)
  order = rng.sample(range(20), 20)
  shuffled = model.score(
    [problems[i] for i in order], [responses[i] for i in order]
  )
  assert [shuffled[order.index(i)] for i in range(20)] == whole
  parts = [
    model.score([p], [r])[0] for p, r in zip(problems, responses, strict=True)
  ]
  assert parts == whole


SOURCES = [
  ('gym/chain_sum', {'wording': 'short'}),
  ('mathematics', {}),
  ('programming', {'level': 'words'}),
]


@pytest.mark.parametrize(('name', 'options'), SOURCES)
def test_512_samples_are_scored_in_well_under_a_second(name, options):
  if name.startswith('gym/'):
    pytest.importorskip('reasoning_gym')
  source = make(name, mode='thinking', **options)
  rng = random.Random(0)
  problems = [source.problem('train', i // 16) for i in range(512)]
  texts = []
  for problem in problems:
    reply = source.demonstration(problem, rng, 'chat')
    content = rng.choice([reply.content, str(rng.randrange(1000)), 'a b c'])
    texts.append(f'Let us see what {rng.random()} is.</think>{content}{EOS}')
  responses = [(range(64), text, 'stop') for text in texts]
  with RewardModel(RewardConfig(), max_new_tokens=64) as model:
    model.score(problems[:1], responses[:1])  # Imports are done once.
    # Processor time: other tests may run beside this one.
    started = time.process_time()
    found = model.score(problems, responses)
    assert time.process_time() - started < 0.5
  assert 100 < sum(one.components['outcome'] for one in found) < 300


def test_demonstrations_of_every_domain_earn_the_whole_outcome():
  if why_not('bubblewrap') and why_not('unshare'):
    pytest.skip('no sandbox works here')
  rng = random.Random(0)
  problems, responses = [], []
  for name in (
    'logic',
    'mathematics',
    'programming',
    'question_answering',
    'writing',
  ):
    source = make(name)
    for index in range(2):
      for mode in ('chat', 'thinking'):
        problem = source.problem('held_out', index, mode)
        reply = source.demonstration(problem, rng)
        thoughts = f'{reply.reasoning}</think>' if mode == 'thinking' else ''
        problems.append(problem)
        responses.append(([1], f'{thoughts}{reply.content}{EOS}', 'stop'))
  with RewardModel(RewardConfig(), max_new_tokens=9) as model:
    found = model.score(problems, responses)
  assert [one.total for one in found] == [1.0] * len(problems)


def test_counts_that_differ_are_refused(model):
  with pytest.raises(ValueError, match='responses: got 0 for 1 problems'):
    model.score([CHAT], [])


def test_unknown_scorer_is_refused_with_the_known_ones(model):
  problem = dataclasses.replace(CHAT, scorer='psychic')
  with pytest.raises(ValueError, match=r"scorer: got 'psychic'.*'exact'"):
    outcome(model, problem, f'a{EOS}')


def test_unknown_language_is_refused_before_anything_is_scored():
  config = RewardConfig(default=DomainReward(language='xx'))
  with pytest.raises(ValueError, match="language: got 'xx'"):
    RewardModel(config, max_new_tokens=9)
