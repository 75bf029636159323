import pathlib
import subprocess
import sys

import pytest

from dsv32_jax.agents import context
from dsv32_jax.agents.types import (
  PolicyError,
  Reply,
  Score,
  Step,
  Trajectory,
)
from dsv32_jax.chat import Message, ParseErrorCode, ToolCall, render

ROOT = pathlib.Path(__file__).parents[4]

SYSTEM = Message(role='system', content='S')
QUESTION = Message(role='user', content='Q')


def group(number: int, *, num_calls: int = 1) -> list[Message]:
  calls = tuple(
    ToolCall(name='search', arguments={'query': f'{number}/{index}'})
    for index in range(num_calls)
  )
  return [
    Message(role='assistant', reasoning=f'R{number}', tool_calls=calls),
    *(Message(role='tool', content=f'result {number}') for _ in calls),
  ]


def episode(num_groups: int) -> tuple[Message, ...]:
  messages = [SYSTEM, QUESTION]
  for number in range(num_groups):
    messages += group(number, num_calls=1 + number % 2)
  return tuple(messages)


def num_messages(messages) -> int:
  return len(messages)


WIDE = context.Budget(window=10_000)


def check_histories(num_histories: int) -> None:
  # In a process of its own, without the checks of types at every call.
  command = [
    sys.executable,
    '-m',
    'tests.support.histories',
    str(num_histories),
    '1',
  ]
  out = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert out.returncode == 0, out.stderr
  words = out.stdout.split()
  assert words[:2] == [str(num_histories), 'histories,']
  assert int(words[2]) > 5 * num_histories


def test_generated_histories_stay_valid_and_get_shorter():
  check_histories(300)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_ten_thousand_generated_histories_stay_valid_and_get_shorter():
  check_histories(10_000)


def test_discard_75_keeps_the_last_quarter_of_the_groups():
  messages = episode(8)
  after = context.DISCARD_75.on_overflow(
    messages, budget=WIDE, count=num_messages
  )
  assert after == (SYSTEM, QUESTION, *group(6), *group(7, num_calls=2))


@pytest.mark.parametrize(
  ('num_groups', 'kept'), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (100, 25)]
)
def test_discard_75_rounds_the_share_down_and_drops_at_least_one(
  num_groups, kept
):
  after = context.DISCARD_75.on_overflow(
    episode(num_groups), budget=WIDE, count=num_messages
  )
  assert sum(bool(message.tool_calls) for message in after) == kept


def test_discard_75_drops_more_where_the_last_quarter_is_too_long():
  after = context.DISCARD_75.on_overflow(
    episode(100), budget=context.Budget(window=40), count=num_messages
  )
  assert 15 <= len(after) <= 20


def test_discard_all_leaves_system_and_question_only():
  after = context.DISCARD_ALL.on_overflow(
    episode(5), budget=WIDE, count=num_messages
  )
  assert after == (SYSTEM, QUESTION)


def test_answers_of_earlier_turns_stay():
  answer = Message(role='assistant', content='A')
  later = Message(role='user', content='Q2')
  messages = (*episode(2), answer, later, *group(9))
  after = context.DISCARD_ALL.on_overflow(
    messages, budget=WIDE, count=num_messages
  )
  assert after == (SYSTEM, QUESTION, answer, later)


def test_history_without_calls_is_left_as_it_is():
  messages = (SYSTEM, QUESTION)
  summary = context.Summary(summarise=lambda *_: pytest.fail('was asked'))
  for strategy in (context.DISCARD_75, context.DISCARD_ALL, summary):
    assert (
      strategy.on_overflow(messages, budget=WIDE, count=num_messages)
      == messages
    )


def characters(messages) -> int:
  return len(render(messages, mode='thinking'))


def test_summary_stands_in_the_question_in_place_of_an_earlier_one():
  texts = iter(['first', 'second'])
  summary = context.Summary(summarise=lambda *_: next(texts), max_tokens=500)
  once = summary.on_overflow(episode(8), budget=WIDE, count=characters)
  assert [message.role for message in once] == ['system', 'user']
  assert once[1].content == (
    'Q' + context.SUMMARY_BEGIN + 'first' + context.SUMMARY_END
  )
  twice = summary.on_overflow(
    (*once, *episode(8)[2:]), budget=WIDE, count=characters
  )
  assert twice[1].content == (
    'Q' + context.SUMMARY_BEGIN + 'second' + context.SUMMARY_END
  )


