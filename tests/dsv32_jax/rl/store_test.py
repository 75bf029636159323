import dataclasses
import shutil

import numpy as np
import pytest

from dsv32_jax.rl import store
from dsv32_jax.rl.types import Group, Response, Scored


def response(seed: int, *, prompt: int, new: int, recorded: bool) -> Response:
  rng = np.random.default_rng(seed)
  total = prompt + new
  tokens = rng.integers(0, 300, total, dtype=np.int32)
  kept = []
  for token in tokens[prompt:]:
    others = np.setdiff1d(rng.integers(0, 300, 3), token)
    is_whole = rng.random() < 0.3
    kept.append(None if is_whole else np.append(others, token))
  return Response(
    tokens=tokens,
    is_policy=np.arange(total) >= prompt,
    sampling_logprobs=rng.standard_normal(total).astype(np.float32),
    finish_reason='stop' if seed % 2 else 'length',
    kept=tuple(kept) if recorded else None,
    experts=rng.integers(0, 200, (total - 1, 2, 3)) if recorded else None,
    # Tables of different widths, and no key in some places.
    selected=(
      rng.integers(-1, total, (total - 1, 4, 3 + seed)) if recorded else None
    ),
    temperature=0.7,
    weight_version=seed,
  )


def groups(recorded: bool) -> list[Group]:
  return [
    Group(
      problem=f'problem {number}',
      domain='mathematics',
      mode='chat',
      responses=tuple(
        Scored(
          response=response(
            3 * number + i, prompt=4 + i, new=1 + number, recorded=recorded
          ),
          reward=0.1 + number / 3,
          components={'outcome': i / 7, 'length': 1.0},
        )
        for i in range(3)
      ),
    )
    for number in range(2)
  ]


def assert_same(found, expected) -> None:
  if isinstance(expected, np.ndarray):
    np.testing.assert_array_equal(found, expected)
  elif dataclasses.is_dataclass(expected):
    for field in dataclasses.fields(expected):
      name = field.name
      assert_same(getattr(found, name), getattr(expected, name))
  elif isinstance(expected, (tuple, list)):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
      assert_same(one, other)
  else:
    assert found == expected


@pytest.mark.parametrize('recorded', [True, False])
def test_store_gives_back_what_it_was_given(tmp_path, recorded):
  rollouts = store.RolloutStore(tmp_path / 'rollouts')
  expected = groups(recorded)
  assert rollouts.load('batch_00000003') is None
  rollouts.save('batch_00000003', expected, {'seconds': 1.5})
  found, extra = rollouts.load('batch_00000003')
  assert_same(found, expected)
  assert extra == {'seconds': 1.5}


def test_store_does_not_find_what_is_damaged_or_was_cut_short(tmp_path):
  rollouts = store.RolloutStore(tmp_path)
  for name in ('batch_00000000', 'batch_00000001'):
    rollouts.save(name, groups(True), {})
  arrays = tmp_path / 'batch_00000000' / 'arrays.npz'
  content = bytearray(arrays.read_bytes())
  content[len(content) // 2] ^= 1
  arrays.write_bytes(content)
  shutil.move(tmp_path / 'batch_00000001', tmp_path / 'batch_00000002.tmp')
  assert rollouts.load('batch_00000000') is None
  assert rollouts.load('batch_00000001') is None
  assert rollouts.load('batch_00000002') is None
  # It is written anew over what is left.
  rollouts.save('batch_00000000', groups(True), {'again': True})
  assert rollouts.load('batch_00000000')[1] == {'again': True}


def test_store_keeps_the_first_of_two_and_prunes_what_is_behind(tmp_path):
  rollouts = store.RolloutStore(tmp_path)
  for number in range(4):
    rollouts.save(store.batch_name(number), groups(False), {'n': number})
    rollouts.save(store.part_name(number, 1), groups(False), {})
  rollouts.save(store.batch_name(2), groups(True), {'n': 'other'})
  assert rollouts.load(store.batch_name(2))[1] == {'n': 2}
  rollouts.prune(before=2)
  left = sorted(path.name for path in tmp_path.iterdir())
  assert left == [
    'batch_00000002',
    'batch_00000002_part_001',
    'batch_00000003',
    'batch_00000003_part_001',
  ]
