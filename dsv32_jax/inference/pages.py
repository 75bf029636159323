"""Which pages of the caches belong to whom. Host side, plain Python.

Where a mesh cuts the requests over groups of devices, every group has a pool of
its own and its requests use that: page numbers count within a group.
"""

from collections.abc import Sequence


class PagePool:
  """Free pages of every group."""

  def __init__(self, *, num_pages: int, page_size: int, groups: int = 1):
    """Starts with every page free.

    Args:
      num_pages: pages of each group.
      page_size: tokens a page holds.
      groups: pools.

    Raises:
      ValueError: a size below 1.
    """
    for name, value in (
      ('num_pages', num_pages),
      ('page_size', page_size),
      ('groups', groups),
    ):
      if value < 1:
        raise ValueError(f'{name}: got {value}, expected at least 1')
    self.num_pages = num_pages
    self.page_size = page_size
    self._used = [[False] * num_pages for _ in range(groups)]
    # Taken from the end, so that the lowest go first.
    self._free = [list(reversed(range(num_pages))) for _ in range(groups)]

  def pages_for(self, tokens: int) -> int:
    """Pages that so many tokens need."""
    return -(-tokens // self.page_size)

  def num_free(self, group: int | None = None) -> int:
    """Free pages of a group, or of all."""
    if group is None:
      return sum(map(len, self._free))
    return len(self._free[group])

  def take(self, count: int, *, group: int = 0) -> list[int] | None:
    """So many pages of a group; None, and nothing taken, if it has fewer."""
    free = self._free[group]
    if len(free) < count:
      return None
    pages = [free.pop() for _ in range(count)]
    for page in pages:
      self._used[group][page] = True
    return pages

  def give_back(self, pages: Sequence[int], *, group: int = 0) -> None:
    """Makes pages free again.

    Raises:
      ValueError: a page is not in use; two requests would share it later.
    """
    for page in pages:
      if not self._used[group][page]:
        raise ValueError(f'page: got {page} of group {group}, which is free')
      self._used[group][page] = False
      self._free[group].append(page)
