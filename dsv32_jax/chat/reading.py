"""A text that arrives in pieces, and how to read it whatever the cuts are."""

import functools
import re
from collections.abc import Generator, Sequence
from typing import Any

from dsv32_jax.chat import markup
from dsv32_jax.chat.errors import ParseError, ParseErrorCode

# A part of a grammar: yields where it needs more text, returns what it read.
Reading = Generator[None, None, Any]

_NAME = re.compile('[^"\n]*')


class PieceReader:
  """The part of a text that is not read yet.

  Attributes:
    is_last: no more text will come.
  """

  def __init__(self):
    self.is_last = False
    self._text = ''
    self._at = 0  # In `_text`.
    self._start = 0  # Where `_text` begins in the whole.

  @property
  def position(self) -> int:
    """Where reading is, in characters of the whole text."""
    return self._start + self._at

  @property
  def rest(self) -> str:
    """What has arrived and is not read."""
    return self._text[self._at :]

  def add(self, text: str) -> None:
    """Takes more text and forgets what has been read."""
    self._start += self._at
    self._text = self._text[self._at :] + text
    self._at = 0

  def skip(self, length: int) -> None:
    """Reads `length` characters that are there."""
    self._at += length

  def skip_all(self) -> Reading:
    """Reads up to the end of the whole text."""
    while True:
      self._at = len(self._text)
      if self.is_last:
        return
      yield

  def before(self, stops: Sequence[str]) -> tuple[str, str | None]:
    """Reads up to the first of several strings.

    Args:
      stops: none is the beginning of another.

    Returns:
      The text read, which stops short of what more text may turn into one of
      them, and the string that stands there, if one does.
    """
    text, start = self._text, self._at
    match = _any_of(tuple(stops)).search(text, start)
    found = match.group() if match else None
    end = match.start() if match else len(text)
    if not self.is_last:
      # The longest stop begins before a shorter one that is part of it.
      longest = max(map(len, stops))
      for place in range(max(start, len(text) - longest + 1), end):
        if any(stop.startswith(text[place:]) for stop in stops):
          found, end = None, place
          break
    self._at = end
    return text[start:end], found

  def expect(
    self,
    *literals: str,
    code: ParseErrorCode = ParseErrorCode.TEXT_BETWEEN_TAGS,
  ) -> Reading:
    """Reads one of several strings and returns it.

    Raises:
      ParseError: with `code` if something else stands there.
    """
    while True:
      rest = self._text[self._at : self._at + max(map(len, literals))]
      for literal in literals:
        if rest.startswith(literal):
          self._at += len(literal)
          return literal
      if not _begins_one(literals, rest):
        # As much as shows the difference, however much of it has arrived.
        while not _begins_one(literals, rest[:-1]):
          rest = rest[:-1]
        expected = ' or '.join(map(repr, literals))
        raise ParseError(
          code, self.position, f'got {rest!r}, expected {expected}'
        )
      if self.is_last:
        raise self.truncated()
      yield

  def name(self, *ends: str, code: ParseErrorCode) -> Reading:
    """Reads ` name="..."` and one of `ends`, which begin with the quote.

    Returns:
      The name and the end.

    Raises:
      ParseError: with BAD_NAME if it is no name, `code` if another end follows.
    """
    yield from self.expect(' name="', code=ParseErrorCode.BAD_NAME)
    at = self.position
    name = ''
    while True:
      match = _NAME.match(self._text, self._at)
      assert match is not None
      name += match.group()
      self._at = match.end()
      if self._at < len(self._text):
        break
      if self.is_last:
        raise self.truncated()
      yield
    if self._text[self._at] != '"':
      raise ParseError(
        ParseErrorCode.BAD_NAME, at, 'the line ends within a name'
      )
    if markup.DSML in name:
      raise ParseError(ParseErrorCode.BAD_NAME, at, 'a name contains a tag')
    end = yield from self.expect(*ends, code=code)
    return name, end

  def truncated(self) -> ParseError:
    """The mistake of a text that ends too early."""
    return ParseError(
      ParseErrorCode.TRUNCATED_CALLS,
      self._start + len(self._text),
      'the completion ends within its calls',
    )


@functools.cache
def _any_of(texts: tuple[str, ...]) -> re.Pattern[str]:
  return re.compile('|'.join(map(re.escape, texts)))


def _begins_one(literals: Sequence[str], text: str) -> bool:
  return any(literal.startswith(text) for literal in literals)
