"""The recall task: a token lies far back, a query asks for it.

A key j has one token for each of its values, and a query token. A row is real
text with one token of each of its keys strewn in; later, at least `min_gap`
tokens on, comes the key's query, and the answer is that same token. So one look
back at the right place answers it, a window of `min_gap` tokens never holds the
answer, and a guess is right once in `num_values`. Only answers carry loss.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv32_jax.config.data import RecallConfig, check_recall_fits
from dsv32_jax.data.corpus import TokenCorpus
from dsv32_jax.data.packing import Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallTokens:
  """Ids of the task's tokens.

  Attributes:
    first: id of (key 0, value 0); then key by key, then the queries.
    num_keys: keys there are.
    num_values: values of each.
  """

  first: int
  num_keys: int
  num_values: int

  def value(
    self, key: int | np.ndarray, value: int | np.ndarray
  ) -> int | np.ndarray:
    """Id of a key's token with a value."""
    return self.first + self.num_values * key + value

  def query(self, key: int | np.ndarray) -> int | np.ndarray:
    """Id of the query for a key."""
    return self.first + self.num_values * self.num_keys + key

  def candidates(self, key: int) -> np.ndarray:
    """The ids that can answer a query, int32 [num_values]."""
    values = np.arange(self.num_values)
    return np.asarray(self.value(key, values), np.int32)

  @classmethod
  def of(
    cls, config: RecallConfig, *, vocab_size: int, text_vocab_size: int
  ) -> 'RecallTokens':
    """Places the ids in the model's vocabulary, behind those of text.

    Raises:
      ValueError: if they do not fit between the tokenizer's ids and the end of
        the model's vocabulary.
    """
    first = config.first_token
    if first is None:
      first = vocab_size - config.num_tokens
    if first < text_vocab_size or first + config.num_tokens > vocab_size:
      raise ValueError(
        f'recall.first_token: got {first} with {config.num_tokens} task '
        f"tokens, expected them between the tokenizer's {text_vocab_size} and "
        f"the model's {vocab_size} ids"
      )
    return cls(
      first=first, num_keys=config.key_vocab, num_values=config.num_values
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallBatch:
  """Recall rows and where their answers are, for measuring accuracy.

  Attributes:
    batch: the usual arrays [B, T]; loss_weight is positive on answers only.
    row, position: int32 [answers]; logits[row, position] predict the answer.
    distance: int32 [answers], tokens from the key's token to its query.
    answer: int32 [answers], the right id.
    candidates: int32 [answers, num_values], the ids that a guess chooses from.
  """

  batch: Row
  row: np.ndarray
  position: np.ndarray
  distance: np.ndarray
  answer: np.ndarray
  candidates: np.ndarray

  @property
  def chance(self) -> float:
    """Accuracy of guessing."""
    return 1 / self.candidates.shape[1]


class RecallRows:
  """Endless recall rows; row i follows from (seed, i)."""

  def __init__(
    self,
    corpora: Sequence[TokenCorpus],
    *,
    config: RecallConfig,
    tokens: RecallTokens,
    seq_len: int,
    seed: int = 0,
  ):
    """Prepares the rows.

    Args:
      corpora: real text to strew the tokens in, each as often as the others.
      config: gaps and number of keys.
      tokens: ids of the task.
      seq_len: T.
      seed: of the rows.

    Raises:
      ValueError: if the task has no room in a row.
    """
    check_recall_fits(config, seq_len=seq_len)
    self._corpora = tuple(corpora)
    self._config = config
    self._tokens = tokens
    self._seq_len = seq_len
    self._seed = seed

  def __getitem__(self, index: int) -> Row:
    rng = np.random.default_rng([self._seed, index, 3])
    at, query = place_pairs(
      rng,
      seq_len=self._seq_len,
      num_pairs=self._config.num_keys,
      min_gap=self._config.min_gap,
      max_gap=self._config.max_gap,
    )
    keys = rng.permutation(self._tokens.num_keys)[: len(at)]
    return _write_row(
      rng,
      self._corpora,
      self._tokens,
      seq_len=self._seq_len,
      keys=keys,
      at=at,
      query=query,
    )


def place_pairs(
  rng: np.random.Generator,
  *,
  seq_len: int,
  num_pairs: int,
  min_gap: int,
  max_gap: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws places for keys and queries so that nothing overlaps.

  The gap is drawn evenly from its range and then the place, so that long gaps
  are as frequent as short ones. Where a crowded row refuses 64 draws for a
  pair, it takes the arrangement that always fits (see `check_recall_fits`).

  Args:
    rng: random numbers.
    seq_len: T; places are 0 to T, the last being only a target.
    num_pairs: pairs.
    min_gap: tokens from a key's token to its query, at least.
    max_gap: at most.

  Returns:
    Places of the keys' tokens and of the queries, int64 [num_pairs] each; the
    answer of a query is at the next place.
  """
  free = np.ones(seq_len + 1, bool)
  longest = seq_len - 1 if max_gap is None else min(max_gap, seq_len - 1)
  pairs = []
  for _ in range(num_pairs):
    draws = rng.random((64, 2)).tolist()
    for gap_draw, place_draw in draws:
      gap = min_gap + int(gap_draw * (longest - min_gap + 1))
      at = int(place_draw * (seq_len - gap))
      query = at + gap
      if free[at] and free[query] and free[query + 1]:
        free[at] = free[query] = free[query + 1] = False
        pairs.append((at, query))
        break
    else:
      return _place_regularly(seq_len, num_pairs, min_gap, max_gap)
  places = np.array(pairs)
  return places[:, 0], places[:, 1]


def _place_regularly(
  seq_len: int, num_pairs: int, min_gap: int, max_gap: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Keys first and queries last, or all at one distance if there is a limit."""
  order = np.arange(num_pairs)
  if max_gap is None:
    return order, seq_len + 1 - 2 * num_pairs + 2 * order
  return 2 * order, 2 * order + max(min_gap, 2 * num_pairs - 1)


def place_at_distance(
  rng: np.random.Generator, *, seq_len: int, num_pairs: int, distance: int
) -> tuple[np.ndarray, np.ndarray]:
  """Places as many pairs as fit, up to `num_pairs`, all at one distance.

  Queries stand in the second half of the row. Near its beginning a budget of k
  tokens covers most of what there is, so that short distances would be easier
  for a selector that knows nothing.
  """
  free = np.ones(seq_len + 1, bool)
  pairs = []
  first = max(seq_len // 2 - distance, 0)
  for at in (first + rng.permutation(seq_len - distance - first)).tolist():
    query = at + distance
    if free[at] and free[query] and free[query + 1] and distance > 0:
      free[at] = free[query] = free[query + 1] = False
      pairs.append((at, query))
      if len(pairs) == num_pairs:
        break
  places = np.array(pairs)
  return places[:, 0], places[:, 1]


def recall_eval_batch(
  corpora: Sequence[TokenCorpus],
  *,
  tokens: RecallTokens,
  seq_len: int,
  batch_size: int,
  distance: int,
  num_keys: int = 16,
  seed: int = 0,
) -> RecallBatch:
  """Recall rows whose answers all lie one exact distance back.

  As many of the row's keys are asked as fit at that distance; the others stand
  in the row unasked, so that a row holds as many keys at every distance.

  Args:
    corpora: text to strew the tokens in (held-out, to measure).
    tokens: ids of the task.
    seq_len: T.
    batch_size: B.
    distance: tokens from a key's token to its query, 1 to T - 1.
    num_keys: keys in a row.
    seed: the same seed gives the same rows.

  Returns:
    The rows, and for each answer its place, id and candidates.

  Raises:
    ValueError: for a distance or number of keys that does not fit.
  """
  if not 1 <= distance < seq_len:
    raise ValueError(
      f'distance: got {distance}, expected 1 to {seq_len - 1} at seq_len '
      f'{seq_len}'
    )
  if not 1 <= num_keys <= min(tokens.num_keys, (seq_len + 1) // 3):
    raise ValueError(
      f'num_keys: got {num_keys}, expected 1 to '
      f'{min(tokens.num_keys, (seq_len + 1) // 3)} (keys of the task, and room '
      f'at seq_len {seq_len})'
    )
  rows: list[Row] = []
  places: list[tuple[int, int, int]] = []
  for index in range(batch_size):
    rng = np.random.default_rng([seed, distance, index, 4])
    at, query = place_at_distance(
      rng, seq_len=seq_len, num_pairs=num_keys, distance=distance
    )
    keys = rng.permutation(tokens.num_keys)[:num_keys]
    rows.append(
      _write_row(
        rng,
        corpora,
        tokens,
        seq_len=seq_len,
        keys=keys,
        at=at,
        query=query,
      )
    )
    places += [
      (index, place, key)
      for place, key in zip(query.tolist(), keys.tolist(), strict=False)
    ]
  batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  row, position, key = np.array(places, np.int32).T
  return RecallBatch(
    batch=batch,
    row=row,
    position=position,
    distance=np.full(len(row), distance, np.int32),
    answer=batch['targets'][row, position],
    candidates=np.stack([tokens.candidates(k) for k in key.tolist()]),
  )


def _write_row(
  rng: np.random.Generator,
  corpora: Sequence[TokenCorpus],
  tokens: RecallTokens,
  *,
  seq_len: int,
  keys: np.ndarray,
  at: np.ndarray,
  query: np.ndarray,
) -> Row:
  """Fills text around the pairs; keys beyond them are strewn in unasked."""
  row = np.zeros(seq_len + 1, np.int32)
  text = np.ones(seq_len + 1, bool)
  answers = np.asarray(
    tokens.value(keys, rng.integers(0, tokens.num_values, len(keys)))
  )
  asked = len(at)
  row[at] = row[query + 1] = answers[:asked]
  row[query] = tokens.query(keys[:asked])
  text[at] = text[query] = text[query + 1] = False
  if asked < len(keys):
    others = rng.permutation(np.flatnonzero(text))[: len(keys) - asked]
    row[others] = answers[asked:]
    text[others] = False
  corpus = corpora[int(rng.integers(len(corpora)))]
  row[text] = _text_window(rng, corpus.tokens, int(text.sum()))
  # A row of text has weight T; so do the answers of this one together.
  loss_weight = np.zeros(seq_len, np.float32)
  loss_weight[query] = seq_len / asked
  return {
    'tokens': row[:-1],
    'targets': row[1:],
    'loss_weight': loss_weight,
    'segment_ids': np.ones(seq_len, np.int32),
    'positions': np.arange(seq_len, dtype=np.int32),
  }


def _text_window(
  rng: np.random.Generator, tokens: np.ndarray, length: int
) -> np.ndarray:
  """`length` consecutive tokens; a smaller corpus is repeated."""
  if len(tokens) < length:
    return np.resize(tokens, length)
  start = int(rng.integers(len(tokens) - length + 1))
  return tokens[start : start + length]
