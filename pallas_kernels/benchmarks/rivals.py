"""Other packages' kernels, each in a process of its own that waits for turns.

A worker is started with a JSON object {"rival", "op", "direction"} as its
argument. It then reads a JSON object a line, and answers each with one:

  {"do": "warm", "spec": {...}}   imports, compiles, runs once, keeps nothing
  {"do": "make", "spec": {...}}   makes inputs, runs once; may answer with
                                  {"remark": "...", "other_work": true}
  {"do": "time"}                  {"seconds": of one call}
  {"do": "drop"}                  frees the inputs

An answer may be {"error": "why not"} instead. Other lines of its output count
for nothing; packages print. The shapes are `arg_specs` of the op.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

# (rival, op, direction).
RIVALS = (
  ('torch', 'select_topk', 'forward'),
  ('tokamax', 'grouped_matmul', 'forward'),
  ('tokamax', 'grouped_matmul', 'gradients'),
  ('tokamax', 'dense_attention', 'forward'),
  ('tokamax', 'dense_attention', 'gradients'),
  ('deep_gemm', 'grouped_matmul', 'forward'),
  ('deep_gemm', 'lightning_indexer_fp8', 'forward'),
  ('flash_mla', 'sparse_mla_attention', 'forward'),
  ('flash_mla', 'sparse_mla_attention_fp8', 'forward'),
  ('cudnn_dsa', 'lightning_indexer', 'forward'),
  ('cudnn_dsa', 'sparse_mla_attention', 'backward'),
  ('cudnn_dsa', 'indexer_target_selected', 'forward'),
  ('cudnn_dsa', 'indexer_target_all', 'forward'),
  ('cudnn_dsa', 'indexer_gradients', 'forward'),
)
# Where each may be found: by itself, or as vLLM ships it.
PACKAGES = {
  'torch': ('torch',),
  'tokamax': ('tokamax',),
  'deep_gemm': ('deep_gemm', 'vllm.third_party.deep_gemm'),
  'flash_mla': ('flash_mla', 'vllm.third_party.flashmla'),
  'cudnn_dsa': ('cudnn',),
}
# Seconds for an answer; compiling may take a minute, on a busy machine more.
START_LIMIT, TURN_LIMIT = 240.0, 120.0


class Unavailable(Exception):
  """A rival that can't run, with its reason."""


def is_installed(rival: str) -> bool:
  """Whether this interpreter has the package."""
  return any(_has_module(name) for name in PACKAGES[rival])


