"""The order in which rows are read, as data sources for Grain."""

import collections
from typing import cast

import grain
import numpy as np

from dsv32_jax.data.packing import Row, RowSource
from dsv32_jax.data.synthetic import RecallRows

# More rows than any run asks for: an endless dataset, to Grain.
_ENDLESS = 1 << 48


class ShuffledRows:
  """Rows of a source, epoch after epoch, each in an order of its own."""

  def __init__(self, rows: RowSource, *, seed: int = 0, epochs: int = 0):
    self._rows = rows
    self._seed = seed
    self._length = epochs * rows.num_rows or _ENDLESS
    self._orders: collections.OrderedDict[int, np.ndarray] = (
      collections.OrderedDict()
    )

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Row:
    epoch, place = divmod(index, self._rows.num_rows)
    if epoch not in self._orders:
      rng = np.random.default_rng([self._seed, epoch, 5])
      self._orders[epoch] = rng.permutation(self._rows.num_rows)
      if len(self._orders) > 2:
        self._orders.popitem(last=False)
    return self._rows.row(int(self._orders[epoch][place]), epoch=epoch)


class EndlessRows:
  """Gives a source that has a row for every index the length Grain asks for."""

  def __init__(self, rows: RecallRows):
    self._rows = rows

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: int) -> Row:
    return self._rows[index]


class ProcessRows:
  """The rows of one process: a run of consecutive rows out of each batch.

  Every n-th row instead would, with two processes and two kinds of rows in
  turn, give each process one kind only.
  """

  def __init__(
    self,
    rows: grain.MapDataset,
    *,
    batch_size: int,
    start: int,
    local: int,
  ):
    self._rows = rows
    self._batch_size = batch_size
    self._start = start
    self._local = local

  def __len__(self) -> int:
    return len(self._rows) // self._batch_size * self._local

  def __getitem__(self, index: int) -> Row:
    batch, place = divmod(index, self._local)
    row = self._rows[batch * self._batch_size + self._start + place]
    # Grain lets a dataset leave out elements; ours never do.
    return cast(Row, row)
