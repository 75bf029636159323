"""The training loop: data, step, metrics, evaluation, checkpoint.

Steps are counted from 1: step n is the n-th update, the checkpoint of step n
holds the state after it and the place in the data after its batch.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array

from dsv32_jax.checkpoints.manager import CheckpointManager
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding.hosts import agreement
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.training import compiled_step
from dsv32_jax.training import metrics as metrics_lib
from dsv32_jax.training.batch import Batch

Rows = dict[str, np.ndarray]


@runtime_checkable
class DataIterator(Protocol):
  """Batches whose place can be saved."""

  def __next__(self) -> Rows: ...

  def get_state(self) -> Any: ...

  def set_state(self, state: Any) -> None: ...


class NonFiniteError(RuntimeError):
  """A loss or gradient norm is not finite.

  Attributes:
    step: at which it was found.
    dump: directory with what is needed to look at it.
  """

  def __init__(self, message: str, *, step: int, dump: pathlib.Path):
    super().__init__(message)
    self.step = step
    self.dump = dump


class Interrupted(SystemExit):
  """A signal ended the run, after a checkpoint; the exit status is 128 + it."""

  def __init__(self, number: int, *, step: int):
    super().__init__(128 + number)
    self.signal = signal.Signals(number)
    self.step = step


@dataclasses.dataclass(frozen=True)
class _Pending:
  """A step that was dispatched and whose metrics have not been read.

  `done_at` is the time at which it was known to be done, if it already is:
  small computations run before their dispatch returns.
  """

  step: int
  rows: Rows
  values: Any
  data_s: float
  done_at: float | None


def fit(
  step_fn: Callable[[Any, Any, Array], tuple[Any, dict[str, Array]]],
  state: Any,
  data: DataIterator,
  *,
  key: Array,
  steps: int,
  directory: str | pathlib.Path,
  checkpoints: CheckpointManager,
  checkpoint_every: int,
  metrics: metrics_lib.MetricsWriter,
  evaluate: Callable[[Any, int], Mapping[str, Any]] | None = None,
  evaluate_every: int = 0,
  record: Mapping[str, Any] | None = None,
  parallel: Parallel | None = None,
  make_batch: Callable[[dict[str, Array]], Any] = Batch.from_numpy,
  summarise: Callable[[Any, Rows], Mapping[str, Any]] = metrics_lib.summarise,
  report: Callable[[str], None] | None = None,
) -> Any:
  """Trains to step `steps`, from the newest checkpoint if there is one.

  A run that was killed and started again gives the same bits as one that was
  not: state, place in the data and random keys (`step_fn` derives them from
  `key` and `state.step`) are those of the step.

  Args:
    step_fn: (state, batch, key) -> (state, metrics), pure; jitted here.
    state: at step 0; its buffers are donated. Leaves that are not sharded over
      `parallel`'s mesh are whole on every device.
    data: rows as dicts of [B, ...] arrays.
    key: base key, the same in every step.
    steps: at which training ends.
    directory: of the stage, for the dump of a step that is not finite.
    checkpoints: of this stage. Saves every `checkpoint_every` steps, at the
      end and when interrupted.
    checkpoint_every: steps between checkpoints.
    metrics: gets one line a step.
    evaluate: (state, step) -> metrics for the line of that step; must leave the
      state alone. Called every `evaluate_every` steps and at the end.
    evaluate_every: 0 evaluates at the end only.
    record: JSON-able facts kept in every checkpoint and dump: stage, resolved
      config, versions. `read_extra(path)` returns them.
    parallel: devices and rules; the rows of a batch are cut over the mesh axes
      of the logical axis `batch`. `step_fn` and `evaluate` run under it.
    make_batch: from the dict of arrays on device to what `step_fn` takes.
    summarise: (step's metrics on the host, rows) -> what is written.
    report: receives lines for the user; None prints to stderr.

  Returns:
    The state after step `steps`.

  Raises:
    NonFiniteError: naming the step and the directory of the dump.
    Interrupted: after SIGTERM or SIGINT and a checkpoint.
    CheckpointError: if the disk is full or every checkpoint is damaged.
    ValueError: if a checkpoint does not fit the state, the data ends early or a
      batch does not divide over the mesh.
  """
  loop = _Loop(
    metrics=metrics,
    summarise=summarise,
    record=dict(record or {}),
    directory=pathlib.Path(directory),
    report=report or (lambda line: print(line, file=sys.stderr, flush=True)),
  )
  checkpoints.check_space(state)
  with contextlib.ExitStack() as stack:
    stack.enter_context(parallel_lib.use(parallel))
    state = compiled_step.place_state(state, parallel)
    first = 0
    shapes = compiled_step.shapes(state)
    if checkpoints.sealed_steps():
      # Two states would need twice the memory.
      compiled_step.free(state)
    restored = checkpoints.restore_latest(shapes)
    if restored is not None:
      first, state = restored.step, restored.state
      data.set_state(restored.extra['data'])
      loop.report(f'resumed from step {first} of {checkpoints.directory}')
    if first >= steps:
      return state
    metrics.start(step=first, total_steps=steps)
    interrupts = stack.enter_context(agreement.interrupts())

    key = compiled_step.place_state(key, parallel)
    carry = (state, compiled_step.place_state(np.asarray(True), parallel))
    del state, restored
    compiled = None
    pending: _Pending | None = None
    loop.restart_clock()
    for n in range(first + 1, steps + 1):
      began = time.perf_counter()
      rows = _next_rows(data, n)
      data_s = time.perf_counter() - began
      with jax.transfer_guard('disallow'):
        batch = make_batch(compiled_step.place_rows(rows, parallel))
        if compiled is None:
          compiled = compiled_step.compile_step(step_fn, carry, batch, key)
          # The devices' first meeting has a time limit of its own.
          agreement.barrier('compiled')
          loop.compiled()
        carry, values = compiled(carry, batch, key)
        is_done = all(leaf.is_ready() for leaf in jax.tree.leaves(values))
        done_at = time.perf_counter() if is_done else None
        # The device works on step n while the host reads step n - 1.
        if pending is not None:
          loop.finish(pending, carry[0])
        pending = _Pending(n, rows, values, data_s, done_at)

      signaled = interrupts.check()
      last = n == steps or signaled is not None
      evaluates = evaluate is not None and (
        n == steps or (evaluate_every > 0 and n % evaluate_every == 0)
      )
      saves = last or n % checkpoint_every == 0
      if evaluates or saves:
        # Only a state whose metrics are known to be finite is kept.
        found = evaluate if evaluates else None
        loop.finish(pending, carry[0], evaluate=found)
        pending = None
        if saves:
          extra = {**loop.record, 'data': data.get_state()}
          checkpoints.save(n, carry[0], extra)
        loop.restart_clock()
      checkpoints.poll()
      if signaled is not None and n < steps:
        checkpoints.wait()
        name = signal.Signals(signaled).name
        loop.report(
          f'{name}: stopped after step {n} of {steps}; checkpoint saved in '
          f'{checkpoints.directory}. The same command continues from there'
        )
        raise Interrupted(signaled, step=n)
    checkpoints.wait()
    return carry[0]


class _Loop:
  """What happens to a step's metrics once they can be read."""

  def __init__(
    self,
    *,
    metrics: metrics_lib.MetricsWriter,
    summarise: Callable,
    record: dict,
    directory: pathlib.Path,
    report: Callable[[str], None],
  ):
    self.record = record
    self.report = report
    self._metrics = metrics
    self._summarise = summarise
    self._directory = directory
    self._clock = 0.0
    self._compile_s: float | None = None

  def restart_clock(self) -> None:
    self._clock = time.perf_counter()

  def compiled(self) -> None:
    """Notes the time since the clock started, and starts it again."""
    self._compile_s = time.perf_counter() - self._clock
    self.restart_clock()

  def finish(
    self,
    done: _Pending,
    state: Any,
    *,
    evaluate: Callable[[Any, int], Mapping[str, Any]] | None = None,
  ) -> None:
    """Reads a step's metrics, writes them, and stops if they are not finite."""
    values = jax.device_get(done.values)
    done_at = done.done_at or time.perf_counter()
    step_s, self._clock = done_at - self._clock, done_at
    line = dict(self._summarise(values, done.rows))
    line['time/step_s'] = step_s
    line['time/data_s'] = done.data_s
    count = values.get('num_tokens')
    if count is None and 'tokens' in done.rows:
      count = done.rows['tokens'].size
    if count is not None:
      line['time/tokens_per_s'] = float(count) / step_s
    if self._compile_s is not None:
      line['time/compile_s'], self._compile_s = self._compile_s, None
    bad = [
      name
      for name in compiled_step.watched(values)
      if not np.isfinite(values[name])
    ]
    if evaluate is not None and not bad:
      line.update(evaluate(state, done.step))
    self._metrics.write(done.step, line)
    if bad:
      named = ', '.join(f'{name} is {float(values[name])}' for name in bad)
      path = self._dump(done, state, values)
      raise NonFiniteError(
        f'step {done.step}: {named}; stopped. The state before this step, its '
        f'batch, metrics and config are in {path}',
        step=done.step,
        dump=path,
      )

  def _dump(self, done: _Pending, state: Any, values: Any) -> pathlib.Path:
    """Saves what reproduces the step: `step_fn(state, batch, key)`."""
    path = self._directory / f'nonfinite_step_{done.step}'
    # The same run meets the same step again: the last dump stands for all.
    temporary = path.with_name(f'{path.name}.tmp')

    def begin() -> None:
      shutil.rmtree(temporary, ignore_errors=True)
      temporary.mkdir(parents=True)
      for name, content in (
        ('metrics.json', metrics_lib.json_values(values)),
        ('config.json', self.record),
      ):
        (temporary / name).write_text(json.dumps(content, indent=1))

    def end() -> None:
      shutil.rmtree(path, ignore_errors=True)
      temporary.rename(path)

    agreement.from_main(begin)
    name = 'batch.npz'
    if not agreement.is_alone():
      # Each process has its rows of the batch.
      name = f'batch_{agreement.process()[0]:05d}.npz'
    np.savez(temporary / name, **done.rows)  # pyrefly: ignore
    with (
      jax.transfer_guard('allow'),
      CheckpointManager(temporary / 'checkpoints') as manager,
    ):
      manager.save(done.step - 1, state, self.record)
    agreement.barrier('dumped')
    agreement.from_main(end)
    return path


def _next_rows(data: DataIterator, step: int) -> Rows:
  try:
    return next(data)
  except StopIteration:
    raise ValueError(
      f'data: ended before step {step}, expected an endless iterator'
    ) from None