def _has_module(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ImportError:
    return False


class Worker:
  """A process that computes one rival's op when asked."""

  def __init__(
    self,
    command: Sequence[str],
    *,
    rival: str,
    op: str,
    direction: str,
    environment: Mapping[str, str] | None = None,
  ):
    request = {'rival': rival, 'op': op, 'direction': direction}
    self._process = subprocess.Popen(
      (*command, json.dumps(request)),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      errors='replace',
      env={
        **os.environ,
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        **(environment or {}),
      },
      process_group=0,
    )
    self._end: str | None = None
    self._answers: queue.SimpleQueue = queue.SimpleQueue()
    self._complaints: collections.deque = collections.deque(maxlen=20)
    self._readers = [
      threading.Thread(target=read, daemon=True)
      for read in (self._read_answers, self._read_complaints)
    ]
    for reader in self._readers:
      reader.start()

  def warm(self, spec: Any) -> None:
    """Asks for a first run; `answer` waits for it."""
    self._send({'do': 'warm', 'spec': dataclasses.asdict(spec)})

  def make(self, spec: Any, *, limit: float = START_LIMIT) -> dict[str, Any]:
    """Prepares for turns; returns what a record should say.

    Which may be a `remark`, and that it does `other_work` than the op, so that
    its rate can't be told from the op's cost.
    """
    self._send({'do': 'make', 'spec': dataclasses.asdict(spec)})
    answer = self.answer(limit)
    return {
      key: answer[key] for key in ('remark', 'other_work') if answer.get(key)
    }

  def seconds(self, *, limit: float = TURN_LIMIT) -> float:
    """Takes a turn."""
    self._send({'do': 'time'})
    return self.answer(limit)['seconds']

  def drop(self, *, limit: float = TURN_LIMIT) -> None:
    """Frees the inputs."""
    self._send({'do': 'drop'})
    self.answer(limit)

  def answer(self, limit: float) -> dict:
    """The next answer.

    Raises:
      Unavailable: it is an error, there is none in so many seconds (then the
        worker is ended), or the process has ended.
    """
    if self._end is not None:
      raise Unavailable(self._end)
    try:
      answer = self._answers.get(timeout=max(limit, 0.0))
    except queue.Empty:
      self.close()
      self._end = self._with_complaint(f'no answer in {limit:.0f} s')
      raise Unavailable(self._end) from None
    if answer is None:
      status = self._process.wait()
      self._end = self._with_complaint(f'the worker ended with status {status}')
      raise Unavailable(self._end)
    if 'error' in answer:
      raise Unavailable(self._with_complaint(answer['error']))
    return answer

  def close(self) -> None:
    """Ends the process, and the compilers that it may have started."""
    try:
      os.killpg(self._process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass  # It has ended by itself.
    self._process.wait()
    try:
      self._process.stdin.close()  # pyrefly: ignore[missing-attribute]
    except OSError:
      pass  # A question that was never read.
    streams = self._process.stdout, self._process.stderr
    for reader, stream in zip(self._readers, streams, strict=True):
      reader.join(timeout=5)
      if not reader.is_alive():
        stream.close()  # pyrefly: ignore[missing-attribute]

  def _send(self, request: dict) -> None:
    stream = self._process.stdin
    assert stream is not None
    try:
      stream.write(json.dumps(request) + '\n')
      stream.flush()
    except (OSError, ValueError):
      pass  # It has ended: `answer` says so.

  def _read_answers(self) -> None:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      if line.startswith('{'):
        try:
          self._answers.put(json.loads(line))
        except json.JSONDecodeError:
          pass
    self._answers.put(None)

  def _read_complaints(self) -> None:
    assert self._process.stderr is not None
    for line in self._process.stderr:
      if line.strip():
        self._complaints.append(line.strip())

  def _with_complaint(self, message: str) -> str:
    if self._process.poll() is not None:
      self._readers[1].join(timeout=5)
    if self._complaints:
      message += f' (its last message: {self._complaints[-1][:300]})'
    return message


class Workers:
  """The workers of a run, one for each (rival, op, direction)."""

  def __init__(
    self,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
  ):
    self._command = command
    self._environment = environment
    self._workers: dict[tuple[str, str, str], Worker] = {}

  def __enter__(self) -> 'Workers':
    return self

  def __exit__(self, *_: Any) -> None:
    for worker in self._workers.values():
      worker.close()

  def get(self, rival: str, op: str, direction: str) -> Worker:
    """The worker, started if it isn't yet."""
    key = rival, op, direction
    if key not in self._workers:
      self._workers[key] = Worker(
        self._command,
        rival=rival,
        op=op,
        direction=direction,
        environment=self._environment,
      )
    return self._workers[key]

  def warm(
    self,
    specs: Mapping[tuple[str, str, str], Sequence[Any]],
    *,
    limit: float = START_LIMIT,
  ) -> None:
    """Starts workers, all at once, and waits until all have run or failed.

    What fails now fails again, with its reason, at `Worker.make`.

    Args:
      specs: shapes for each (rival, op, direction).
      limit: seconds for all of them.
    """
    for key, some in specs.items():
      for spec in some:
        self.get(*key).warm(spec)
    deadline = time.monotonic() + limit
    for key, some in specs.items():
      for _ in some:
        try:
          self.get(*key).answer(deadline - time.monotonic())
        except Unavailable:
          pass