def test_summary_that_is_too_long_is_cut():
  summary = context.Summary(summarise=lambda *_: 'word ' * 900, max_tokens=300)
  after = summary.on_overflow(episode(30), budget=WIDE, count=characters)
  bare = characters((SYSTEM, QUESTION))
  assert 280 < characters(after) - bare <= 300
  assert after[1].content.endswith(context.SUMMARY_END)


def test_summary_by_a_policy_reads_the_history_and_writes_within_its_budget():
  asked = []

  class Writer:
    def reply(self, query):
      asked.append(query)
      message = Message(role='assistant', content='It is the third.')
      return Reply(message=message)

  summary = context.Summary(
    summarise=context.summarise_with(Writer(), seed=7), max_tokens=400
  )
  messages = episode(8)
  after = summary.on_overflow(messages, budget=WIDE, count=characters)
  assert 'It is the third.' in after[1].content
  assert asked[0].messages[:-1] == messages
  assert asked[0].messages[-1].role == 'user'
  assert (asked[0].max_new_tokens, asked[0].seed) == (400, 7)


def test_summary_by_a_policy_whose_reply_does_not_parse_is_an_error():
  class Broken:
    def reply(self, query):
      return Reply(
        message=None, text='</think>', error=ParseErrorCode.REASONING_NOT_CLOSED
      )

  summary = context.Summary(summarise=context.summarise_with(Broken()))
  with pytest.raises(PolicyError, match='did not parse'):
    summary.on_overflow(episode(8), budget=WIDE, count=characters)


def test_room_is_made_beyond_the_trigger_and_not_before():
  budget = context.Budget(window=10, max_resets=2)
  room = context.make_room(
    episode(3)[:8],
    strategy=context.DISCARD_ALL,
    budget=budget,
    count=num_messages,
  )
  assert (len(room.messages), room.resets, room.is_full) == (8, 0, False)
  room = context.make_room(
    episode(3), strategy=context.DISCARD_ALL, budget=budget, count=num_messages
  )
  assert (len(room.messages), room.resets, room.is_full) == (2, 1, False)
  room = context.make_room(
    episode(3),
    strategy=context.DISCARD_ALL,
    budget=budget,
    count=num_messages,
    resets=2,
  )
  assert (len(room.messages), room.resets, room.is_full) == (9, 2, True)


def test_room_without_a_strategy_ends_with_the_window():
  for window, is_full in ((10, False), (9, True)):
    room = context.make_room(
      episode(3),
      strategy=None,
      budget=context.Budget(window=window),
      count=num_messages,
    )
    assert room.is_full is is_full


def test_room_is_full_where_the_question_alone_is_too_long():
  room = context.make_room(
    episode(1),
    strategy=context.DISCARD_ALL,
    budget=context.Budget(window=2),
    count=num_messages,
  )
  assert room.is_full
  assert room.resets == 1


def run_of(num_steps: int, ending) -> Trajectory:
  return Trajectory(
    task='t',
    seed=0,
    mode='chat',
    start=(QUESTION,),
    steps=(Step(reply=None, num_tokens=10),) * num_steps,
    ending=ending,
    score=Score(reward=0.0),
  )


def test_fewest_steps_takes_the_shortest_answered_run_and_counts_all():
  runs = [run_of(9, 'answered'), run_of(4, 'submitted'), run_of(2, 'tokens')]
  choice = context.fewest_steps(runs)
  assert choice.trajectory is runs[1]
  assert (choice.num_steps, choice.num_tokens) == (15, 150)


def test_fewest_steps_of_runs_that_all_failed_is_the_shortest():
  runs = [run_of(9, 'steps'), run_of(4, 'wall')]
  assert context.fewest_steps(runs).trajectory is runs[1]
  with pytest.raises(ValueError, match='expected at least one'):
    context.fewest_steps([])


@pytest.mark.parametrize(
  ('field', 'values'),
  [
    ('window', {'window': 0}),
    ('target', {'window': 9, 'target': 0.9}),
    ('trigger', {'window': 9, 'trigger': 1.2}),
    ('max_resets', {'window': 9, 'max_resets': -1}),
  ],
)
def test_budget_that_makes_no_sense_is_refused(field, values):
  with pytest.raises(ValueError, match=field):
    context.Budget(**values)
