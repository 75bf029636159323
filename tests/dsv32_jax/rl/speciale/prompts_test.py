import pytest

from dsv32_jax.rl.speciale.derivations import Task
from dsv32_jax.rl.speciale.policy import Reply
from dsv32_jax.rl.speciale.prompts import (
  DerivationDialogue,
  parse_meta,
  split_attempt,
)
from dsv32_jax.rl.speciale.rules import RULES

TASK = Task(kind='compute', start='2+3')
SHORT, LONG = DerivationDialogue(), DerivationDialogue(explains=True)


def test_short_prompts_are_these():
  def text(messages):
    (message,) = messages
    assert message.role == 'user'
    return message.content

  assert text(SHORT.ask_proof(TASK)) == 'Compute 2+3.'
  assert text(SHORT.ask_review(TASK, 'P')) == 'Check: Compute 2+3.\nP'
  assert text(SHORT.ask_refinement(TASK, 'P', 'A')) == (
    'Mend: Compute 2+3.\nP\nA'
  )
  assert text(SHORT.ask_meta(TASK, 'P', 'A')) == 'Judge: Compute 2+3.\nP\nA'


def test_explained_prompts_end_with_the_short_ones_and_name_every_rule():
  for ask, arguments in (
    ('ask_proof', (TASK,)),
    ('ask_review', (TASK, 'P')),
    ('ask_refinement', (TASK, 'P', 'A')),
    ('ask_meta', (TASK, 'P', 'A')),
  ):
    short = getattr(SHORT, ask)(*arguments)[0].content
    long = getattr(LONG, ask)(*arguments)[0].content
    assert long.endswith(f'\n\n{short}')
    if ask != 'ask_meta':
      assert all(f'\n{name}: ' in long for name in RULES)


def test_attempt_is_split_where_the_analysis_begins():
  assert split_attempt('1. 5 (add)\nscore: 1') == ('1. 5 (add)', 'score: 1')
  assert split_attempt('1. 5 (add)\nstep 1: value\nscore: 0') == (
    '1. 5 (add)',
    'step 1: value\nscore: 0',
  )
  assert split_attempt('1. 5 (add)') == ('1. 5 (add)', '')
  assert split_attempt('score: 1') == ('', 'score: 1')
  # Neither word begins an analysis inside a line.
  assert split_attempt('1. step (add)')[1] == ''


@pytest.mark.parametrize(
  'reply',
  [
    Reply(content='1. 5 (add)'),
    Reply(content='score: 1'),
    Reply(content='1. 5 (add)\nscore: 2'),
    Reply(content='1. 5 (add)\nscore: 1\nwell'),
    Reply(content='1. 5 (add)\nscore: 1', is_finished=False),
    Reply(content=''),
  ],
)
def test_attempt_without_both_parts_or_cut_off_is_not_read(reply):
  assert SHORT.read_attempt(reply) is None


def test_replies_are_read_as_they_were_written():
  attempt = SHORT.read_attempt(
    Reply(content='1. 6 (add)\nstep 1: value\nscore: 0\n')
  )
  assert attempt.proof == '1. 6 (add)'
  assert attempt.analysis == 'step 1: value\nscore: 0'
  assert attempt.score == 0
  review = SHORT.read_review(Reply(content='step 1: rule\nscore: 0.5'))
  assert review.score == 0.5
  assert SHORT.read_review(Reply(content='score: 1', is_finished=False)) is None
  assert SHORT.read_review(Reply(content='1. 6 (add)\nscore: 1')) is None
  assert SHORT.read_meta(Reply(content='quality: 0.5\n')) == 0.5
  assert SHORT.read_meta(Reply(content='quality: 1', is_finished=False)) is None


@pytest.mark.parametrize('text', ['', 'quality', 'quality: 2', 'score: 1'])
def test_quality_that_is_none_is_not_read(text):
  assert parse_meta(text) is None
