import itertools

import pytest

from dsv32_jax.chat import Message
from dsv32_jax.rl import problems, rejection_sampling
from dsv32_jax.rl.problems import Problem
from dsv32_jax.rl.rejection_sampling import Answer

NUMBERS = itertools.count()


def problem(*, held_out: bool = False, mode: str = 'chat') -> Problem:
  """A problem whose prompt is on the wanted side of the split."""
  prompt = next(
    text
    for number in NUMBERS
    if problems.is_held_out(text := f'{number}?') == held_out
  )
  return Problem(
    id=f'test/{prompt}/{mode}',
    domain='mathematics',
    mode=mode,
    messages=(Message(role='user', content=prompt),),
  )


def answer(asked: Problem, text: str, *, tokens: int = 3, right: bool = True):
  message = Message(role='assistant', content=text)
  return Answer(
    problem=asked, message=message, num_tokens=tokens, is_correct=right
  )


def texts(selected) -> list[str]:
  return [kept.message.content for kept in selected.answers]


def test_select_keeps_the_shortest_right_answers_up_to_the_cap():
  asked = problem()
  found = [
    answer(asked, 'long', tokens=9),
    answer(asked, 'wrong', tokens=1, right=False),
    answer(asked, 'short', tokens=2),
    answer(asked, 'middle', tokens=4),
  ]
  one = rejection_sampling.select(found, keep_per_prompt=1)
  two = rejection_sampling.select(found, keep_per_prompt=2)
  assert texts(one) == ['short']
  assert texts(two) == ['short', 'middle']
  assert two.counts == {
    'sampled': 4,
    'unparsed': 0,
    'wrong': 1,
    'repeated': 0,
    'over_cap': 1,
    'kept': 2,
    'prompts': 1,
    'prompts_solved': 1,
  }


def test_select_takes_equal_answers_of_a_prompt_once():
  asked = problem()
  again = problem()
  found = [answer(asked, 'same'), answer(asked, 'same'), answer(again, 'same')]
  selected = rejection_sampling.select(found, keep_per_prompt=3)
  assert texts(selected) == ['same', 'same']
  assert selected.counts['repeated'] == 1
  assert selected.counts['prompts'] == 2


def test_select_two_problems_with_one_prompt_share_its_cap():
  asked = problem()
  twin = Problem(
    id='another', domain='mathematics', mode='chat', messages=asked.messages
  )
  found = [answer(asked, 'a', tokens=5), answer(twin, 'b', tokens=4)]
  selected = rejection_sampling.select(found, keep_per_prompt=1)
  assert texts(selected) == ['b']
  assert selected.counts['prompts'] == 1


def test_select_counts_what_does_not_parse_and_prompts_without_an_answer():
  solved, unsolved = problem(), problem()
  broken = Answer(
    problem=unsolved, message=None, num_tokens=8, is_correct=False
  )
  found = [answer(solved, 'yes'), broken, answer(unsolved, 'no', right=False)]
  counts = rejection_sampling.select(found, keep_per_prompt=1).counts
  assert counts['unparsed'] == 1
  assert counts['wrong'] == 1
  assert counts['prompts'] == 2
  assert counts['prompts_solved'] == 1
  assert rejection_sampling.total([counts, counts])['kept'] == 2


def test_select_held_out_prompt_is_refused():
  found = [answer(problem(held_out=True), 'x')]
  with pytest.raises(ValueError, match='whose prompt is held out'):
    rejection_sampling.select(found, keep_per_prompt=1)


def test_conversation_carries_mode_and_tags_and_can_be_written():
  asked = problem(mode='thinking')
  reply = Message(role='assistant', content='4', reasoning='2+2')
  kept = Answer(problem=asked, message=reply, num_tokens=7, is_correct=True)
  made = rejection_sampling.conversation(
    kept, specialist='mathematics-thinking'
  )
  assert made.mode == 'thinking'
  assert made.messages == (*asked.messages, reply)
  assert made.tags == {
    'domain': 'mathematics',
    'problem': asked.id,
    'num_tokens': 7,
    'specialist': 'mathematics-thinking',
  }
  assert type(made).from_json(made.to_json()) == made
