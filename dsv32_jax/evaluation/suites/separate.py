"""Calls an answer in a process of its own; runs inside the sandbox.

Two processes: the answer's, which is given arguments and returns values, and
this one, which has the tests. The answer's is forked before this one has read
them, and this one cannot be traced and its files not opened, so that what an
answer should return is nowhere in its reach. Values cross as JSON; comparisons
happen here.

It imports nothing of this project: the suite sends its text into the sandbox.
"""

import ctypes
import json
import os
import random
import sys
from typing import Any, TextIO

_PR_SET_DUMPABLE = 4


class EndedError(Exception):
  """The answer's process did not return a value."""


class Strange:
  """Stands for a value that cannot cross; equal to nothing."""

  def __init__(self, kind: str):
    self.kind = kind

  def __repr__(self) -> str:
    return f'<{self.kind}>'


def pack(value: Any) -> Any:
  """A value as JSON; subclasses become what they are subclasses of."""
  if value is None or isinstance(value, bool):
    return value
  for kind in (int, float, str):
    if isinstance(value, kind):
      return kind(value)
  for kind in (list, tuple, set, frozenset):
    if isinstance(value, kind):
      return {kind.__name__: [pack(one) for one in value]}
  if isinstance(value, dict):
    return {'dict': [[pack(k), pack(v)] for k, v in value.items()]}
  return {'strange': str(type(value).__name__)}


def unpack(value: Any) -> Any:
  """The value behind `pack`."""
  if not isinstance(value, dict):
    return value
  ((kind, inner),) = value.items()
  if kind == 'dict':
    return {unpack(k): unpack(v) for k, v in inner}
  if kind == 'strange':
    return Strange(inner)
  made = {'list': list, 'tuple': tuple, 'set': set, 'frozenset': frozenset}
  return made[kind](unpack(one) for one in inner)


def answer_calls(source: str, name: str, calls: TextIO, values: TextIO) -> None:
  """The answer's process: runs it, then calls its function as told."""
  names: dict[str, Any] = {'__name__': 'answer'}
  exec(compile(source, 'answer.py', 'exec'), names)
  for line in calls:
    try:
      value = names[name](*[unpack(one) for one in json.loads(line)])
      reply = {'value': pack(value)}
    except Exception as error:
      reply = {'error': f'{type(error).__name__}: {error}'}
    values.write(json.dumps(reply) + '\n')
    values.flush()


def main() -> None:
  """Reads the answer from its file, then the tests from standard input."""
  ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
  with open('answer.json', encoding='utf-8') as file:
    answer = json.load(file)
  calls_in, calls_out = os.pipe()
  values_in, values_out = os.pipe()
  if os.fork() == 0:
    code = 1
    try:
      os.close(calls_out)
      os.close(values_in)
      null = os.open(os.devnull, os.O_RDWR)
      for fd in (0, 1):
        os.dup2(null, fd)
      with os.fdopen(calls_in) as calls, os.fdopen(values_out, 'w') as values:
        answer_calls(answer['source'], answer['name'], calls, values)
      code = 0
    except BaseException as error:
      os.write(2, f'{type(error).__name__}: {error}\n'.encode())
    finally:
      os._exit(code)
  os.close(calls_in)
  os.close(values_out)
  calls, values = os.fdopen(calls_out, 'w'), os.fdopen(values_in)
  told = json.load(sys.stdin)
  log: list[list[Any]] = []

  def candidate(*arguments: Any) -> Any:
    sent = [pack(one) for one in arguments]
    try:
      calls.write(json.dumps(sent) + '\n')
      calls.flush()
      line = values.readline()
    except BrokenPipeError:
      line = ''
    if not line:
      raise EndedError('its process has ended')
    reply = json.loads(line)
    log.append([sent, reply])
    if 'error' in reply:
      raise RuntimeError(reply['error'])
    return unpack(reply['value'])

  verdict: dict[str, Any] = {'passed': False, 'error': '', 'has_ended': False}
  try:
    names: dict[str, Any] = {'__name__': 'tests'}
    # Tests may use what the prompt defines beside the function.
    exec(compile(told['prompt'], 'prompt.py', 'exec'), names)
    exec(compile(told['test'], 'test.py', 'exec'), names)
    names[answer['name']] = candidate
    random.seed(told['seed'])  # Some tests draw their inputs.
    names['check'](candidate)
    verdict['passed'] = True
  except Exception as problem:
    verdict['error'] = f'{type(problem).__name__}: {problem}'[:300]
    verdict['has_ended'] = isinstance(problem, EndedError)
  if told['log']:
    verdict['log'] = log
  sys.stdout.write(json.dumps(verdict))


if __name__ == '__main__':
  main()
