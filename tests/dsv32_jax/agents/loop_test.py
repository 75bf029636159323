import itertools
import time

import pytest

from dsv32_jax import chat
from dsv32_jax.agents.loop import (
  Budgets,
  EpisodeError,
  reply_seed,
  run_episode,
)
from dsv32_jax.agents.policies import ScriptedPolicy
from dsv32_jax.agents.tools import function_tool
from dsv32_jax.agents.trajectories import from_json, replay, to_json
from dsv32_jax.agents.types import (
  Environment,
  Policy,
  PolicyError,
  Reply,
  Score,
  Tool,
  ToolError,
)
from dsv32_jax.chat import Message, ToolCall
from dsv32_jax.data.tokenizer import ByteTokenizer


class Counter:
  """Counts up; the score is the count over 10."""

  def __init__(self):
    self.count = 0
    self.is_over = False
    self.tools = [
      function_tool(function)
      for function in (self.add, self.refuse, self.end, self.crash, self.half)
    ]

  def add(self, amount: int = 1) -> int:
    """Counts."""
    self.count += amount
    return self.count

  def refuse(self) -> str:
    """Says no."""
    raise ToolError('not today')

  def end(self) -> str:
    """Ends."""
    self.is_over = True
    return 'ended'

  def crash(self) -> str:
    """Has a fault."""
    return str({}['nothing'])

  def half(self) -> str:
    """Returns what no text is."""
    return 'a\ud800'

  def start(self):
    specs = tuple(tool.spec for tool in self.tools)
    return [
      Message(role='system', tools=specs),
      Message(role='user', content='Count.'),
    ]

  def score(self, messages):
    assert messages[1].content == 'Count.'
    return Score(reward=self.count / 10)

  def close(self):
    pass


def _says(*calls, content='', reasoning=''):
  return Message(
    role='assistant',
    content=content,
    reasoning=reasoning,
    tool_calls=tuple(
      ToolCall(name=name, arguments=arguments) for name, arguments in calls
    ),
  )


DONE = _says(content='Done.')


def _run(script, **options):
  options = {'mode': 'chat', 'tokenizer': ByteTokenizer()} | options
  return run_episode(ScriptedPolicy(script), Counter(), **options)


def test_types_are_what_the_protocols_say():
  environment = Counter()
  assert isinstance(environment, Environment)
  assert isinstance(environment.tools[0], Tool)
  assert isinstance(ScriptedPolicy([]), Policy)


def test_parallel_calls_run_in_order_and_results_follow_it():
  found = _run([_says(('add', {}), ('add', {'amount': 5}), ('add', {})), DONE])
  assert [one.content for one in found.steps[0].results] == ['1', '6', '7']
  assert (found.ending, found.score.reward) == ('answered', 0.7)
  assert found.messages[-1] == DONE


def test_what_goes_wrong_in_a_call_is_its_result_and_others_run():
  found = _run(
    [
      _says(
        ('add', {}),
        ('subtract', {}),
        ('add', {'amount': 'two'}),
        ('refuse', {}),
        ('half', {}),
        ('add', {}),
      ),
      DONE,
    ]
  )
  texts = [one.content for one in found.steps[0].results]
  assert texts == [
    '1',
    "error: no tool is called 'subtract'; there are: add, refuse, end, crash, "
    'half',
    "error: the arguments of add do not fit: amount: 'two' is not of type "
    "'integer'",
    'error: not today',
    'a\\ud800',
    '2',
  ]
  assert found.steps[0].num_failed == 3
  assert found.ending == 'answered'


def test_tool_that_ends_the_episode_ends_it_and_later_calls_do_not_run():
  found = _run([_says(('end', {}), ('add', {})), DONE])
  assert (found.ending, found.score.reward) == ('submitted', 0.0)
  assert len(found.steps) == 1
  assert found.steps[0].results[1].content.startswith('error: not run')


@pytest.mark.parametrize(
  ('text', 'code'),
  [('no end', 'missing_eos'), ('a</think>b' + chat.EOS, 'control_in_text')],
)
def test_reply_outside_the_grammar_ends_the_episode_with_reward_0(text, code):
  found = _run([_says(('add', {'amount': 3})), text])
  assert (found.ending, found.score.reward) == ('parse_error', 0.0)
  assert found.score.reasons == (f'ended by {code}',)
  assert (found.steps[1].reply, found.steps[1].text) == (None, text)
  assert len(found.messages) == 4
  # The policy wrote it, so it is there to be learnt from.
  written = text.encode()
  assert found.tokens[-len(written) :] == tuple(written)
  assert found.is_policy[-len(written) :] == (True,) * len(written)


def test_budget_of_steps_ends_the_episode_and_is_scored():
  found = _run(
    lambda _: _says(('add', {})), budgets=Budgets(steps=3), tokenizer=None
  )
  assert (found.ending, found.score.reward) == ('steps', 0.3)
  assert (len(found.steps), found.tokens) == (3, ())


def test_budget_of_tokens_bounds_every_reply_and_ends_the_episode():
  asked = []

  def reply(query):
    asked.append((len(query.tokens), query.max_new_tokens))
    return _says(('add', {}))

  budgets = Budgets(tokens=2600, new_tokens=200)
  found = _run(reply, budgets=budgets)
  assert found.ending == 'tokens'
  assert len(asked) > 1
  assert all(new == min(200, 2600 - size) for size, new in asked)
  # Without a tokenizer those that the policy counts are what there is.
  counted = Reply(message=_says(('add', {})), num_tokens=30)
  found = _run(lambda _: counted, budgets=Budgets(tokens=90), tokenizer=None)
  assert (found.ending, len(found.steps)) == ('tokens', 3)


