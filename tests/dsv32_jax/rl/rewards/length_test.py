import numpy as np
import pytest

from dsv32_jax.rl.rewards import length_penalty


@pytest.mark.parametrize(
  ('length', 'expected'),
  [(0, 0.0), (60, 0.0), (61, 0.025), (80, 0.5), (100, 1.0), (140, 1.0)],
)
def test_penalty_rises_over_the_buffer(length, expected):
  found = length_penalty(length, max_length=100, buffer=40)
  assert found == pytest.approx(expected)


def test_penalty_is_the_formula_clipped():
  for length in range(0, 200, 7):
    expected = np.clip((length - (100 - 30)) / 30, 0, 1)
    found = length_penalty(length, max_length=100, buffer=30)
    assert found == pytest.approx(expected)


def test_penalty_without_buffer_is_a_step_at_the_end():
  values = [length_penalty(n, max_length=10, buffer=0) for n in (9, 10, 11)]
  assert values == [0.0, 1.0, 1.0]
