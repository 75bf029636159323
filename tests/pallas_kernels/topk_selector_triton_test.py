"""Tests of the Triton selection; Triton has no kernels for a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import select_topk
from pallas_kernels.topk_selector import jax_triton
from tests.pallas_kernels import topk_selector_cases as cases

# Triton's and jax-triton's own.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


select_rows = cases.or_skip(jax_triton.select_rows)


def test_selection_without_a_gpu_says_so():
  if jax.default_backend() == 'gpu':
    pytest.skip('there is one')
  with pytest.raises(NotImplementedError, match='runs on NVIDIA GPUs'):
    select_topk(jnp.zeros((1, 2, 3)), k=2, implementation='triton')


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
  np.testing.assert_array_equal(
    select_rows(scores, k=k), cases.select(scores.astype(jnp.float32), k)
  )


@pytest.mark.gpu
def test_device_keeps_to_the_ranges():
  scores = np.stack(list(cases.rows(32768, 2048, seed=5).values()))
  start_R, end_R = cases.ranges(len(scores), 32768, seed=6)
  inside = cases.outside_removed(scores, start_R, end_R)
  indices = select_rows(
    jnp.asarray(scores), jnp.asarray(start_R), jnp.asarray(end_R), k=2048
  )
  np.testing.assert_array_equal(indices, cases.select(inside, 2048))