def test_reply_that_the_limit_cut_ends_the_episode_as_out_of_tokens():
  cut = Reply(message=None, text='I thi', tokens=(73,), was_cut=True)
  found = _run([cut])
  assert (found.ending, found.score.reward) == ('tokens', 0.0)


def test_budget_of_time_ends_the_episode_and_is_told_to_the_policy():
  left = []

  def reply(query):
    left.append(query.timeout_s)
    time.sleep(0.03)
    return _says(('add', {}))

  found = _run(reply, budgets=Budgets(wall_s=0.1, steps=1000))
  assert found.ending == 'wall'
  assert 1 < len(left) < 5
  assert 0.1 >= left[0] > left[-1] > 0

  def late(query):
    raise PolicyError('late', ending='wall')

  assert _run(late).ending == 'wall'


def test_policy_that_cannot_reply_ends_the_episode_with_its_reason():
  found = _run([_says(('add', {}))])
  assert (found.ending, found.score.reward) == ('policy_error', 0.0)
  assert found.error == 'the script has 1 lines, asked was for another'
  assert len(found.steps) == 1


@pytest.mark.parametrize('steps', [0, 1])
def test_fault_of_a_program_is_raised_with_its_place(steps):
  script = [_says(('add', {}))] * steps + [_says(('crash', {}))]
  with pytest.raises(
    EpisodeError,
    match=rf"task 'a/1', seed 7: the tool 'crash', at reply {steps}, raised "
    'KeyError',
  ) as error:
    _run(script, task='a/1', seed=7)
  assert isinstance(error.value.__cause__, KeyError)


def test_sampled_tokens_stay_and_what_follows_stands_behind_eos():
  """The end token that a reply with calls may lack is not the policy's."""
  tokenizer = ByteTokenizer()
  calls = _says(('add', {}))
  user = Message(role='user')
  usual = chat.encode([user, calls], tokenizer)
  usual = usual[len(chat.encode([user], tokenizer)) : -1]
  found = _run([Reply(message=calls, tokens=tuple(usual)), DONE])
  assert found.steps[0].num_tokens == len(usual)
  assert list(found.tokens) == chat.encode(found.messages, tokenizer)
  policy = [
    token
    for token, is_policy in zip(found.tokens, found.is_policy, strict=True)
    if is_policy
  ]
  assert policy == [*usual, *b'Done.', tokenizer.eos_id]


def test_answer_without_a_thought_is_taken_in_thinking_mode():
  found = _run([_says(('add', {}), reasoning='Hm.'), DONE], mode='thinking')
  assert found.ending == 'answered'
  ids = ByteTokenizer.special_ids
  tail = [ids[chat.THINK], ids[chat.THINK_END], *b'Done.', ids[chat.EOS]]
  assert list(found.tokens[-len(tail) :]) == tail
  assert found.is_policy[-len(tail) :] == (False, *[True] * (len(tail) - 1))


def test_each_reply_has_a_seed_of_its_own():
  seeds = {reply_seed(seed, index) for seed in range(50) for index in range(50)}
  assert len(seeds) == 2500
  assert all(0 <= seed < 2**32 for seed in seeds)
  asked = []

  def reply(query):
    asked.append(query.seed)
    return _says(('add', {}))

  _run(reply, seed=3, budgets=Budgets(steps=2))
  assert asked == [reply_seed(3, 0), reply_seed(3, 1)]


def test_budget_that_allows_nothing_is_refused():
  with pytest.raises(ValueError, match='steps: got 0, expected more than 0'):
    Budgets(steps=0)


def test_context_that_is_made_shorter_begins_another_sequence():
  """Each stretch is what the encoder gives for it; the steps count on."""

  def manage(messages):
    seen.append(len(messages))
    # All calls are dropped as soon as there are two.
    return messages if len(messages) < 6 else messages[:2]

  seen = []
  found = _run(
    lambda _: _says(('add', {})), budgets=Budgets(steps=5), manage=manage
  )
  assert (found.ending, found.score.reward) == ('steps', 0.5)
  assert seen == [2, 4, 6, 4, 6]
  assert [bool(step.context) for step in found.steps] == [
    *(False, False, True, False, True)
  ]
  assert [one.content for one in found.messages[2:]] == ['', '5']
  begins = (0, *found.segments, len(found.tokens))
  stretches = [
    list(found.tokens[begin:end]) for begin, end in itertools.pairwise(begins)
  ]
  calls = [
    message for step in found.steps for message in (step.reply, *step.results)
  ]
  assert stretches == [
    chat.encode([*found.start, *calls[begin:end]], ByteTokenizer())
    for begin, end in ((0, 4), (4, 8), (8, 10))
  ]
  again = replay(found, Counter(), tokenizer=ByteTokenizer())
  assert (again.tokens, again.segments) == (found.tokens, found.segments)
  assert from_json(to_json(found)) == found


def test_context_without_room_ends_the_episode_as_out_of_tokens():
  def manage(messages):
    return messages if len(messages) < 4 else None

  found = _run(lambda _: _says(('add', {})), manage=manage)
  assert (found.ending, len(found.steps)) == ('tokens', 1)
