"""The test suite's own compilation cache."""

import os
import subprocess
import sys

from tests.support import compilation_cache

PROGRAM = """
import pathlib, sys
import jax, jax.numpy as jnp
from jax import monitoring
from tests.support import compilation_cache

hits = []
monitoring.register_event_listener(
  lambda name, **_: hits.append(name) if name.endswith('cache_hits') else None
)
cache = compilation_cache.CompilationCache(pathlib.Path(sys.argv[1]))
cache.open()
value = jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum()
if sys.argv[2] == 'close':
  cache.close()
print(len(hits), float(value).hex())
"""


def run(folder, end: str) -> tuple[int, str]:
  result = subprocess.run(
    [sys.executable, '-c', PROGRAM, str(folder), end],
    env=dict(os.environ, PYTHONPATH=os.getcwd()),
    capture_output=True,
    text=True,
    check=True,
  )
  hits, value = result.stdout.split()
  return int(hits), value


def test_compilation_cache_second_process_finds_what_the_first_compiled(
  tmp_path,
):
  first, value = run(tmp_path, 'close')
  assert first == 0
  second, again = run(tmp_path, 'close')
  assert second > 0
  assert again == value


def test_compilation_cache_of_a_process_that_died_hands_nothing_over(tmp_path):
  run(tmp_path, 'die')
  assert run(tmp_path, 'close')[0] == 0


def test_compilation_cache_hand_over_keeps_entries_of_other_processes(tmp_path):
  cache = compilation_cache.CompilationCache(tmp_path)
  cache.entries.mkdir()
  cache.own.mkdir()
  (cache.entries / 'a-cache').write_text('theirs')
  (cache.own / 'a-cache').write_text('ours')
  (cache.own / 'b-cache').write_text('new')
  cache.close()
  kept = {path.name: path.read_text() for path in cache.entries.iterdir()}
  assert kept == {'a-cache': 'theirs', 'b-cache': 'new'}
  assert not cache.own.exists()
