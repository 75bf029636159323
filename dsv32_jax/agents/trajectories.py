"""Trajectories as lines of JSON, and their replay.

A line is written whole or not at all; a last line that a crash has cut is
passed over by `read` and taken away by the next `append`.
"""

import dataclasses
import fcntl
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from dsv32_jax import chat
from dsv32_jax.agents.loop import Budgets, run_episode
from dsv32_jax.agents.types import (
  Environment,
  PolicyError,
  Query,
  Reply,
  Score,
  Step,
  Trajectory,
)
from dsv32_jax.chat import ParseErrorCode
from dsv32_jax.chat.errors import one_line

VERSION = 1
_BLOCK = 1 << 16
_LOCK = threading.Lock()


class ReplayError(RuntimeError):
  """A replay that differs from what was recorded; says where first."""


def append(path: str | os.PathLike, trajectories: Iterable[Trajectory]) -> None:
  """Appends to a file, from any number of threads and processes at a time.

  Args:
    path: of the file; it is made if it is not there.
    trajectories: all are there afterwards, or, where writing fails, none.

  Raises:
    OSError: the file cannot be written.
  """
  text = ''.join(_line(one) + '\n' for one in trajectories)
  # Half of a UTF-16 pair becomes what JSON writes for it.
  data = text.encode(errors='backslashreplace')
  with _LOCK, open(path, 'a+b', buffering=0) as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    end = _whole_end(file)
    file.truncate(end)
    try:
      view = memoryview(data)
      while view:
        view = view[file.write(view) :]
      os.fsync(file.fileno())
    except BaseException:
      file.truncate(end)
      raise


def read(path: str | os.PathLike) -> Iterator[Trajectory]:
  """The trajectories of a file, one at a time.

  Raises:
    OSError: it cannot be read.
    ValueError: naming a line that is no trajectory, or of another version.
  """
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      if not line.endswith(b'\n'):
        return
      try:
        yield from_json(json.loads(line))
      except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
          f'{os.fspath(path)}, line {number}: {type(error).__name__}: {error}'
        ) from error


def to_json(trajectory: Trajectory) -> dict[str, Any]:
  """A trajectory as JSON values; messages are in the OpenAI API's form."""
  one = trajectory
  return {
    'version': VERSION,
    'task': one.task,
    'seed': one.seed,
    'mode': one.mode,
    'start': _messages_out(one.start),
    'steps': [_step_out(step) for step in one.steps],
    'ending': one.ending,
    'score': {
      'reward': one.score.reward,
      'reasons': list(one.score.reasons),
      'parts': dict(one.score.parts),
    },
    'tokens': list(one.tokens),
    # Lengths of the runs, in turns: not the policy's, the policy's, ...
    'is_policy': _runs(one.is_policy),
    'segments': list(one.segments),
    'error': one.error,
  }


def from_json(value: dict[str, Any]) -> Trajectory:
  """What `to_json` was given, without what the engine recorded.

  Raises:
    ValueError: another version.
    LookupError, TypeError, ValueError: it is no trajectory.
  """
  if value['version'] != VERSION:
    raise ValueError(f'version: got {value["version"]!r}, expected {VERSION}')
  score = value['score']
  is_policy = tuple(
    index % 2 == 1
    for index, length in enumerate(value['is_policy'])
    for _ in range(length)
  )
  tokens = tuple(value['tokens'])
  if len(tokens) != len(is_policy):
    raise ValueError(
      f'is_policy: got {len(is_policy)} for {len(tokens)} tokens'
    )
  return Trajectory(
    task=value['task'],
    seed=value['seed'],
    mode=value['mode'],
    start=_messages_in(value['start']),
    steps=tuple(_step_in(step) for step in value['steps']),
    ending=value['ending'],
    score=Score(
      reward=score['reward'],
      reasons=tuple(score['reasons']),
      parts=score['parts'],
    ),
    tokens=tokens,
    is_policy=is_policy,
    segments=tuple(value['segments']),
    error=value['error'],
  )


def replay(
  trajectory: Trajectory,
  environment: Environment,
  *,
  tokenizer: chat.ChatTokenizer | None = None,
) -> Trajectory:
  """Runs the recorded replies again and compares all that comes of them.

  Args:
    trajectory: as it was recorded.
    environment: another like it, at its beginning.
    tokenizer: the same; needed if there are tokens.

  Returns:
    The new trajectory; times aside it is the recorded one.

  Raises:
    ReplayError: the first difference.
    EpisodeError: as `run_episode`.
  """
  if trajectory.tokens and tokenizer is None:
    raise ReplayError('tokenizer: got None for a trajectory that has tokens')
  recorded = _Recorded(trajectory)
  found = run_episode(
    recorded,
    environment,
    # What was used up was used up; the recorded replies are what there is.
    budgets=Budgets(steps=len(trajectory.steps) + 1),
    tokenizer=tokenizer if trajectory.tokens else None,
    mode=trajectory.mode,
    seed=trajectory.seed,
    task=trajectory.task,
    manage=recorded.manage,
  )
  _compare(trajectory, found)
  return found


