"""The protocol that all tokenizers follow, and the one of bytes.

All share DeepSeek's special strings. Text is encoded as plain text unless the
caller asks for special strings to be parsed (chat templates do, corpora do not:
a document that mentions '<think>' must not change the model's mode).
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from dsv32_jax.data import cache

BOS = '<｜begin▁of▁sentence｜>'
EOS = '<｜end▁of▁sentence｜>'
PAD = '<｜▁pad▁｜>'
# The strings of V3.2's chat format. '｜DSML｜' is plain text in DeepSeek's own
# vocabulary; one id for it keeps tool calls short in small ones.
SPECIAL_STRINGS = (
  BOS,
  EOS,
  PAD,
  '<think>',
  '</think>',
  '<｜fim▁hole｜>',
  '<｜fim▁begin｜>',
  '<｜fim▁end｜>',
  '<｜User｜>',
  '<｜Assistant｜>',
  '｜DSML｜',
)


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the code knows of a tokenizer.

  Attributes:
    name: kind in words.
    vocab_size: one more than the largest id.
    bos_id, eos_id, pad_id: ids of the structural tokens.
    special_ids: id of each special string.
    fingerprint: equal for tokenizers that encode alike; kept in checkpoints.
  """

  name: str
  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int
  special_ids: Mapping[str, int]
  fingerprint: str

  def encode(
    self, text: str | bytes, *, parse_special: bool = False
  ) -> np.ndarray:
    """Returns the ids, int32 [length]; no BOS or EOS is added."""
    ...

  def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    """Encodes several texts, in parallel where the library can."""
    ...

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text; an id without text becomes U+FFFD."""
    ...

  def save(self, directory: str) -> None:
    """Writes what `load_tokenizer` needs into a directory."""
    ...


class ByteTokenizer:
  """One id a byte, and the special strings from 256 on."""

  name = 'bytes'
  special_ids: Mapping[str, int] = {
    text: 256 + index for index, text in enumerate(SPECIAL_STRINGS)
  }
  vocab_size = 256 + len(SPECIAL_STRINGS)
  bos_id = special_ids[BOS]
  eos_id = special_ids[EOS]
  pad_id = special_ids[PAD]
  fingerprint = hashlib.sha256(
    '\0'.join(('bytes', *SPECIAL_STRINGS)).encode()
  ).hexdigest()[:32]

  _texts: ClassVar = {index: text for text, index in special_ids.items()}
  _pattern = re.compile('(' + '|'.join(map(re.escape, SPECIAL_STRINGS)) + ')')

  def encode(
    self, text: str | bytes, *, parse_special: bool = False
  ) -> np.ndarray:
    """See `Tokenizer.encode`."""
    if not parse_special:
      data = text.encode() if isinstance(text, str) else text
      return np.frombuffer(data, np.uint8).astype(np.int32)
    if isinstance(text, bytes):
      text = text.decode()
    parts = [
      np.array([self.special_ids[part]], np.int32)
      if part in self.special_ids
      else self.encode(part)
      for part in self._pattern.split(text)
    ]
    return np.concatenate(parts)

  def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    """See `Tokenizer.encode_batch`."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer.decode`."""
    out = bytearray()
    for token in ids:
      token = int(token)
      if 0 <= token < 256:
        out.append(token)
      else:
        out += self._texts.get(token, '\ufffd').encode()
    return out.decode('utf-8', errors='replace')

  def save(self, directory: str) -> None:
    """See `Tokenizer.save`."""
    cache.write_atomically(
      os.path.join(directory, 'tokenizer.json'), json.dumps({'kind': 'bytes'})
    )


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
  """Refuses a tokenizer with more ids than the model has embeddings.

  Raises:
    ValueError: naming both sizes.
  """
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f'vocab_size: got {vocab_size} for the model, expected at least the '
      f'{tokenizer.vocab_size} of tokenizer {tokenizer.name!r}'
    )
