"""Measures cases: ours and the rivals take turns, round after round."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks import (
  costs,
  errors,
  measure,
  programs,
  rivals,
  table,
)
from pallas_kernels.benchmarks import records as records_lib
from pallas_kernels.benchmarks.costs import FORWARD
from pallas_kernels.benchmarks.op import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One op, shape and direction, and who computes it.

  Attributes:
    op: what.
    shape: name of its spec.
    direction: what is timed.
    dtype: of the inputs.
    implementations: ours.
    rivals: names in `rivals.PACKAGES`.
    calls: in one program of ours.
    row: of the table, if it is one.
  """

  op: Op
  shape: str
  direction: str
  dtype: str
  implementations: Sequence[str]
  rivals: Sequence[str]
  calls: int = 1
  row: table.Row | None = None

  @property
  def spec(self) -> Any:
    return self.op.specs[self.shape]

  @property
  def cost(self) -> costs.Cost:
    size = jnp.dtype(self.dtype).itemsize
    return self.op.cost(self.spec, self.direction, size)

  def key(self, rival: str) -> tuple[str, str, str]:
    """Of a rival's worker."""
    return rival, self.op.name, self.direction

  def build(self, implementation: str) -> programs.Program:
    return programs.build(
      self.op,
      implementation,
      self.spec,
      self.direction,
      dtype=jnp.dtype(self.dtype),
      calls=self.calls,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How to measure.

  Attributes:
    worker: command of a rival's process.
    rounds: turns each.
    seed: of the inputs.
    with_errors: whether to compare with the definition.
    is_prepared: whether all programs and rivals are made ready before the
      first is timed; otherwise each case's before it.
    start_limit: seconds until all rivals must have run, or one that wasn't
      prepared.
    threads: programs compiled at a time, if prepared.
  """

  worker: Sequence[str]
  rounds: int = 5
  seed: int = 0
  with_errors: bool = True
  is_prepared: bool = False
  start_limit: float = rivals.START_LIMIT
  threads: int = 8


def table_cases(ops: Mapping[str, Op], rows: Sequence[table.Row]) -> list[Case]:
  """The cases of some rows."""
  return [
    Case(
      op=ops[row.op],
      shape=row.shape,
      direction=row.direction,
      dtype='bfloat16',
      implementations=row.implementations,
      rivals=(row.rival,),
      calls=row.calls,
      row=row,
    )
    for row in rows
  ]


def run(
  cases: Sequence[Case],
  settings: Settings,
  say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict]:
  """Yields a record for each implementation and rival, case by case.

  Args:
    cases: what to measure.
    settings: how.
    say: is told what is being waited for.
  """
  with (
    rivals.Workers(settings.worker) as workers,
    concurrent.futures.ThreadPoolExecutor(settings.threads) as pool,
  ):
    ready = {}
    if settings.is_prepared:
      begin = time.monotonic()
      # Compiling ours takes as many threads as the rivals leave; first come,
      # first served, so that an interrupted run has the first rows.
      futures = {
        (i, name): pool.submit(case.build, name)
        for i, case in enumerate(cases)
        for name in case.implementations
      }
      specs: dict[tuple[str, str, str], list[Any]] = {}
      for case in cases:
        for rival in case.rivals:
          some = specs.setdefault(case.key(rival), [])
          some += [case.spec] if case.spec not in some else []
      say(f'{len(futures)} programs to compile, {len(specs)} rivals to start')
      workers.warm(specs, limit=settings.start_limit)
      say(f'rivals ready after {time.monotonic() - begin:.0f} s')
      concurrent.futures.wait(futures.values())
      say(f'ours compiled after {time.monotonic() - begin:.0f} s')
      ready = futures
    ceilings = measure.ceilings()
    machine = records_lib.machine(ceilings)
    say(
      '{device}, jax {jax}: {matmul} matmul {matmul_tflops} TFLOP/s, copy '
      '{copy_gbps} GB/s'.format(**machine)
    )
    for i, case in enumerate(cases):
      programs_of_case = {
        name: ready.pop((i, name), None) for name in case.implementations
      }
      for record in _measured(
        case, settings, ceilings, programs_of_case, workers
      ):
        yield {**record, **machine}


def _measured(
  case: Case,
  settings: Settings,
  ceilings: measure.Ceilings,
  ready: Mapping[str, concurrent.futures.Future | None],
  workers: rivals.Workers,
) -> list[dict]:
  """The records of a case; its arrays are gone afterwards."""
  base: dict[str, Any] = {
    'op': case.op.name,
    'shape': case.shape,
    'direction': case.direction,
    'dtype': case.dtype,
  }
  records, runners = [], []
  with_arguments = _Arguments(case, settings)
  for name, future in ready.items():
    record: dict[str, Any] = {**base, 'implementation': name}
    records.append(record)
    try:
      run, outputs = with_arguments.first_run(_program(case, name, future))
      if settings.with_errors:
        record |= with_arguments.error(outputs)
      del outputs
    except Exception as error:  # One kernel less, not the whole table.
      record['unavailable'] = _one_line(error)
      continue
    if case.calls > 1:
      record['calls'] = case.calls
    runners.append((record, lambda f=run: measure.seconds(f) / case.calls))

  made = []
  for name in case.rivals:
    record = {**base, 'implementation': name, 'is_rival': True}
    records.append(record)
    worker = workers.get(*case.key(name))
    try:
      record |= worker.make(case.spec, limit=settings.start_limit)
      runners.append((record, worker.seconds))
      made.append(worker)
    except rivals.Unavailable as error:
      record['unavailable'] = _one_line(error)

  _take_turns(runners, settings.rounds)
  for worker in made:
    try:
      worker.drop()
    except rivals.Unavailable:
      pass
  for record, _ in runners:
    if 'times' in record:
      cost = None if 'other_work' in record else case.cost
      record |= records_lib.figures(record.pop('times'), cost, ceilings)
  if case.row is not None:
    table.add_ratios(records, case.row)
  return records


class _Arguments:
  """Inputs of a case, made once there is a program that takes them."""

  def __init__(self, case: Case, settings: Settings):
    self._case, self._seed = case, settings.seed
    self._arguments: tuple = ()
    self._cotangent: Any = None

  def first_run(self, program: programs.Program):
    """What to time, and what it returned."""
    case = self._case
    if not self._arguments:
      dtype = jnp.dtype(case.dtype)
      self._arguments = case.op.make(case.spec, dtype, self._seed)
      if case.direction != FORWARD:
        self._cotangent = case.op.cotangent(
          case.spec, self._arguments, self._seed
        )
    run = program(self._arguments, self._cotangent)
    return run, jax.block_until_ready(run())[0]

  def error(self, outputs: Any) -> dict[str, Any]:
    """The error of a record, or why there is none."""
    case = self._case
    try:
      error = errors.error(
        case.op,
        case.spec,
        case.direction,
        self._arguments,
        outputs,
        self._cotangent,
      )
    except jax.errors.JaxRuntimeError as failure:
      # The definition's memory isn't the kernel's fault.
      return {'error': None, 'remark': f'no error: {_one_line(failure)}'}
    return {'error': error}


def _program(case: Case, name: str, future) -> programs.Program:
  if future is None:
    return case.build(name)
  try:
    return future.result()
  except NotImplementedError:
    raise
  except Exception:
    # Once more by itself: other programs were being compiled beside it.
    return case.build(name)


def _one_line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  known = isinstance(error, NotImplementedError | rivals.Unavailable)
  return (text if known else f'{type(error).__name__}: {text}')[:400]


def _take_turns(runners: Sequence[tuple[dict, Callable]], rounds: int) -> None:
  """Appends to the `times` of each record; who fails is out of the game."""
  for _ in range(rounds):
    for record, seconds in runners:
      if 'unavailable' in record:
        continue
      try:
        record.setdefault('times', []).append(seconds())
      except Exception as error:  # Of a worker, or of the device.
        record['unavailable'] = _one_line(error)
        del record['times']
