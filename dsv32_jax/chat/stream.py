"""Reads a completion piece by piece, as it is generated.

The grammar is written as generators that yield where they need more text, so it
reads from top to bottom, and no cut of the text makes a difference.
"""

import json
from collections.abc import Sequence
from typing import Any

from dsv32_jax.chat import events, markup
from dsv32_jax.chat.errors import ChatError, ParseError
from dsv32_jax.chat.errors import ParseErrorCode as Code
from dsv32_jax.chat.reading import PieceReader, Reading
from dsv32_jax.chat.schema import Schema, response_schema, tool_schemas
from dsv32_jax.chat.types import (
  Message,
  Mode,
  ToolCall,
  ToolSpec,
  check_json,
  check_text,
)

_CALLS_STOP = '\n\n' + markup.CALLS[:-1]
# What ends a value, and the same without the sign that makes it a tag.
_VALUE_STOP, _NO_TAG = markup.PARAMETER_END[:-1], markup.PARAMETER_END[1:-1]
_TEXT_STOPS = (
  markup.THINK_END,
  markup.THINK,
  markup.BOS,
  markup.EOS,
  markup.DSML,
  _CALLS_STOP,
)
# What stands behind the name of an argument.
_STRING, _JSON = '" string="true">', '" string="false">'


class CompletionParser:
  """Reads the text of a completion in any cut.

  A completion is what comes after the opener: in thinking mode reasoning up to
  `</think>`, then content, then calls, then EOS.

  >>> parser = CompletionParser('thinking')
  >>> parser.feed('1 plus 1</th')
  [ReasoningDelta(text='1 plus 1')]
  >>> parser.feed('ink>2<｜end▁of▁sentence｜>')
  [ContentDelta(text='2')]
  >>> parser.finish()[0].message
  Message(role='assistant', content='2', reasoning='1 plus 1')
  """

  def __init__(
    self,
    mode: Mode = 'chat',
    *,
    tools: Sequence[ToolSpec] | None = None,
    response_format: dict[str, Any] | None = None,
    recover: bool = False,
  ):
    """Prepares to read one completion.

    Args:
      mode: that of the prompt.
      tools: what may be called; None to check neither names nor arguments.
      response_format: what a reply without calls has to meet.
      recover: go on after a mistake. Control strings in text stay text. Calls
        that are whole before a mistake in their block are kept, the rest of the
        block is dropped. A missing end is an end. Calls of unknown tools, or
        with arguments that do not fit, are kept; a value that is not JSON is
        kept as text.

    Raises:
      ChatError: if a schema of a tool or the response format is none.
    """
    if mode not in ('chat', 'thinking'):
      raise ChatError('mode', f"got {mode!r}, expected 'chat' or 'thinking'")
    self._mode = mode
    self._tools = None if tools is None else tool_schemas(tools)
    response = response_schema(response_format)
    self._response = (
      None if response is None else Schema(response, field='response_format')
    )
    self._recover = recover

    self._reasoning: list[str] = []
    self._content: list[str] = []
    self._calls: list[ToolCall] = []
    self._failures: list[ParseError] = []
    self._events: list[events.Event] = []
    self._reader = PieceReader()
    self._reading: Reading | None = self._completion()

  @property
  def message(self) -> Message:
    """What has been read so far, calls that are whole included."""
    return Message(
      role='assistant',
      content=''.join(self._content),
      reasoning=''.join(self._reasoning),
      tool_calls=tuple(self._calls),
    )

  @property
  def failures(self) -> tuple[ParseError, ...]:
    """What is wrong with it: one mistake at most, or with `recover` all."""
    return tuple(self._failures)

  def feed(self, text: str) -> list[events.Event]:
    """Reads more text and returns what it shows; nothing after a failure.

    Raises:
      RuntimeError: after `finish`.
      ChatError: if it is not text that can be encoded.
    """
    if self._reader.is_last:
      raise RuntimeError('feed: the completion has been finished')
    check_text('text', text)
    if self._reading is not None:
      self._reader.add(text)
    return self._advance()

  def finish(self) -> list[events.Event]:
    """Says that no more text comes.

    Returns:
      Events of which the last is `Ended` or `Failed`; nothing if it has failed
      or been finished before.
    """
    self._reader.is_last = True
    return self._advance()

  def _advance(self) -> list[events.Event]:
    if self._reading is not None:
      try:
        next(self._reading)
      except StopIteration:
        self._reading = None
        self._events.append(events.Ended(self.message))
      except ParseError as error:
        self._reading = None
        self._note(error)
        self._events.append(events.Failed(error))
    out, self._events = self._events, []
    return out

  # The grammar.

  def _completion(self) -> Reading:
    if self._mode == 'thinking':
      stop = yield from self._free_text(markup.THINK_END)
      if stop != markup.THINK_END:
        self._fail(
          Code.REASONING_NOT_CLOSED,
          self._reader.position,
          f'the completion ends before {markup.THINK_END}',
        )
        yield from self._end()
        return
    content_at = self._reader.position
    stop = yield from self._free_text(_CALLS_STOP)
    if stop == _CALLS_STOP:
      yield from self._call_block()
    elif stop is None:
      self._fail(
        Code.MISSING_EOS,
        self._reader.position,
        f'the completion ends without {markup.EOS}',
      )
    yield from self._end()
    if self._response is not None and not self._calls:
      self._check_response(self._response, content_at)

  def _free_text(self, stop: str) -> Reading:
    """Reads reasoning or content.

    Args:
      stop: what ends it and is read with it: `</think>`, or the start of calls.

    Returns:
      `stop`; or EOS, which is not read; or None at the end of the text.
    """
    reader = self._reader
    give = (
      self._give_reasoning if stop == markup.THINK_END else self._give_content
    )
    while True:
      text, found = reader.before(_TEXT_STOPS)
      give(text)
      if found is None and not reader.is_last:
        yield
        continue
      if found is None or found == markup.EOS:
        return found
      if found == stop:
        reader.skip(len(found))
        return found
      if found == _CALLS_STOP:
        code, reason = Code.CALLS_IN_REASONING, 'calls begin in the reasoning'
      else:
        code, reason = Code.CONTROL_IN_TEXT, f'got {found!r} within text'
      self._fail(code, reader.position, reason)
      give(found)
      reader.skip(len(found))

  def _call_block(self) -> Reading:
    """Reads calls from within their first tag to behind their last."""
    try:
      yield from self._reader.expect('>\n')
      while True:
        tag = yield from self._reader.expect(markup.INVOKE, markup.CALLS_END)
        if tag == markup.CALLS_END:
          return
        yield from self._call()
    except ParseError as error:
      if not self._recover:
        raise
      self._note(error)
      yield from self._reader.skip_all()

  def _call(self) -> Reading:
    """Reads one call from within its first tag to behind its last line."""
    reader = self._reader
    at = reader.position
    name, _ = yield from reader.name('">\n', code=Code.BAD_NAME)
    if not name:
      raise ParseError(Code.BAD_NAME, at, 'a call has no name')
    if self._tools is not None and name not in self._tools:
      known = ', '.join(self._tools) or 'none'
      self._fail(
        Code.UNKNOWN_TOOL, at, f'got {name!r}, expected one of: {known}'
      )
    index = len(self._calls)
    self._events.append(events.CallStarted(index, name))
    self._give_arguments('{')
    arguments: dict[str, Any] = {}
    # A call without arguments has an empty line, or nothing, in their place.
    tag = yield from reader.expect(
      markup.PARAMETER, '\n' + markup.INVOKE_END, markup.INVOKE_END
    )
    while tag == markup.PARAMETER:
      yield from self._argument(arguments)
      yield from reader.expect('>\n')
      tag = yield from reader.expect(markup.PARAMETER, markup.INVOKE_END)
    yield from reader.expect('\n')
    self._give_arguments('}')
    schema = self._tools.get(name) if self._tools else None
    problem = schema.problem(arguments) if schema else None
    if problem:
      self._fail(Code.BAD_ARGUMENTS, at, f'{name}: {problem}')
    call = ToolCall(name=name, arguments=arguments)
    self._calls.append(call)
    self._events.append(events.CallFinished(index, call))

  def _argument(self, arguments: dict[str, Any]) -> Reading:
    """Reads one argument from within its first tag to within its last."""
    reader = self._reader
    at = reader.position
    name, kind = yield from reader.name(
      _STRING, _JSON, code=Code.BAD_STRING_ATTRIBUTE
    )
    if name in arguments:
      raise ParseError(
        Code.DUPLICATE_PARAMETER, at, f'got {name!r} a second time'
      )
    self._give_arguments((', ' if arguments else '') + _dump(name) + ': ')
    if kind == _STRING:
      self._give_arguments('"')
    at = reader.position
    parts = []
    while True:
      text, found = reader.before((_VALUE_STOP, _NO_TAG))
      parts.append(text)
      if kind == _STRING and text:
        self._give_arguments(_dump(text)[1:-1])
      if found is not None:
        break
      if reader.is_last:
        raise reader.truncated()
      yield
    if found == _NO_TAG:
      raise ParseError(
        Code.TEXT_BETWEEN_TAGS,
        reader.position,
        f'got {_NO_TAG!r}, expected {_VALUE_STOP!r}',
      )
    reader.skip(len(_VALUE_STOP))
    value: Any = ''.join(parts)
    if kind == _STRING:
      self._give_arguments('"')
    else:
      # Only now is it known to be JSON, so it is given as a whole.
      value = self._from_json(name, value, at)
      self._give_arguments(_dump(value))
    arguments[name] = value

  def _end(self) -> Reading:
    """Reads EOS, if it is there, and the end of the text."""
    reader = self._reader
    while not reader.rest.startswith(markup.EOS):
      if reader.is_last or not markup.EOS.startswith(reader.rest):
        break
      yield
    code = Code.TEXT_AFTER_CALLS
    if reader.rest.startswith(markup.EOS):
      reader.skip(len(markup.EOS))
      code = Code.TEXT_AFTER_EOS
    while not reader.rest:
      if reader.is_last:
        return
      yield
    what = 'calls' if code is Code.TEXT_AFTER_CALLS else markup.EOS
    self._fail(code, reader.position, f'got text after {what}')
    yield from reader.skip_all()

  # What it says.

  def _give_reasoning(self, text: str) -> None:
    if text:
      self._reasoning.append(text)
      self._events.append(events.ReasoningDelta(text))

  def _give_content(self, text: str) -> None:
    if text:
      self._content.append(text)
      self._events.append(events.ContentDelta(text))

  def _give_arguments(self, text: str) -> None:
    self._events.append(events.ArgumentsDelta(len(self._calls), text))

  def _fail(self, code: Code, at: int, reason: str) -> None:
    """Raises a mistake, or notes it if reading goes on."""
    error = ParseError(code, at, reason)
    if not self._recover:
      raise error
    self._note(error)

  def _note(self, error: ParseError) -> None:
    self._failures.append(error)

  def _from_json(self, name: str, text: str, at: int) -> Any:
    value, problem = _load(text)
    if problem:
      self._fail(Code.BAD_JSON, at, f'argument {name!r} {problem}')
      return text
    return value

  def _check_response(self, schema: Schema, at: int) -> None:
    value, problem = _load(''.join(self._content))
    problem = problem or schema.problem(value)
    if problem:
      self._fail(Code.BAD_RESPONSE, at, f'the reply does not fit: {problem}')


def _load(text: str) -> tuple[Any, str]:
  """Reads JSON; returns the value and what is wrong, or ''."""
  try:
    value = json.loads(text, parse_constant=_refuse_constant)
    check_json('value', value, depth=1)
    return value, ''
  except RecursionError:
    return None, 'is not JSON: too many levels'
  except ValueError as error:
    return None, f'is not JSON: {error}'


def _refuse_constant(name: str) -> None:
  raise ValueError(f'got {name}')


def _dump(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)
