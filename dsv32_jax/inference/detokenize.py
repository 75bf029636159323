"""Text of tokens that come one by one, and the stop strings in it."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

# What a tokenizer writes for bytes that are no whole character (yet).
_UNKNOWN = '\ufffd'
# A character has at most four bytes: after as many tokens nothing is awaited.
_MOST_TOKENS_OF_A_CHARACTER = 4


@runtime_checkable
class Decoder(Protocol):
  """The part of a tokenizer that is needed here."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of some ids."""
    ...


class TextStream:
  """Turns tokens into text that will not change any more.

  A tokenizer's text of a list of ids is not the sum of its texts of each: a
  character may be spread over tokens, and some tokenizers drop a leading space.
  So what is new is the difference of two texts that begin alike, and text is
  held back while it ends in an incomplete character, or in what may become a
  stop string.

  Example:
    >>> from dsv32_jax.data.tokenizer import ByteTokenizer
    >>> stream = TextStream(ByteTokenizer(), stop_strings=('END',))
    >>> [stream.push(byte) for byte in b'aEbEND']
    ['a', '', 'Eb', '', '', '']
    >>> stream.stopped
    True

  Attributes:
    text: all text so far, without what is held back.
    stopped: whether a stop string has been seen; `text` ends before it.
  """

  def __init__(self, tokenizer: Decoder, stop_strings: Sequence[str] = ()):
    self.text = ''
    self.stopped = False
    self._tokenizer = tokenizer
    self._stop_strings = tuple(stop_strings)
    self._ids: list[int] = []
    self._start = 0  # First id of the text that differences are taken of.
    self._known = 0  # Ids whose text is known.
    self._held = ''

  def push(self, token: int) -> str:
    """Adds a token and returns the text that is certain now."""
    if self.stopped:
      return ''
    self._ids.append(int(token))
    return self._release(self._decoded(last=False), last=False)

  def flush(self) -> str:
    """Returns what was held back: no token follows."""
    if self.stopped:
      return ''
    return self._release(self._decoded(last=True), last=True)

  def _decoded(self, *, last: bool) -> str:
    before = self._tokenizer.decode(self._ids[self._start : self._known])
    after = self._tokenizer.decode(self._ids[self._start :])
    waiting = len(self._ids) - self._known
    is_incomplete = (
      after.endswith(_UNKNOWN) and waiting < _MOST_TOKENS_OF_A_CHARACTER
    )
    if is_incomplete and not last:
      return ''
    self._start, self._known = self._known, len(self._ids)
    return after[len(before) :]

  def _release(self, new: str, *, last: bool) -> str:
    pending = self._held + new
    found = [
      at for stop in self._stop_strings if (at := pending.find(stop)) >= 0
    ]
    if found:
      self.stopped, self._held = True, ''
      certain = pending[: min(found)]
    else:
      keep = 0 if last else self._possible_stop(pending)
      certain = pending[: len(pending) - keep]
      self._held = pending[len(pending) - keep :]
    self.text += certain
    return certain

  def _possible_stop(self, text: str) -> int:
    """Characters at the end that a stop string may begin with."""
    longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
    for size in range(min(longest, len(text)), 0, -1):
      if any(stop.startswith(text[-size:]) for stop in self._stop_strings):
        return size
    return 0
