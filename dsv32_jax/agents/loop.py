"""An episode: policy and environment in turns, until one of them ends it."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv32_jax import chat
from dsv32_jax.agents.token_sequence import TokenSequence
from dsv32_jax.agents.tools import ToolSet
from dsv32_jax.agents.types import (
  Ending,
  Environment,
  Policy,
  PolicyError,
  Query,
  Reply,
  Score,
  Step,
  ToolError,
  Trajectory,
)
from dsv32_jax.chat import Message, Mode
from dsv32_jax.chat.errors import one_line

Manage = Callable[[tuple[Message, ...]], Sequence[Message] | None]
"""Keeps a context within its window. Given the messages before a reply, it
returns those to go on with, usually the same, or None if there is no room."""

_FAILED = 'error: '
_NOT_RUN = _FAILED + 'not run, an earlier call has ended the episode'


class EpisodeError(RuntimeError):
  """An environment, tool or policy that failed in a way of its own.

  That is a fault of the program, not of the agent, so there is no trajectory;
  the exception is the `__cause__`.
  """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgets:
  """How much an episode may take.

  Attributes:
    steps: replies.
    tokens: of a sequence (one episode, if no context is made shorter), or
      without a tokenizer of all replies. No reply goes beyond it, results may.
      None for any.
    new_tokens: of one reply.
    wall_s: seconds. Looked at before each reply, and given to the policy; calls
      are not broken off, their tools have limits of their own. None for any.
  """

  steps: int = 32
  tokens: int | None = None
  new_tokens: int = 4096
  wall_s: int | float | None = None

  def __post_init__(self):
    for name in ('steps', 'tokens', 'new_tokens', 'wall_s'):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f'{name}: got {value}, expected more than 0')


def run_episode(
  policy: Policy,
  environment: Environment,
  *,
  budgets: Budgets | None = None,
  tokenizer: chat.ChatTokenizer | None = None,
  mode: Mode = 'thinking',
  seed: int = 0,
  task: str = '',
  manage: Manage | None = None,
) -> Trajectory:
  """Runs one episode; whoever made the environment closes it.

  The calls of a reply run one after another, in order. A call of an unknown
  tool, with arguments that do not fit, or that ends in a `ToolError` has the
  error as its result, and the episode goes on. A reply outside of the grammar
  and a policy that cannot reply end it with a reward of 0; whatever else ends
  it, the environment scores it.

  Args:
    policy: who replies.
    environment: at its beginning.
    budgets: `Budgets()` unless given.
    tokenizer: counts tokens and gives the trajectory its own; without one there
      are none.
    mode: of the replies.
    seed: of the episode; each reply has one made of it.
    task: id, for the trajectory.
    manage: asked before each reply, of this episode only. Messages that it
      makes shorter begin another sequence of tokens; the steps count on.

  Raises:
    EpisodeError: the environment, a tool or the policy raised what it may not.
  """
  episode = _Episode(
    policy=policy,
    environment=environment,
    budgets=budgets or Budgets(),
    tokenizer=tokenizer,
    mode=mode,
    seed=seed,
    task=task,
    manage=manage,
  )
  return episode.run()


def reply_seed(seed: int, index: int) -> int:
  """The seed of an episode's reply: 0 to 2**32 - 1."""
  digest = hashlib.blake2b(f'{seed}/{index}'.encode(), digest_size=4).digest()
  return int.from_bytes(digest, 'big')


