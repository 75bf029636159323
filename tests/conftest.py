"""What every test runs under, and the fixtures that they share.

Tests run on eight virtual CPU devices. `--platform=gpu` (or
DSV32_TEST_PLATFORM=gpu) puts them on the GPU instead and lets the tests marked
`gpu` run.
"""

import importlib.util
import os
import pathlib
import sys
import zlib

import pytest

_NUM_CPU_DEVICES = 8
_DEVICE_COUNT_FLAG = '--xla_force_host_platform_device_count'
_CACHE = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
  group = parser.getgroup('dsv32_jax')
  group.addoption(
    '--platform',
    choices=('cpu', 'gpu'),
    default=os.environ.get('DSV32_TEST_PLATFORM', 'cpu'),
    help='where JAX runs; tests marked `gpu` run on gpu only',
  )
  group.addoption(
    '--key-seed',
    type=int,
    default=0,
    help='shifts the seed of every `key` fixture',
  )


def pytest_configure(config: pytest.Config) -> None:
  """Sets JAX up before anything imports it."""
  if 'jax' in sys.modules:
    # The platform is read when jax is imported; too late now.
    raise pytest.UsageError('jax was imported before tests/conftest.py')
  on_gpu = config.getoption('--platform') == 'gpu'
  os.environ['JAX_PLATFORMS'] = 'cuda,cpu' if on_gpu else 'cpu'
  # Workers share the GPU: none may reserve most of it.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  flags = os.environ.get('XLA_FLAGS', '')
  if _DEVICE_COUNT_FLAG not in flags:
    flags = f'{flags} {_DEVICE_COUNT_FLAG}={_NUM_CPU_DEVICES}'.strip()
    os.environ['XLA_FLAGS'] = flags
  # Nor may a test reach for the network or leave a telemetry thread behind.
  os.environ.setdefault('HF_HUB_OFFLINE', '1')
  os.environ.setdefault('MPLBACKEND', 'Agg')

  import jax

  jax.config.update('jax_numpy_rank_promotion', 'raise')

  from tests.support import compilation_cache

  if folder := os.environ.get(compilation_cache.VARIABLE):
    cache = compilation_cache.CompilationCache(pathlib.Path(folder))
    cache.open()
    config.stash[_CACHE] = cache


def pytest_sessionfinish(session: pytest.Session) -> None:
  if cache := session.config.stash.get(_CACHE, None):
    cache.close()


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  on_gpu = config.getoption('--platform') == 'gpu'
  has_torch = importlib.util.find_spec('torch') is not None
  has_tunix = importlib.util.find_spec('tunix') is not None
  for item in items:
    if not on_gpu and item.get_closest_marker('gpu'):
      item.add_marker(pytest.mark.skip(reason='needs --platform=gpu'))
    if not has_torch and item.get_closest_marker('torch'):
      item.add_marker(pytest.mark.skip(reason="needs '.[parity]'"))
    if not has_tunix and item.get_closest_marker('tunix'):
      reason = 'needs google-tunix==0.1.7 (tests/support/tunix_cases.py)'
      item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def key(request: pytest.FixtureRequest):
  """A `jax.random.key` of the test's own, the same in every run.

  The seed is printed, so pytest shows it when the test fails.
  """
  import jax

  seed = zlib.crc32(request.node.nodeid.encode())
  seed = (seed + request.config.getoption('--key-seed')) % 2**31
  print(f'key: jax.random.key({seed})')
  return jax.random.key(seed)


@pytest.fixture(scope='session')
def data_mesh():
  """A mesh of the eight virtual CPU devices along one axis, `data`."""
  import jax

  devices = jax.devices('cpu')
  if len(devices) < _NUM_CPU_DEVICES:
    pytest.fail(
      f'{_DEVICE_COUNT_FLAG} in XLA_FLAGS leaves {len(devices)} CPU devices;'
      f' the tests need {_NUM_CPU_DEVICES}'
    )
  # Auto axes: flax.linen's logical constraints are hints there, and asserts
  # under jax.make_mesh's default.
  return jax.make_mesh(
    (_NUM_CPU_DEVICES,),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices[:_NUM_CPU_DEVICES],
  )
