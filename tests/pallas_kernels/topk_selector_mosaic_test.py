"""Tests of the Mosaic GPU selection: simulated, interpreted, lowered, run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  indexed_topk,
  indices_to_mask,
  mosaic,
  select_topk,
)
from pallas_kernels.topk_selector import (
  config,
  pallas_mosaic_gpu,
  selecting,
  threshold,
  workspace,
)
from tests.pallas_kernels import topk_selector_cases as cases
from tests.pallas_kernels import topk_selector_simulator as simulator

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='the Mosaic GPU API of jax 0.11'
)
ROWS = tuple(cases.rows(8, 2, seed=0))


def simulate(scores, k, *, tile, capacity, threads, start=0, end=None):
  """The kernel's steps over one row, twice: the workspace must be clean."""
  bfloat16 = scores.dtype == jnp.bfloat16
  num_keys = len(scores)
  end = num_keys if end is None else end
  t = simulator.Threads(threads)
  mask_words = -(-num_keys // (32 * threads)) * threads
  w = workspace.Workspace(
    threads=t,
    scores=t.memory(capacity),
    indices=t.memory(capacity),
    histogram=t.memory(max(workspace.BINS, k)),
    mask=t.memory(mask_words),
    state=t.memory(workspace.STATE_WORDS),
    capacity=capacity,
    k=k,
    mask_words=mask_words,
  )
  selecting.start(w)
  turn = 0
  results = []
  for _ in range(2):
    count = t.constant(0)
    for at in range(0, num_keys, tile):
      first = min(at, num_keys - tile)
      words = np.ascontiguousarray(scores[first : first + tile]).view(np.uint32)
      append = functools.partial(
        selecting.append,
        w,
        simulator.Memory(t, words),
        size=tile,
        bfloat16=bfloat16,
        turn=t.constant(turn),
        first=t.constant(first),
        start=t.constant(max(start, at)),
        end=t.constant(max(start, at, end)),
      )
      overfull = append(count=count)
      if overfull.value[0] > capacity:
        selecting.prune(w, count, t.constant(turn))
        overfull = append(count=t.constant(k))
      count = overfull
      turn = (turn + 1) % 3
    if count.value[0] > k:
      threshold.select(w, count)
    out = t.memory(k)
    selecting.write(w, out, count, as_mask=False)
    results.append(out.words.view(np.int32).copy())
  np.testing.assert_array_equal(*results)
  return results[0]


@pytest.mark.filterwarnings('ignore:overflow encountered')
@pytest.mark.parametrize('name', [*ROWS, 'subnormal'])
def test_simulated_steps_select_what_a_sort_does(name):
  for num_keys, k, tile, capacity, threads in (
    (1500, 100, 256, 512, 64),
    (1030, 33, 128, 256, 32),
    (128, 1, 128, 256, 32),
  ):
    if name == 'subnormal':
      row = cases.subnormal_row(num_keys, seed=k)
    else:
      row = cases.rows(num_keys, k, seed=k)[name]
    sizes = {'tile': tile, 'capacity': capacity, 'threads': threads}
    np.testing.assert_array_equal(
      simulate(row, k, **sizes), cases.select(row[None], k)[0]
    )
    start, end = num_keys // 3, num_keys // 2
    bounds = np.array([[start], [end]])
    inside = cases.outside_removed(row[None], *bounds)
    np.testing.assert_array_equal(
      simulate(row, k, start=start, end=end, **sizes),
      cases.select(inside, k)[0],
    )


@pytest.mark.filterwarnings('ignore:overflow encountered')
@pytest.mark.parametrize('name', ['normal', 'duplicates', 'holes'])
def test_simulated_steps_read_bfloat16(name):
  row = cases.rows(2048, 200, seed=1)[name].astype(jnp.bfloat16)
  indices = simulate(row, 200, tile=512, capacity=1024, threads=64)
  np.testing.assert_array_equal(indices, cases.select(row[None], 200)[0])


@needs_api
@pytest.mark.parametrize('num_keys', [9, 700])
def test_interpreted_kernel_selects_what_a_sort_does(num_keys):
  k = num_keys // 7
  scores = np.stack(list(cases.rows(num_keys, k, seed=2).values()))
  indices = pallas_mosaic_gpu.select_rows(
    jnp.asarray(scores), k=k, target=mosaic.Target.INTERPRET
  )
  np.testing.assert_array_equal(indices, cases.select(scores, k))


@needs_api
def test_interpreted_kernel_gives_a_mask():
  scores = np.stack([cases.rows(901, 40, seed=3)[x] for x in ROWS[:3]])
  mask = pallas_mosaic_gpu.mask_rows(
    jnp.asarray(scores), k=40, target=mosaic.Target.INTERPRET
  )
  indices = np.stack([np.flatnonzero(row) for row in mask])
  np.testing.assert_array_equal(indices, cases.select(scores, 40))


@needs_api
def test_interpreted_kernel_has_no_races():
  scores = np.stack([cases.rows(901, 40, seed=3)[x] for x in ROWS[:3]])
  start_R, end_R = np.array([0, 5, 300]), np.array([901, 650, 301])
  indices = pallas_mosaic_gpu.select_rows(
    jnp.asarray(scores),
    jnp.asarray(start_R),
    jnp.asarray(end_R),
    k=40,
    target=mosaic.Target.INTERPRET_RACES,
  )
  inside = cases.outside_removed(scores, start_R, end_R)
  np.testing.assert_array_equal(indices, cases.select(inside, 40))


@needs_api
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  'shape', [(4096, 32768), (4096, 131072), (128, 131072), (3, 163841), (2, 9)]
)
def test_kernel_lowers_for_cuda(shape, dtype):
  run = jax.jit(
    functools.partial(
      pallas_mosaic_gpu.select_rows, k=2048, target=mosaic.Target.LOWER
    )
  )
  start = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
  scores = jax.ShapeDtypeStruct(shape, dtype)
  lowered = run.trace(scores, start, start).lower(lowering_platforms=('cuda',))
  assert 'mosaic_gpu' in lowered.as_text()


