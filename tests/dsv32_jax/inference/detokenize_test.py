"""Streamed text is the text of all tokens, up to a stop string."""

import numpy as np
import pytest

from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.inference.detokenize import TextStream

TOKENIZER = ByteTokenizer()
TEXT = 'a 日本語 ß 👩‍🚀 </stop> end'


class Pieces:
  """Tokens of several characters, whose text depends on what is before."""

  def __init__(self, pieces):
    self._pieces = pieces

  def decode(self, ids):
    return ''.join(self._pieces[index] for index in ids).removeprefix(' ')


def _stream(tokens, **options):
  stream = TextStream(TOKENIZER, **options)
  parts = [stream.push(token) for token in tokens]
  return stream, [*parts, stream.flush()]


def test_text_of_bytes_comes_in_whole_characters():
  stream, parts = _stream(TOKENIZER.encode(TEXT).tolist())
  assert ''.join(parts) == stream.text == TEXT
  assert not any('\ufffd' in part for part in parts)
  assert parts[0] == 'a'  # At once.


def test_text_of_tokens_with_leading_spaces_keeps_them():
  stream = TextStream(Pieces([' the', ' cat', ' sat']))
  assert [stream.push(i) for i in (0, 1, 2)] == ['the', ' cat', ' sat']


@pytest.mark.parametrize(
  ('stops', 'expected'),
  [
    (('</stop>',), 'a 日本語 ß 👩‍🚀 '),
    (('end', '</s'), 'a 日本語 ß 👩‍🚀 '),
    (('語 ß',), 'a 日本'),
    (('a',), ''),
    (('</stopp', 'ends'), TEXT),
  ],
)
def test_stop_strings_end_the_text_and_are_not_in_it(stops, expected):
  stream, parts = _stream(TOKENIZER.encode(TEXT).tolist(), stop_strings=stops)
  assert ''.join(parts) == stream.text == expected
  assert stream.stopped == (expected != TEXT)


def test_stop_strings_never_show_their_beginning():
  """Random text over two letters, where stops overlap with themselves."""
  generator = np.random.default_rng(0)
  for _ in range(300):
    text = ''.join(generator.choice(['a', 'b'], size=20))
    stop = ''.join(generator.choice(['a', 'b'], size=generator.integers(1, 5)))
    stream, parts = _stream(
      TOKENIZER.encode(text).tolist(), stop_strings=(stop,)
    )
    assert ''.join(parts) == text.partition(stop)[0]
    assert stream.stopped == (stop in text)


def test_ids_without_text_do_not_hold_the_rest_back_for_long():
  stream, parts = _stream([1000, *b'abcdef'])
  assert stream.text == '\ufffdabcdef'
  assert ''.join(parts[:5]).startswith('\ufffd')
