"""Makes a task set: in parallel, resumable, the same for the same seed.

The unit of work is one environment. What it came to is written to a file of its
own, after its database, by a rename; a run that was killed makes again what was
under way and nothing else. At the end all units are read in order, near-
duplicates go, and the JSONL files and the report are written.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dsv32_jax.agents.synthesis import filters, report, tasks
from dsv32_jax.agents.synthesis.family import Family

# How often the progress line is written, in seconds.
_PROGRESS_EVERY_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyPlan:
  """How much of a family to make.

  Attributes:
    environments: databases.
    tasks: over all of them, spread evenly.
    held_out: domains whose tasks go to held_out.jsonl.
  """

  environments: int
  tasks: int
  held_out: tuple[str, ...] = ()

  def __post_init__(self):
    if self.environments < 1:
      raise ValueError(f'environments: got {self.environments}, expected 1 up')
    if self.tasks < self.environments:
      raise ValueError(
        f'tasks: got {self.tasks}, expected at least the {self.environments} '
        'environments'
      )

  def quota(self, index: int) -> int:
    """Tasks of an environment."""
    return (index + 1) * self.tasks // self.environments - (
      index * self.tasks // self.environments
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """A task set.

  Attributes:
    seed: of everything.
    workers: processes.
    families: plans by name.
    duplicates_at: Jaccard index of masked prompts at which one goes.
  """

  seed: int = 0
  workers: int = 2
  families: dict[str, FamilyPlan] = dataclasses.field(default_factory=dict)
  duplicates_at: float = 0.8

  def __post_init__(self):
    if self.workers < 1:
      raise ValueError(f'workers: got {self.workers}, expected 1 up')
    if not self.families:
      raise ValueError('families: got none, expected at least one')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
  """One environment that is to be made."""

  family: str
  index: int
  tasks: int

  @property
  def name(self) -> str:
    return f'{self.family}-{self.index:05d}'


def run(
  config: PipelineConfig,
  families: Mapping[str, Family],
  workdir: pathlib.Path,
  progress: Callable[[str], None] = lambda line: None,
) -> report.Report:
  """Makes the task set, or goes on with it.

  Args:
    config: what to make.
    families: who makes it, by name.
    workdir: tasks.jsonl, held_out.jsonl, databases/, report.json, report.md.
    progress: is told how far it is.

  Returns:
    The report, as it was written.

  Raises:
    ValueError: for a family that nobody makes, or a workdir of other tasks.
  """
  unknown = set(config.families) - set(families)
  if unknown:
    raise ValueError(
      f'families: got {sorted(unknown)}, expected some of {sorted(families)}'
    )
  for folder in ('units', 'databases'):
    (workdir / folder).mkdir(parents=True, exist_ok=True)
  _claim(config, families, workdir)
  units = [
    Unit(family=name, index=index, tasks=plan.quota(index))
    for name, plan in sorted(config.families.items())
    for index in range(plan.environments)
  ]
  missing = [unit for unit in units if not _path(workdir, unit).exists()]
  begun = shown = time.monotonic()
  num_tasks = 0
  for number, found in enumerate(
    _made(config, families, workdir, missing), start=1
  ):
    num_tasks += found
    now = time.monotonic()
    if now - shown >= _PROGRESS_EVERY_S or number == len(missing):
      shown = now
      rate = num_tasks / (now - begun)
      left = (now - begun) / number * (len(missing) - number)
      progress(
        f'{len(units) - len(missing) + number}/{len(units)} environments, '
        f'{rate:.1f} tasks/s, {left:.0f} s left'
      )
  return _finish(config, workdir, units, time.monotonic() - begun, num_tasks)


def _made(
  config: PipelineConfig,
  families: Mapping[str, Family],
  workdir: pathlib.Path,
  units: list[Unit],
) -> Iterator[int]:
  """Makes units and yields how many tasks each has, as they are done."""
  if config.workers == 1 or len(units) < 2:
    for unit in units:
      yield make_unit(families[unit.family], config.seed, unit, workdir)
    return
  # Spawned: nothing that a parent's threads hold is copied.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(
    config.workers, mp_context=context
  ) as pool:
    futures = [
      pool.submit(make_unit, families[unit.family], config.seed, unit, workdir)
      for unit in units
    ]
    try:
      for future in concurrent.futures.as_completed(futures):
        yield future.result()
    finally:
      pool.shutdown(cancel_futures=True)


def make_unit(
  family: Family, seed: int, unit: Unit, workdir: pathlib.Path
) -> int:
  """Makes one environment, and returns how many tasks it has.

  Raises:
    RuntimeError: naming the environment in which something failed.
  """
  database = workdir / 'databases' / f'{unit.name}.db'
  partial = database.with_suffix('.partial')
  partial.unlink(missing_ok=True)
  begun = time.process_time()
  try:
    made = family.make(
      seed=seed, index=unit.index, tasks=unit.tasks, database=partial
    )
  except Exception as error:
    raise RuntimeError(
      f'environment {unit.name} with seed {seed}: '
      f'{type(error).__name__}: {error}'
    ) from error
  partial.replace(database)
  value = {
    'tasks': [task.to_json() for task in made.tasks],
    'rejected': dict(made.rejected),
    'cpu_s': time.process_time() - begun,
  }
  path = _path(workdir, unit)
  written = path.with_suffix('.partial')
  written.write_text(json.dumps(value, ensure_ascii=False), encoding='utf-8')
  written.replace(path)
  return len(made.tasks)


def _path(workdir: pathlib.Path, unit: Unit) -> pathlib.Path:
  return workdir / 'units' / f'{unit.name}.json'


def _claim(
  config: PipelineConfig,
  families: Mapping[str, Family],
  workdir: pathlib.Path,
) -> None:
  """Writes what the workdir holds, or refuses one that holds other tasks."""
  # How many processes make it does not change what is made.
  value: dict[str, Any] = {
    'version': tasks.VERSION,
    **dataclasses.asdict(dataclasses.replace(config, workers=1)),
    'makers': {name: repr(families[name]) for name in sorted(config.families)},
  }
  value = json.loads(json.dumps(value))
  path = workdir / 'config.json'
  if not path.exists():
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(value, indent=2), encoding='utf-8')
    partial.replace(path)
    return
  before = json.loads(path.read_text(encoding='utf-8'))
  for name in value:
    if before.get(name) != value[name]:
      raise ValueError(
        f'{name}: got {value[name]!r}, expected {before.get(name)!r}, of which '
        f'{workdir} holds a part'
      )


def _finish(
  config: PipelineConfig,
  workdir: pathlib.Path,
  units: list[Unit],
  wall_s: float,
  made_now: int,
) -> report.Report:
  near = filters.NearDuplicates(config.duplicates_at)
  kept: dict[bool, list[tasks.TaskRecord]] = {False: [], True: []}
  parts = {name: report.Part() for name in config.families}
  for unit in units:
    value = json.loads(_path(workdir, unit).read_text(encoding='utf-8'))
    part = parts[unit.family]
    part.environments += 1
    part.asked += unit.tasks
    part.cpu_s += value['cpu_s']
    part.rejected += collections.Counter(value['rejected'])
    for one in value['tasks']:
      task = tasks.from_json(one)
      if near.find(filters.masked(task.prompt, task.names)) is not None:
        part.near_duplicates += 1
        continue
      part.add(task)
      held_out = task.domain in config.families[unit.family].held_out
      kept[held_out].append(task)
  tasks.write(workdir / 'tasks.jsonl', kept[False])
  tasks.write(workdir / 'held_out.jsonl', kept[True])
  made = report.Report(parts=parts, wall_s=wall_s, made_now=made_now)
  made.write(workdir)
  return made
