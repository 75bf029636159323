"""A tokenized corpus: one flat array of token ids, cut into documents."""

import dataclasses
import hashlib
import os
import tempfile

import numpy as np

from dsv32_jax.data import cache
from dsv32_jax.data.sources import Documents
from dsv32_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenCorpus:
  """Token ids of all documents, end to end.

  Attributes:
    tokens: ids, uint16 or uint32 [number of tokens].
    offsets: int64 [documents + 1]; document i is
      tokens[offsets[i] : offsets[i + 1]].
    names: of the documents.
    label: the source in words, for messages.
    pad_id: id for places without a document.
    fingerprint: hash of the documents, the tokenizer and the options.
    is_target: which tokens are learnt, bool [number of tokens]; None for all.
      Documents of such a corpus are never cut.
  """

  tokens: np.ndarray
  offsets: np.ndarray
  names: tuple[str, ...]
  label: str
  pad_id: int
  fingerprint: str
  is_target: np.ndarray | None = None

  @property
  def lengths(self) -> np.ndarray:
    """Tokens of each document, int64 [documents]."""
    return np.diff(self.offsets)

  @property
  def num_tokens(self) -> int:
    return int(self.offsets[-1])


def tokenize(
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  add_bos: bool = False,
  add_eos: bool = True,
  cache_dir: str | None = None,
) -> TokenCorpus:
  """Tokenizes documents.

  Args:
    documents: what to tokenize.
    tokenizer: how.
    add_bos: begin each document with BOS.
    add_eos: end each document with EOS.
    cache_dir: keeps the ids of slow tokenizers on disk (the byte tokenizer's
      take less time to make than to read); None for the user's cache directory.
  """
  key = f'{documents.fingerprint}:{tokenizer.fingerprint}:{add_bos}:{add_eos}'
  fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
  cached = None
  if tokenizer.name != 'bytes':
    directory = cache_dir or cache.default_cache_dir()
    cached = os.path.join(directory, f'tokens-{fingerprint}.npz')
  arrays = _read_cache(cached, len(documents.names)) if cached else None
  if arrays is None:
    arrays = _encode(documents, tokenizer, add_bos=add_bos, add_eos=add_eos)
    if cached:
      _write_cache(cached, *arrays)
  tokens, offsets = arrays
  return TokenCorpus(
    tokens=tokens,
    offsets=offsets,
    names=documents.names,
    label=documents.label,
    pad_id=tokenizer.pad_id,
    fingerprint=fingerprint,
  )


def _encode(
  documents: Documents, tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool
) -> tuple[np.ndarray, np.ndarray]:
  # uint16 where it fits: a corpus in memory at half the size.
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  before = np.array([tokenizer.bos_id] * add_bos, dtype)
  after = np.array([tokenizer.eos_id] * add_eos, dtype)
  encoded = tokenizer.encode_batch(documents.texts)
  extra = len(before) + len(after)
  offsets = np.zeros(len(encoded) + 1, np.int64)
  np.cumsum([len(ids) + extra for ids in encoded], out=offsets[1:])
  tokens = np.empty(offsets[-1], dtype)
  for ids, start, end in zip(
    encoded, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True
  ):
    tokens[start : start + len(before)] = before
    tokens[start + len(before) : end - len(after)] = ids
    tokens[end - len(after) : end] = after
  return tokens, offsets


def _read_cache(
  path: str, num_documents: int
) -> tuple[np.ndarray, np.ndarray] | None:
  """Cached arrays, or None where there are none or they are damaged."""
  try:
    with open(path, 'rb') as file, np.load(file) as saved:
      tokens, offsets = saved['tokens'], saved['offsets']
  except Exception:  # numpy and zipfile raise many kinds.
    return None
  whole = len(offsets) == num_documents + 1 and offsets[-1] == len(tokens)
  return (tokens, offsets) if whole else None


def _write_cache(path: str, tokens: np.ndarray, offsets: np.ndarray) -> None:
  """Writes arrays all or nothing; the cache only saves time, so never fails."""
  temporary = None
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(
      dir=os.path.dirname(path), prefix='.tmp-', suffix='.npz'
    )
    with os.fdopen(handle, 'wb') as file:
      np.savez(file, tokens=tokens, offsets=offsets)
    os.replace(temporary, path)
  except OSError:
    if temporary is not None and os.path.exists(temporary):
      os.unlink(temporary)
