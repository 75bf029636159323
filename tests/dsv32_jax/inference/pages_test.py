"""Pages are given to one owner at a time, and come back."""

import numpy as np
import pytest

from dsv32_jax.inference.pages import PagePool


def test_pages_are_never_given_twice_under_random_use():
  generator = np.random.default_rng(0)
  pool = PagePool(num_pages=12, page_size=4, groups=2)
  held: list[tuple[int, list[int]]] = []
  for _ in range(2000):
    group = int(generator.integers(2))
    if generator.random() < 0.5:
      free = pool.num_free(group)
      count = int(generator.integers(1, 6))
      pages = pool.take(count, group=group)
      assert (pages is None) == (count > free)
      if pages is not None:
        held.append((group, pages))
    elif held:
      group, pages = held.pop(int(generator.integers(len(held))))
      pool.give_back(pages, group=group)
    for group in range(2):
      taken = [page for g, pages in held if g == group for page in pages]
      assert len(taken) == len(set(taken))
      assert len(taken) + pool.num_free(group) == 12


def test_pages_for_rounds_up():
  pool = PagePool(num_pages=2, page_size=4)
  assert [pool.pages_for(n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_give_back_of_a_free_page_is_refused():
  pool = PagePool(num_pages=2, page_size=4)
  pages = pool.take(1)
  pool.give_back(pages)
  with pytest.raises(ValueError, match='which is free'):
    pool.give_back(pages)


def test_pool_of_no_pages_is_refused():
  with pytest.raises(ValueError, match='num_pages: got 0'):
    PagePool(num_pages=0, page_size=4)
