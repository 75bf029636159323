"""Compiled programs kept from one test run to the next, when asked for.

DSV32_TEST_CACHE=<folder> turns it on; `make test-all` uses it to spare a second
Python with the same jaxlib the compilations of the first. The key of an entry
holds the lowered program, the flags and jaxlib's version, so a hit is the same
program.

JAX writes its cache entries in place, and two processes that share a folder can
meet a half-written one. So each process works in a folder of its own, which
starts with links to all the finished entries, and hands its new ones over when
its session ends in good order.
"""

import os
import pathlib
import shutil

import jax

VARIABLE = 'DSV32_TEST_CACHE'


class CompilationCache:
  """The cache of one test process.

  Attributes:
    entries: the finished entries of all processes.
    own: the folder that JAX reads and writes in this process.
  """

  def __init__(self, folder: pathlib.Path):
    self.entries = folder / 'entries'
    self.own = folder / f'process-{os.getpid()}'

  def open(self) -> None:
    self.entries.mkdir(parents=True, exist_ok=True)
    self.own.mkdir()
    _link_missing(self.entries, self.own)
    jax.config.update('jax_compilation_cache_dir', str(self.own))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
    # XLA's own caches lie inside the folder, and jax 0.10.2 counts their path
    # in the key: no process would find what another has compiled.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')

  def close(self) -> None:
    _link_missing(self.own, self.entries)
    shutil.rmtree(self.own)


def _link_missing(source: pathlib.Path, target: pathlib.Path) -> None:
  for path in source.iterdir():
    try:
      os.link(path, target / path.name)
    except FileExistsError:
      pass
