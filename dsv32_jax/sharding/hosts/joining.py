"""Runs a program in each process of a job, on jax's distributed runtime.

Only process 0 prints; an error is said once. A process that is lost, whatever
the reason, ends the job within a minute: jax notices on the others, and they
say what happened and what to do about it. docs/sharding.md, "Hosts".
"""

import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from dsv32_jax.sharding.hosts import agreement, cluster
from dsv32_jax.sharding.hosts.job import HostOptions, Job

_SHUTDOWN_TIMEOUT_S = 60
_ERRORS_MEET_S = 5
_ADVICE = (
  'The job ends. Its newest checkpoint is intact: the same command, on the '
  'same or another number of devices, continues from there'
)
# What gloo, NCCL and the coordination service say of a peer that is gone.
_OF_A_LOST_PEER = re.compile(
  r'gloo|nccl|coordination service|connection (reset|closed|refused)|'
  r'socket closed|unavailable|heartbeat|broken pipe|barrier',
  re.IGNORECASE,
)


def run(
  main: Callable[[], Any],
  options: HostOptions,
  *,
  user_errors: tuple[type[Exception], ...] = (),
) -> Any:
  """Calls `main`, after joining the other processes if there are any.

  With one process it does nothing else. With several, the caller's process
  becomes the guard of a child in which `main` runs, and does not come back.

  Args:
    main: takes nothing.
    options: from the flags.
    user_errors: said in one line; others with their traceback.

  Raises:
    ValueError: for options that cannot be right; and what `main` raises, with
      one process.
  """
  job = cluster.find_job(options, os.environ)
  if job is None:
    return main()
  _guard(f'a process of the job ({_name(job.process_id, job.num_processes)})')
  user_errors = (*user_errors, agreement.MainProcessError)
  try:
    start(job, options)
    errors = _quiet_unless_main(options.log_dir)
  except Exception as error:
    _fail(error, (*user_errors, RuntimeError), sys.stderr)
  try:
    main()
    stop()
  except SystemExit:
    # After an agreed checkpoint.
    stop()
    raise
  except BaseException as error:
    _fail(error, user_errors, errors)


def start(job: Job, options: HostOptions) -> None:
  """Starts jax's distributed runtime; before anything asks for a device.

  Args:
    job: who takes part.
    options: times to wait.

  Raises:
    RuntimeError: if the processes do not find each other in time.
  """
  # Without it the devices of other processes cannot be reached on CPU.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  ids = job.local_device_ids
  try:
    jax.distributed.initialize(
      coordinator_address=job.coordinator_address,
      num_processes=job.num_processes,
      process_id=job.process_id,
      local_device_ids=None if ids is None else list(ids),
      cluster_detection_method=job.detection,
      initialization_timeout=options.initialization_timeout_s,
      heartbeat_timeout_seconds=options.heartbeat_timeout_s,
      shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
    )
  except (RuntimeError, ValueError) as error:
    raise RuntimeError(
      f'the processes did not find each other within '
      f'{options.initialization_timeout_s} s (told by {job.found_in}: '
      f'{_name(job.process_id, job.num_processes)}, address '
      f'{job.coordinator_address or "detected by jax"}): {_line(error)}'
    ) from error


def stop() -> None:
  """Waits for all processes and leaves the runtime."""
  agreement.barrier('stop')
  jax.distributed.shutdown()


def _guard(described: str) -> None:
  """Returns in a child process; this one stays and tells of its violent end.

  jax ends a process by SIGABRT once another one is lost, and the kernel by
  SIGKILL when memory is short: neither lets the process itself say a word.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  reading, writing = os.pipe()
  child = os.fork()
  if child == 0:
    os.close(writing)
    threading.Thread(target=_end_with, args=(reading,), daemon=True).start()
    return
  os.close(reading)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(child, number))
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  if status < 0:
    _say(f'{described} {_violent_end(-status)}. {_ADVICE}', sys.stderr)
    status = 128 - status
  # The child has run what is registered for the exit.
  os._exit(status)


def _end_with(pipe: int) -> None:
  """Ends this process when the other end of a pipe is closed."""
  while os.read(pipe, 1):
    pass
  os.kill(os.getpid(), signal.SIGKILL)


def _violent_end(number: int) -> str:
  match number:
    case signal.SIGABRT:
      return (
        'was ended by jax, whose own message (above, or in its log) says why: '
        'most likely another process of the job is lost, or never came'
      )
    case signal.SIGKILL:
      return 'was killed (SIGKILL): by hand, by the scheduler or out of memory'
  return f'ended by {signal.Signals(number).name}'


def _quiet_unless_main(log_dir: str | None) -> Any:
  """Sends what a process other than 0 prints to its log file, or nowhere.

  Returns:
    Where its errors go.
  """
  if agreement.is_main():
    return sys.stderr
  errors = sys.stderr
  path = os.devnull
  sys.stdout.flush()
  if log_dir is not None:
    os.makedirs(log_dir, exist_ok=True)
    path = os.path.join(log_dir, f'process_{jax.process_index():05d}.log')
    errors = os.fdopen(os.dup(2), 'w', encoding='utf-8')
  log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
  # The descriptors, since gloo and XLA print past Python.
  os.dup2(log, 1)
  if log_dir is not None:
    os.dup2(log, 2)
  os.close(log)
  return errors


def _fail(
  error: BaseException, user_errors: tuple[type[Exception], ...], stream: Any
) -> NoReturn:
  """Says what went wrong, and ends this process without a wait for others."""
  is_lost = isinstance(error, jax.errors.JaxRuntimeError) and (
    _OF_A_LOST_PEER.search(str(error)) is not None
  )
  if is_lost:
    text = f'lost another process of the job: {_line(error)[:300]}. {_ADVICE}'
  elif isinstance(error, user_errors):
    text = _line(error)
  elif isinstance(error, KeyboardInterrupt):
    text = 'interrupted'
  else:
    text = ''.join(traceback.format_exception(error)).rstrip()
  shared = None if isinstance(error, agreement.MainProcessError) else text
  alike = not is_lost and agreement.all_failed(shared, wait_s=_ERRORS_MEET_S)
  if not alike:
    _say(
      f'{_name(*agreement.process())} on {socket.gethostname()}: {text}', stream
    )
  elif agreement.is_main():
    _say(text, stream)
  for output in (sys.stdout, sys.stderr, stream):
    output.flush()
  # A normal exit would wait for the others, and they for this one.
  os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split()) or type(error).__name__


def _say(text: str, stream: Any) -> None:
  print(f'error: {text}', file=stream, flush=True)


def _name(index: int | None, count: int | None) -> str:
  if index is None or count is None:
    return 'process detected by jax'
  return f'process {index} of {count}'
