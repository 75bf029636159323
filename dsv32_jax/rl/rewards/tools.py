"""What scorers work with: processes and sandboxes, started when needed."""

import pathlib
from collections.abc import Sequence

from dsv32_jax.agents.sandbox import Program, Result, SandboxPool
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.rl.problems import gym_datasets
from dsv32_jax.rl.rewards import judges, math_answers
from dsv32_jax.rl.rewards.types import Job, Mark
from dsv32_jax.rl.rewards.workers import Call, Reply, WorkerPool

# Files that scoring processes load. They import nothing of this project.
MODULES = {
  'gym_datasets': pathlib.Path(gym_datasets.__file__),
  'math_answers': pathlib.Path(math_answers.__file__),
}


class Tools:
  """Shared by the scorers of one reward model. Not for several threads."""

  def __init__(self, config: RewardConfig):
    """Starts nothing yet."""
    self._config = config
    self._judge = judges.make_judge(config.judge)
    self._workers: WorkerPool | None = None
    self._sandboxes: SandboxPool | None = None

  def run(self, calls: Sequence[Call]) -> list[Reply]:
    """The replies of scoring processes, in the order of the calls."""
    if self._workers is None:
      self._workers = WorkerPool(
        MODULES,
        workers=max(self._config.workers, 1),
        timeout_s=self._config.timeout_s,
      )
    return self._workers.run(calls)

  def run_programs(self, programs: Sequence[Program]) -> list[Result]:
    """The results of programs in sandboxes, in their order.

    Raises:
      SandboxError: if no sandbox works on this machine.
    """
    if self._sandboxes is None:
      self._sandboxes = SandboxPool(sandboxes=max(self._config.workers, 1))
    return self._sandboxes.run_many(programs)

  def judge(self, jobs: Sequence[Job]) -> list[Mark]:
    """The marks of the judge, in the order of jobs."""
    config = self._config.judge
    parallel = config.parallel if config.kind == 'openai' else 1
    return judges.marks(jobs, self._judge, parallel=parallel)

  def close(self) -> None:
    """Ends the processes and sandboxes."""
    for started in (self._workers, self._sandboxes):
      if started is not None:
        started.close()
    self._workers = self._sandboxes = None
