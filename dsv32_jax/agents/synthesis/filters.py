"""What a task set is sifted by: near-duplicates, pass@n, weak answerers."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_WORDS = 4
_BANDS, _ROWS = 32, 4
_PRIME = (1 << 31) - 1


class Rejected(Exception):
  """A task that fails a check; its text is the reason that is counted."""


def masked(prompt: str, names: Iterable[str]) -> str:
  """A prompt with entity names replaced by one mark, longest names first.

  >>> masked('From Lyon to Lyon Sud on Monday.', ['Lyon', 'Lyon Sud'])
  'From @ to @ on Monday.'
  """
  for name in sorted(names, key=lambda one: (-len(one), one)):
    prompt = prompt.replace(name, '@')
  return prompt


def shingles(text: str) -> np.ndarray:
  """Hashes of all runs of four words, sorted, each once."""
  words = text.lower().split()
  runs = {
    ' '.join(words[i : i + _WORDS])
    for i in range(max(1, len(words) - _WORDS + 1))
  }
  hashed = [
    int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest())
    for run in runs
  ]
  return np.sort(np.array(hashed, np.uint64))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
  """Shared shingles over all shingles."""
  shared = len(np.intersect1d(one, other, assume_unique=True))
  return shared / (len(one) + len(other) - shared)


class NearDuplicates:
  """Finds texts that are nearly one seen before.

  MinHash signatures of 128 values in 32 bands find candidates (a pair at 0.8 is
  missed once in 5e7), whose Jaccard index is then worked out exactly.

  Args:
    threshold: the Jaccard index from which on two texts are near-duplicates.

  >>> near = NearDuplicates()
  >>> near.find('a b c d e f g h'), near.find('a b c d e f g h')
  (None, 0)
  """

  def __init__(self, threshold: float = 0.8):
    if not 0 < threshold <= 1:
      raise ValueError(f'threshold: got {threshold}, expected one in (0, 1]')
    self._threshold = threshold
    rng = np.random.default_rng(0)
    size = _BANDS * _ROWS
    self._factors = rng.integers(1, _PRIME, size, np.uint64)[:, None]
    self._offsets = rng.integers(0, _PRIME, size, np.uint64)[:, None]
    self._buckets: list[dict[bytes, list[int]]] = [{} for _ in range(_BANDS)]
    self._kept: list[np.ndarray] = []

  def find(self, text: str) -> int | None:
    """The kept text that `text` nearly is, by number; else keeps it.

    Args:
      text: with its names masked.
    """
    new = shingles(text)
    low = new % np.uint64(_PRIME)
    signature = ((self._factors * low + self._offsets) % _PRIME).min(axis=1)
    keys = [one.tobytes() for one in signature.reshape(_BANDS, _ROWS)]
    seen: set[int] = set()
    for bucket, key in zip(self._buckets, keys, strict=True):
      seen.update(bucket.get(key, ()))
    for number in sorted(seen):
      if jaccard(self._kept[number], new) >= self._threshold:
        return number
    for bucket, key in zip(self._buckets, keys, strict=True):
      bucket.setdefault(key, []).append(len(self._kept))
    self._kept.append(new)
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassBand:
  """Keeps tasks that a policy solves sometimes, in n attempts.

  The paper keeps those with pass@100 above 0; tasks that are always solved
  teach nothing either.

  Attributes:
    least: attempts that must succeed.
    most: share of attempts that may succeed.
  """

  least: int = 1
  most: float = 0.95

  def keeps(self, rewards: Sequence[float]) -> bool:
    """Whether a task with these rewards of its attempts stays.

    Raises:
      ValueError: without attempts.

    >>> PassBand().keeps([0.0, 0.0, 1.0]), PassBand().keeps([1.0, 1.0])
    (True, False)
    """
    if not rewards:
      raise ValueError('rewards: got none, expected one for each attempt')
    solved = sum(reward >= 1 for reward in rewards)
    return self.least <= solved <= self.most * len(rewards)

  def kept(self, attempts: Mapping[str, Sequence[float]]) -> list[str]:
    """Ids of the tasks that stay, from the rewards of each."""
    return [task for task, rewards in attempts.items() if self.keeps(rewards)]


def refuse(name: str, passed: Iterable[bool]) -> None:
  """Rejects a task that a weak answerer solves.

  Args:
    name: of the answerer.
    passed: of each of its answers.

  Raises:
    Rejected: one passes.
  """
  if any(passed):
    raise Rejected(f'a {name} answer passes')