@needs_api
def test_mask_lowers_for_cuda():
  run = jax.jit(
    functools.partial(
      pallas_mosaic_gpu.mask_rows, k=2048, target=mosaic.Target.LOWER
    )
  )
  scores = jax.ShapeDtypeStruct((4096, 32768), jnp.float32)
  assert run.trace(scores).lower(lowering_platforms=('cuda',)).as_text()


@needs_api
@pytest.mark.parametrize(('keys', 'k'), [(10**7, 4), (10**5, 50000)])
def test_rows_beyond_shared_memory_are_refused(keys, k):
  with pytest.raises(NotImplementedError, match=f'the best {k} of {keys} keys'):
    jax.eval_shape(
      functools.partial(
        pallas_mosaic_gpu.select_rows, k=k, target=mosaic.Target.LOWER
      ),
      jax.ShapeDtypeStruct((1, keys), jnp.float32),
    )


def test_selection_without_a_gpu_says_so():
  if jax.default_backend() == 'gpu':
    pytest.skip('there is one')
  with pytest.raises(NotImplementedError):
    select_topk(jnp.zeros((1, 2, 3)), k=2, implementation='mosaic_gpu')


def test_chunks_hold_the_scores_in_bounded_memory():
  for keys in (1000, 32768, 131072, 163840):
    queries = config.chunk_queries(batch=1, num_queries=10**6, num_keys=keys)
    assert 4 * queries * keys <= 2**28
    assert queries % 64 == 0
  assert config.chunk_queries(batch=128, num_queries=1, num_keys=131072) == 1
  assert config.chunk_queries(batch=512, num_queries=9, num_keys=163840) == 1


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ('num_keys', 'k'),
  [(32768, 2048), (131072, 2048), (33001, 2048), (5000, 512), (9, 12)],
)
def test_device_selects_what_a_sort_does(num_keys, k, dtype):
  named = cases.rows(num_keys, k, seed=num_keys)
  named['subnormal'] = cases.subnormal_row(num_keys, seed=4)
  scores = jnp.asarray(np.stack(list(named.values())), dtype)
  indices = pallas_mosaic_gpu.select_rows(scores, k=k)
  np.testing.assert_array_equal(
    indices, cases.select(scores.astype(jnp.float32), k)
  )


@pytest.mark.gpu
def test_device_keeps_to_the_ranges():
  scores = np.stack(list(cases.rows(32768, 2048, seed=5).values()))
  start_R, end_R = cases.ranges(len(scores), 32768, seed=6)
  inside = cases.outside_removed(scores, start_R, end_R)
  # What lies outside is not looked at, whatever it holds.
  poisoned = np.where(np.isneginf(inside) & ~np.isneginf(scores), 9e9, scores)
  indices = pallas_mosaic_gpu.select_rows(
    jnp.asarray(poisoned, jnp.float32),
    jnp.asarray(start_R),
    jnp.asarray(end_R),
    k=2048,
  )
  np.testing.assert_array_equal(indices, cases.select(inside, 2048))


@pytest.mark.gpu
def test_device_selects_the_same_in_many_rows_and_twice():
  scores = jax.random.normal(jax.random.key(7), (1, 1500, 32768))
  once = select_topk(scores, k=2048, implementation='mosaic_gpu').indices_BTK
  again = select_topk(scores, k=2048, implementation='mosaic_gpu').indices_BTK
  np.testing.assert_array_equal(once, again)
  mask = pallas_mosaic_gpu.selection_mask(scores, k=2048)
  np.testing.assert_array_equal(mask, indices_to_mask(once, 32768))
  xla = select_topk(scores[:, :64], k=2048, implementation='xla').indices_BTK
  np.testing.assert_array_equal(once[:, :64], xla)


@pytest.mark.gpu
def test_device_indexed_selection_holds_one_chunk_of_scores():
  q, k, w = (
    jax.ShapeDtypeStruct((1, 32768, *shape), jnp.bfloat16)
    for shape in ((64, 128), (128,), (64,))
  )
  run = jax.jit(functools.partial(indexed_topk, k=2048))
  compiled = run.lower(q, k, w).compile()
  # One chunk, 256 MiB, and the indices again where chunks are joined; every
  # score would be 4 GiB.
  assert compiled.memory_analysis().temp_size_in_bytes < 2**30
