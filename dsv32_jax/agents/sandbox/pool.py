"""Several sandboxes at work on one batch."""

import threading
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from dsv32_jax.agents.sandbox.sandbox import Sandbox
from dsv32_jax.agents.sandbox.types import Program, Result


class SandboxPool:
  """Several sandboxes that share a batch of programs."""

  def __init__(self, *, sandboxes: int = 2, **options: Any):
    """Starts nothing yet.

    Args:
      sandboxes: how many run at a time.
      **options: of each `Sandbox`.
    """
    if sandboxes < 1:
      raise ValueError(f'sandboxes: got {sandboxes}, expected at least 1')
    self._sandboxes = [Sandbox(**options) for _ in range(sandboxes)]

  def run_many(self, programs: Sequence[Program]) -> list[Result]:
    """Runs programs, several at a time; results in the order of programs.

    One program can take time from another, and no more than that. So those
    that ran out of wall time are run again, one by one, and only then believed.
    """
    waiting = iter(range(len(programs)))
    results: dict[int, Result] = {}
    lock = threading.Lock()

    def work(sandbox: Sandbox) -> None:
      while True:
        with lock:
          index = next(waiting, None)
        if index is None:
          return
        results[index] = sandbox.run(programs[index])

    if len(self._sandboxes) == 1 or len(programs) < 2:
      work(self._sandboxes[0])
    else:
      with futures.ThreadPoolExecutor(len(self._sandboxes)) as threads:
        for done in [threads.submit(work, s) for s in self._sandboxes]:
          done.result()
    alone = self._sandboxes[0]
    for index, result in sorted(results.items()):
      if result.status in ('timeout', 'error'):
        alone.close()
        results[index] = alone.run(programs[index])
    return [results[index] for index in range(len(programs))]

  def close(self) -> None:
    """Ends all sandboxes."""
    for sandbox in self._sandboxes:
      sandbox.close()

  def __enter__(self) -> 'SandboxPool':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
