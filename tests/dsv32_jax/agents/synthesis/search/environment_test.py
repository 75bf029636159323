import pytest

from dsv32_jax.agents.synthesis.search import (
  SearchEnvironment,
  Settings,
  library_name,
  make_tasks,
)
from dsv32_jax.agents.synthesis.search.scoring import (
  given_answer,
  is_right,
  normal,
)
from dsv32_jax.agents.types import Environment
from dsv32_jax.chat import Message, ToolCall, check_ready

SETTINGS = Settings(num_entities=300, depths=(2,), breadths=(1,))


@pytest.fixture
def task(tmp_path):
  made = make_tasks([0], seed=0, settings=SETTINGS, folder=tmp_path)
  ((_, one),) = list(made)
  return one.task


def test_episode_begins_with_the_question_and_the_tools(task, tmp_path):
  environment = SearchEnvironment(task, tmp_path / library_name(0))
  assert isinstance(environment, Environment)
  start = environment.start()
  check_ready(start, mode='thinking')
  assert [tool.name for tool in start[0].tools] == ['search', 'open', 'find']
  assert start[1].content == task.question
  assert not environment.is_over
  environment.close()


def test_reply_with_calls_or_none_at_all_earns_nothing(task, tmp_path):
  environment = SearchEnvironment(task, tmp_path / library_name(0))
  calling = Message(
    role='assistant',
    content=f'Answer: {task.answer}',
    tool_calls=(ToolCall(name='search', arguments={'query': 'x'}),),
  )
  for messages in ((), environment.start(), (calling,)):
    score = environment.score(messages)
    assert score.reward == 0.0
    assert score.reasons == ('no answer was given',)
  environment.close()


def test_library_that_is_missing_is_named(task, tmp_path):
  with pytest.raises(ValueError, match='file of world 0'):
    SearchEnvironment(task, tmp_path / 'elsewhere')


@pytest.mark.parametrize(
  ('text', 'answer'),
  [
    ('Answer: Zorl', 'Zorl'),
    ('Answer: no\nI was wrong.\nANSWER :  Zorl & Sons.\nBye', 'Zorl & Sons.'),
    ('Zorl', 'Zorl'),
    ('Answer:', ''),
    ('', ''),
  ],
)
def test_answer_is_what_follows_the_last_mark(text, answer):
  assert given_answer(text) == answer


def test_names_are_compared_without_case_and_punctuation_only():
  assert is_right('the  zorl & SONS.', 'Zorl & Sons')
  assert is_right('Silent Lamp', 'The Silent Lamp')
  assert not is_right('Zorl & Son', 'Zorl & Sons')
  assert not is_right('Zorl & Sons or Vim', 'Zorl & Sons')
  assert not is_right('', 'Zorl')
  assert normal('The') == 'the'
