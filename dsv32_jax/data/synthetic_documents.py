"""Small generated corpora: copying and addition, as plain text.

They are documents like any other, so every tokenizer and every packing works on
them. The recall task, which is made of token ids, is in `synthetic.py`.
"""

import random

_LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789'


def generate(
  kind: str, *, num_documents: int, seed: int = 0
) -> list[tuple[str, bytes]]:
  """Makes a corpus.

  Args:
    kind: 'copy' or 'arithmetic'.
    num_documents: how many documents.
    seed: the same seed gives the same documents.

  Returns:
    (name, text) pairs.

  Raises:
    ValueError: for another kind.

  Example:
    >>> generate('arithmetic', num_documents=1)[0][0]
    'arithmetic/000000'
  """
  makers = {'copy': _copy, 'arithmetic': _arithmetic}
  if kind not in makers:
    raise ValueError(f'kind: got {kind!r}, expected one of {sorted(makers)}')
  documents = []
  for index in range(num_documents):
    # A string seeds `random` by its SHA-512, equal on every Python version.
    rng = random.Random(f'{kind}:{seed}:{index}')
    documents.append((f'{kind}/{index:06d}', makers[kind](rng).encode()))
  return documents


def _copy(rng: random.Random) -> str:
  """Lines 'word|word' where the second word repeats the first."""
  lines = []
  for _ in range(rng.randint(4, 16)):
    word = ''.join(rng.choices(_LETTERS, k=rng.randint(4, 24)))
    lines.append(f'{word}|{word}\n')
  return ''.join(lines)


def _arithmetic(rng: random.Random) -> str:
  """Lines 'a+b=c' or 'a-b=c' with numbers of up to three digits."""
  lines = []
  for _ in range(rng.randint(8, 32)):
    a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    sign = rng.choice('+-')
    lines.append(f'{a}{sign}{b}={a + b if sign == "+" else a - b}\n')
  return ''.join(lines)