class _Recorded:
  """Replies as a trajectory has them."""

  def __init__(self, trajectory: Trajectory):
    self._trajectory = trajectory
    sampled = itertools.compress(trajectory.tokens, trajectory.is_policy)
    self._tokens = [
      tuple(itertools.islice(sampled, step.num_tokens))
      for step in trajectory.steps
    ]
    self._place = 0

  def manage(
    self, messages: tuple[chat.Message, ...]
  ) -> tuple[chat.Message, ...]:
    one = self._trajectory
    if self._place == len(one.steps):
      # A budget or an error came between; the recorded replies end here.
      raise PolicyError(one.error, ending=one.ending)
    return one.steps[self._place].context or messages

  def reply(self, query: Query) -> Reply:
    del query
    one, place = self._trajectory, self._place
    step, tokens = one.steps[place], self._tokens[place]
    self._place += 1
    return Reply(
      message=step.reply,
      text=step.text,
      error=step.error,
      tokens=tokens,
      num_tokens=step.num_tokens,
      was_cut=step.reply is None and one.ending == 'tokens',
    )


def _compare(recorded: Trajectory, found: Trajectory) -> None:
  """Raises `ReplayError` at the first difference."""
  if found.start != recorded.start:
    raise ReplayError('start: the environment begins with other messages')
  pairs = itertools.zip_longest(recorded.steps, found.steps)
  for index, (before, now) in enumerate(pairs):
    if before is None or now is None:
      raise ReplayError(
        f'steps: got {len(found.steps)}, recorded were {len(recorded.steps)}'
      )
    results = itertools.zip_longest(before.results, now.results)
    for number, (old, new) in enumerate(results):
      if old != new:
        raise ReplayError(
          f'steps[{index}].results[{number}]: got {_shown(new)}, recorded was '
          f'{_shown(old)}'
        )
    if before.num_failed != now.num_failed:
      raise ReplayError(
        f'steps[{index}].num_failed: got {now.num_failed}, recorded was '
        f'{before.num_failed}'
      )
  for field in ('tokens', 'is_policy', 'segments'):
    old, new = getattr(recorded, field), getattr(found, field)
    if old != new:
      at = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
        min(len(old), len(new)),
      )
      raise ReplayError(
        f'{field}: got {len(new)}, recorded were {len(old)}; they differ from '
        f'place {at} on'
      )
  for field in ('ending', 'score'):
    old, new = getattr(recorded, field), getattr(found, field)
    if old != new:
      raise ReplayError(f'{field}: got {new!r}, recorded was {old!r}')


def _shown(message: chat.Message | None) -> str:
  return 'none' if message is None else one_line(repr(message.content))


def _line(trajectory: Trajectory) -> str:
  return json.dumps(
    to_json(trajectory), ensure_ascii=False, separators=(',', ':')
  )


def _whole_end(file: BinaryIO) -> int:
  """Where the last whole line ends."""
  end = file.seek(0, os.SEEK_END)
  while end:
    begin = max(0, end - _BLOCK)
    file.seek(begin)
    found = file.read(end - begin).rfind(b'\n')
    if found >= 0:
      return begin + found + 1
    end = begin
  return 0


def _messages_out(messages: Sequence[chat.Message]) -> list[dict[str, Any]]:
  return [chat.message_to_openai(message) for message in messages]


def _messages_in(value: Any) -> tuple[chat.Message, ...]:
  return tuple(_message_in(one) for one in value)


def _message_in(value: dict[str, Any]) -> chat.Message:
  value = dict(value)
  tools = value.pop('tools', ())
  (message,) = chat.messages_from_openai([value])
  # Not read as those of a request are: that their schemas are schemas was seen
  # when the episode ran, and seeing it takes longer than all the rest.
  return dataclasses.replace(
    message, tools=tuple(chat.ToolSpec(**tool['function']) for tool in tools)
  )


def _step_out(step: Step) -> dict[str, Any]:
  reply = None if step.reply is None else chat.message_to_openai(step.reply)
  return {
    'reply': reply,
    'text': step.text,
    'results': _messages_out(step.results),
    'num_failed': step.num_failed,
    'error': step.error,
    'num_tokens': step.num_tokens,
    'seconds': step.seconds,
    'context': _messages_out(step.context),
  }


def _step_in(value: dict[str, Any]) -> Step:
  reply, error = value['reply'], value['error']
  return Step(
    reply=None if reply is None else _message_in(reply),
    text=value['text'],
    results=_messages_in(value['results']),
    num_failed=value['num_failed'],
    error=None if error is None else ParseErrorCode(error),
    num_tokens=value['num_tokens'],
    seconds=value['seconds'],
    context=_messages_in(value['context']),
  )


def _runs(flags: Sequence[bool]) -> list[int]:
  """Lengths of the runs, the first of False; it may be empty."""
  lengths = [(flag, len(list(run))) for flag, run in itertools.groupby(flags)]
  return ([0] if flags and flags[0] else []) + [length for _, length in lengths]
