"""Scores and selection together against their definitions in numpy.

On a CPU xla with few keys, on a GPU the kernels with V3.2's k.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import indexed_topk, lightning_indexer, select_topk
from tests.pallas_kernels import lightning_indexer_cases as indexer_cases
from tests.pallas_kernels import topk_selector_cases as cases

# (queries, keys, selected): nothing a multiple of anything.
_SMALL = (70, 701, 130)
_LARGE = (403, 9001, 2048)
_SIZES = {'xla': _SMALL, 'mosaic_gpu': _LARGE, 'triton': _LARGE}
implementations = pytest.mark.parametrize('name', ['xla', *cases.KERNELS])
indexers = pytest.mark.parametrize(
  ('heads', 'dim'), [(64, 128), (32, 128), (16, 64)]
)


def _scorer(name):
  """What computes the scores; Triton has no kernel for them."""
  return 'mosaic_gpu' if name == 'triton' else name


@functools.cache
def selector(name, k, *, quantized):
  """(q, k, w, start, end) -> indices."""

  def run(q_index, k_index, w, start, end):
    ranges = {'key_start_BT': start, 'key_end_BT': end}
    if not quantized:
      selection = indexed_topk(
        q_index, k_index, w, k=k, implementation=name, **ranges
      )
    else:
      # As a caller has it that wants float8 scores.
      scores = lightning_indexer(
        q_index,
        k_index,
        w,
        quantized=True,
        implementation=_scorer(name),
        **ranges,
      )
      selection = select_topk(scores, k=k, implementation=name)
    return selection.indices_BTK

  jitted = jax.jit(run)

  def call(*arguments):
    if name != 'xla':
      indexer_cases.poison()
    return np.asarray(jitted(*arguments))

  return call if name == 'xla' else cases.or_skip(call)


def whole_numbers(num_queries, num_keys, heads, dim, *, seed):
  """Arrays whose scores are exact in bfloat16 and float8, with many ties.

  Keys come from a pool, so that each has duplicates; a third of them are 0, a
  plateau of zero scores amid the others. The largest entry of every other
  vector is 7, which makes its float8 scale 1/64.
  """
  rng = np.random.default_rng(seed)
  q = rng.integers(-1, 2, (1, num_queries, heads, dim))
  pool = rng.integers(-1, 2, (num_keys // 5, dim))
  q[..., 0] = pool[:, 1] = 7
  pool[::3] = 0
  k = pool[rng.integers(0, len(pool), num_keys)][None]
  w = rng.integers(-3, 4, (1, num_queries, heads))
  return tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, w))


def all_ranges(num_queries, num_keys, k):
  """Name to the ranges of one sequence."""
  rng = np.random.default_rng(num_keys)
  position = np.arange(num_queries)
  causal = position + 1 + num_keys - num_queries
  # Documents of many lengths, one key and less than k among them; then
  # padding. Each row sees its document up to itself.
  cuts = np.array([0, 1, k // 2, k, num_keys // 2, num_keys - 5, num_keys])
  document = np.sort(rng.integers(0, len(cuts) - 1, num_queries))
  first, last = cuts[document], cuts[document + 1]
  packed_end = (
    first + 1 + rng.integers(0, num_keys, num_queries) % (last - first)
  )
  padding = position >= num_queries - 9
  zeros = np.zeros_like(position)
  ranges = {
    'causal': (zeros, causal),
    'packed': (
      np.where(padding, num_keys, first),
      np.where(padding, num_keys, packed_end),
    ),
    'shorter_than_k': (causal - position % k, causal),
    'no_key': (causal, causal),
  }
  return {
    name: tuple(jnp.asarray(x[None], jnp.int32) for x in bounds)
    for name, bounds in ranges.items()
  }


@pytest.mark.slow
@implementations
@indexers
@pytest.mark.parametrize('quantized', [False, True])
def test_indexed_selection_of_whole_numbers_is_the_definitions(
  name, heads, dim, quantized
):
  queries, keys, k = _SIZES[name]
  arrays = whole_numbers(queries, keys, heads, dim, seed=heads)
  run = selector(name, k, quantized=quantized)
  every_key = np.zeros((1, queries)), np.full((1, queries), keys)
  scores = indexer_cases.numpy_scores(*arrays, *every_key)[0]
  assert np.mean(scores == 0) > 0.2
  assert len(np.unique(scores)) < scores.size / 5
  for how, ranges in all_ranges(queries, keys, k).items():
    inside = cases.outside_removed(scores, *(np.asarray(x[0]) for x in ranges))
    np.testing.assert_array_equal(
      run(*arrays, *ranges)[0], cases.select(inside, k), err_msg=how
    )


@implementations
@pytest.mark.parametrize('quantized', [False, True])
def test_indexed_selection_differs_only_within_the_scores_error(
  name, quantized
):
  queries, keys, k = _SIZES[name]
  q_index, k_index, w, _ = indexer_cases.make(1, queries, keys, 64, 128, seed=3)
  ranges = all_ranges(queries, keys, k)['causal']
  arguments = (q_index, k_index, w, *ranges)
  desired = indexer_cases.numpy_scores(*arguments, quantized=quantized)[0]
  scores = lightning_indexer(
    q_index,
    k_index,
    w,
    key_start_BT=ranges[0],
    key_end_BT=ranges[1],
    quantized=quantized,
    implementation=_scorer(name),
  )
  finite = np.isfinite(desired)
  error = np.max(np.abs(np.asarray(scores)[0][finite] - desired[finite]))
  assert error < 1e-2 * np.std(desired[finite])
  indices = selector(name, k, quantized=quantized)(*arguments)[0]
  expected = cases.select(desired, k)
  for row, chosen, best in zip(desired, indices, expected, strict=True):
    assert np.all(chosen >= 0)
    assert len(np.unique(chosen)) == k
    kth = np.min(row[best])
    for key in np.setxor1d(chosen, best):
      assert abs(row[key] - kth) <= 4 * error