class _Episode:
  """What changes while an episode runs."""

  def __init__(
    self,
    *,
    policy: Policy,
    environment: Environment,
    budgets: Budgets,
    tokenizer: chat.ChatTokenizer | None,
    mode: Mode,
    seed: int,
    task: str,
    manage: Manage | None,
  ):
    self._policy, self._environment = policy, environment
    self._budgets, self._tokenizer = budgets, tokenizer
    self._mode: Mode = mode
    self._seed, self._task = seed, task
    self._manage = manage
    self._began = time.monotonic()
    self._steps: list[Step] = []
    self._completions: list[Any] = []
    self._messages: list[Message] = []
    self._context: tuple[Message, ...] = ()
    self._sequence: TokenSequence | None = None
    self._tokens: list[int] = []
    self._is_policy: list[bool] = []
    self._segments: list[int] = []
    self._error = ''
    self._at = 'the environment, starting'

  def run(self) -> Trajectory:
    try:
      start = tuple(self._environment.start())
      chat.check_ready(start, mode=self._mode)
      self._messages = list(start)
      self._begin_sequence()
      ending = self._run_steps()
      self._at = 'the environment, scoring'
      score = self._score(ending)
    except Exception as error:
      raise EpisodeError(
        f'task {self._task!r}, seed {self._seed}: {self._at}, raised '
        + one_line(f'{type(error).__name__}: {error}')
      ) from error
    self._end_sequence()
    return Trajectory(
      task=self._task,
      seed=self._seed,
      mode=self._mode,
      start=start,
      steps=tuple(self._steps),
      ending=ending,
      score=score,
      tokens=tuple(self._tokens),
      is_policy=tuple(self._is_policy),
      segments=tuple(self._segments),
      completions=tuple(self._completions),
      error=self._error,
    )

  def _run_steps(self) -> Ending:
    budgets = self._budgets
    while True:
      if len(self._steps) >= budgets.steps:
        return 'steps'
      try:
        if not self._make_room():
          return 'tokens'
      except PolicyError as error:
        return self._failed(error)
      room = budgets.new_tokens
      if budgets.tokens is not None:
        room = min(room, budgets.tokens - self._num_tokens())
      if room < 1:
        return 'tokens'
      timeout_s = None
      if budgets.wall_s is not None:
        timeout_s = budgets.wall_s - self._elapsed()
        if timeout_s <= 0:
          return 'wall'
      began = time.monotonic()
      self._at = f'the policy, at reply {len(self._steps)}'
      query = Query(
        messages=tuple(self._messages),
        mode=self._mode,
        tokens=tuple(self._sequence.tokens) if self._sequence else (),
        max_new_tokens=room,
        seed=reply_seed(self._seed, len(self._steps)),
        timeout_s=timeout_s,
      )
      try:
        reply = self._policy.reply(query)
      except PolicyError as error:
        return self._failed(error)
      ending = self._take(reply, began)
      if ending is not None:
        return ending

  def _failed(self, error: PolicyError) -> Ending:
    if error.ending == 'policy_error':
      self._error = one_line(str(error))
    return error.ending

  def _make_room(self) -> bool:
    """Has the context managed; False if there is no room for a reply."""
    if self._manage is None:
      return True
    self._at = f'what manages the context, before reply {len(self._steps)}'
    before = tuple(self._messages)
    after = self._manage(before)
    if after is None:
      return False
    if tuple(after) != before:
      chat.check_ready(after, mode=self._mode)
      self._context = tuple(after)
      self._messages = list(after)
      self._end_sequence()
      self._begin_sequence()
    return True

  def _begin_sequence(self) -> None:
    if self._tokenizer is None:
      return
    if self._tokens:
      self._segments.append(len(self._tokens))
    self._sequence = TokenSequence(
      self._messages, self._tokenizer, mode=self._mode
    )

  def _end_sequence(self) -> None:
    if self._sequence is not None:
      self._tokens += self._sequence.tokens
      self._is_policy += self._sequence.is_policy

  def _take(self, reply: Reply, began: float) -> Ending | None:
    """Takes a reply in and runs its calls; says whether that ends it."""
    message = reply.message
    if message is not None and message.role != 'assistant':
      raise TypeError(
        f'reply: got a {message.role} message, expected assistant'
      )
    num_tokens = reply.num_tokens or len(reply.tokens)
    if self._sequence is not None:
      num_tokens = self._sequence.add_reply(message, reply.text, reply.tokens)
    if reply.completion is not None:
      self._completions.append(reply.completion)
    results: list[Message] = []
    num_failed = 0
    if message is not None:
      results, num_failed = self._call(message)
      self._messages += [message, *results]
      if results and self._sequence is not None:
        self._at = f'the results of reply {len(self._steps)}'
        self._sequence.add_results(message, results)
    self._steps.append(
      Step(
        reply=message,
        text=reply.text,
        results=tuple(results),
        num_failed=num_failed,
        error=reply.error,
        num_tokens=num_tokens,
        seconds=time.monotonic() - began,
        context=self._context,
      )
    )
    self._context = ()
    if message is None:
      return 'tokens' if reply.was_cut else 'parse_error'
    self._at = 'the environment, asked whether it is over'
    if self._environment.is_over:
      return 'submitted'
    return None if message.tool_calls else 'answered'

  def _call(self, message: Message) -> tuple[list[Message], int]:
    """The results of a reply's calls, in their order, and how many failed."""
    results: list[Message] = []
    num_failed = 0
    # Asked for anew: an environment may give tools in the course of it.
    self._at = 'the environment, asked for its tools'
    tools = ToolSet(self._environment.tools) if message.tool_calls else None
    for call in message.tool_calls:
      assert tools is not None
      if self._environment.is_over:
        text, failed = _NOT_RUN, True
      else:
        self._at = f'the tool {call.name!r}, at reply {len(self._steps)}'
        text, failed = _run_call(tools, call.name, call.arguments)
      num_failed += failed
      results.append(Message(role='tool', content=text, tool_call_id=call.id))
    return results, num_failed

  def _score(self, ending: Ending) -> Score:
    if ending == 'parse_error':
      return Score(reward=0.0, reasons=(f'ended by {self._steps[-1].error}',))
    if ending == 'policy_error':
      return Score(reward=0.0, reasons=('the policy failed',))
    return self._environment.score(tuple(self._messages))

  def _num_tokens(self) -> int:
    if self._sequence is not None:
      return len(self._sequence.tokens)
    return sum(step.num_tokens for step in self._steps)

  def _elapsed(self) -> float:
    return time.monotonic() - self._began


def _run_call(
  tools: ToolSet, name: str, arguments: Mapping[str, Any]
) -> tuple[str, bool]:
  """The text of a call's result, and whether it failed."""
  try:
    text, failed = tools.call(name, arguments), False
  except ToolError as error:
    text, failed = _FAILED + str(error), True
  if not isinstance(text, str):
    raise TypeError(f'the result is {type(text).__name__}, expected text')
  # Half of a UTF-16 pair, out of a file or a program, is no text to encode.
  return text.encode(errors='backslashreplace').decode(), failed
