"""Builds the tokenizer that a config asks for, or loads a saved one."""

import json
import os

from dsv32_jax.config.data import DataConfig
from dsv32_jax.data import library_tokenizer, sources
from dsv32_jax.data.tokenizer import ByteTokenizer, Tokenizer, check_vocab


def make_tokenizer(config: DataConfig, *, vocab_size: int) -> Tokenizer:
  """Builds the tokenizer of a config; a BPE is trained on its training split.

  A run builds it once, from its first stage, and saves it (`Tokenizer.save`).

  Args:
    config: which tokenizer, and the corpus of a BPE.
    vocab_size: of the model. A BPE without a size of its own takes it all but
      the ids that the recall task needs at the end.

  Raises:
    ValueError: when the tokenizer's vocabulary exceeds the model's, its file is
      missing or not a tokenizer, or as `sources.load_documents`.
    ImportError: when the optional packages are not installed.
  """
  choice = config.tokenizer
  if choice.kind == 'bytes':
    tokenizer: Tokenizer = ByteTokenizer()
  elif choice.kind == 'hf':
    tokenizer = library_tokenizer.from_file(choice.path)
  elif choice.kind == 'deepseek':
    tokenizer = library_tokenizer.deepseek()
  else:
    loaded = [
      sources.load_documents(
        source, split='train', held_out_fraction=config.held_out_fraction
      )
      for source in config.sources
      if source.kind != 'conversations'
    ]
    if not loaded:
      raise ValueError(
        "tokenizer.kind: got 'bpe' with conversations alone, expected the "
        "tokenizer of the model that they are for (kind 'hf' with its path)"
      )
    tokenizer = library_tokenizer.cached_bpe(
      [text for documents in loaded for text in documents.texts],
      vocab_size=choice.vocab_size or vocab_size - config.recall.num_tokens,
      train_bytes=choice.train_bytes,
      cache_dir=choice.cache_dir,
      corpus_fingerprint=':'.join(d.fingerprint for d in loaded),
    )
  check_vocab(tokenizer, vocab_size)
  return tokenizer


def load_tokenizer(directory: str) -> Tokenizer:
  """Loads what `Tokenizer.save` wrote.

  Raises:
    ValueError: if there is no tokenizer in the directory.
  """
  path = os.path.join(directory, 'tokenizer.json')
  try:
    with open(path, encoding='utf-8') as file:
      saved = json.load(file)
  except (OSError, ValueError) as error:
    raise ValueError(
      f'{path}: cannot be read ({error}), expected a saved tokenizer'
    ) from None
  if isinstance(saved, dict) and saved.get('kind') == 'bytes':
    return ByteTokenizer()
  return library_tokenizer.from_file(path)
