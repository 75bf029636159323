"""What the pipeline asks of a family of tasks."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from dsv32_jax.agents.synthesis.tasks import TaskRecord
from dsv32_jax.agents.types import Environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
  """What came of one environment.

  Attributes:
    tasks: that passed every check, in order.
    rejected: by reason, how many did not.
  """

  tasks: tuple[TaskRecord, ...]
  rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Family(Protocol):
  """Makes environments with tasks, and opens them. Can be pickled.

  Attributes:
    name: as `TaskRecord.family` has it.
  """

  @property
  def name(self) -> str: ...

  def make(
    self, *, seed: int, index: int, tasks: int, database: pathlib.Path
  ) -> Made:
    """Makes environment `index`, the same for the same arguments.

    Args:
      seed: of the data set.
      index: of the environment.
      tasks: how many it should have; fewer if too many are rejected.
      database: where to write its SQLite file.
    """
    ...

  def environment(
    self, task: TaskRecord, database: pathlib.Path
  ) -> Environment:
    """Opens a task for one episode."""
    ...

  def check(self, task: TaskRecord, database: pathlib.Path) -> Any:
    """Runs the reference solution and the weak answers again.

    Raises:
      ValueError: saying which check failed.
    """
    ...
