"""Processes of rivals: questions, answers, and how they fail."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from pallas_kernels.benchmarks import rivals
from pallas_kernels.topk_selector import arg_specs

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = ROOT / 'experiments' / 'rivals' / 'kernel_worker.py'
SPEC = arg_specs.TEST_SPECS['one_block']
# As much of torch as the adapter of its top-k needs; hides a real one.
TORCH = """
import types
cuda = types.SimpleNamespace(is_available=lambda: False)
class Scores:
  def __init__(self, shape): self.shape = shape
  def numel(self): return self.shape[0] * self.shape[1]
  def roll(self, shift, axis): return Scores(self.shape)
def randn(*shape, device): return Scores(shape)
def topk(scores, k, dim, sorted):
  assert scores.shape == (18, 9) and k == 4, (scores.shape, k)
"""


def worker_of(
  tmp_path: pathlib.Path, text: str, rival: str = 'torch'
) -> rivals.Worker:
  path = tmp_path / 'worker.py'
  path.write_text('import json, os, sys, time\n' + text)
  return rivals.Worker(
    (sys.executable, str(path)), rival=rival, op='op', direction='forward'
  )


def real_worker(tmp_path: pathlib.Path, op: str) -> rivals.Worker:
  (tmp_path / 'torch.py').write_text(TORCH)
  return rivals.Worker(
    (sys.executable, str(WORKER)),
    rival='torch',
    op=op,
    direction='forward',
    environment={'PYTHONPATH': str(tmp_path)},
  )


def test_worker_answers_every_question(tmp_path):
  worker = real_worker(tmp_path, 'select_topk')
  try:
    worker.warm(SPEC)
    worker.answer(60.0)
    for _ in range(2):
      assert worker.make(SPEC) == {}
      assert worker.seconds() > 0
      worker.drop()
  finally:
    worker.close()


def test_worker_without_the_op_says_so_and_lives_on(tmp_path):
  worker = real_worker(tmp_path, 'dense_attention')
  try:
    for _ in range(2):
      with pytest.raises(rivals.Unavailable, match='no dense_attention among'):
        worker.make(SPEC)
  finally:
    worker.close()


def test_error_comes_with_the_last_message_of_the_process(tmp_path):
  worker = worker_of(
    tmp_path,
    'for line in sys.stdin:\n'
    '  sys.stderr.write("first\\nnvcc: not found\\n\\n")\n'
    '  sys.stderr.flush()\n'
    '  time.sleep(0.3)\n'
    '  print(json.dumps({"error": "no kernel"}), flush=True)\n',
  )
  try:
    with pytest.raises(
      rivals.Unavailable, match=r'no kernel .*message: nvcc: not found'
    ):
      worker.make(SPEC)
  finally:
    worker.close()


def test_killed_worker_is_reported_at_every_later_question(tmp_path):
  worker = worker_of(
    tmp_path,
    'sys.stderr.write("CUDA out of memory\\n")\n'
    'sys.stderr.flush()\n'
    'sys.stdin.readline()\n'
    f'os.kill(os.getpid(), {int(signal.SIGKILL)})\n',
  )
  try:
    for question in (lambda: worker.make(SPEC), worker.seconds):
      with pytest.raises(
        rivals.Unavailable, match=r'status -9 .*CUDA out of memory'
      ):
        question()
  finally:
    worker.close()


def test_silent_worker_is_ended_after_the_limit(tmp_path):
  # It has started a compiler, which holds its output open.
  worker = worker_of(
    tmp_path,
    'import subprocess\n'
    'subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])\n'
    'time.sleep(60)\n',
  )
  begin = time.monotonic()
  with pytest.raises(rivals.Unavailable, match='no answer in 1 s'):
    worker.make(SPEC, limit=1.0)
  with pytest.raises(rivals.Unavailable, match='no answer in 1 s'):
    worker.seconds()
  worker.close()
  assert time.monotonic() - begin < 10


def test_workers_start_together_and_one_that_fails_leaves_the_others(tmp_path):
  path = tmp_path / 'worker.py'
  path.write_text(
    'import json, sys\n'
    'request = json.loads(sys.argv[1])\n'
    'for line in sys.stdin:\n'
    '  if request["rival"] == "cudnn_dsa": sys.exit("no cuDNN here")\n'
    '  print(json.dumps({"seconds": 2.0}), flush=True)\n'
  )
  good, bad = ('torch', 'op', 'forward'), ('cudnn_dsa', 'op', 'forward')
  with rivals.Workers((sys.executable, str(path))) as workers:
    workers.warm({bad: [SPEC, SPEC], good: [SPEC, SPEC]}, limit=60.0)
    workers.get(*good).make(SPEC)
    assert workers.get(*good).seconds() == 2.0
    with pytest.raises(rivals.Unavailable, match='no cuDNN here'):
      workers.get(*bad).make(SPEC)


def test_package_that_is_not_there_is_not_installed():
  assert not rivals.is_installed('cudnn_dsa') or rivals._has_module('cudnn')
  assert not rivals._has_module('no_such_package.part')
  assert rivals._has_module('json.decoder')


def test_worker_script_ends_with_its_input():
  done = subprocess.run(
    (
      sys.executable,
      str(WORKER),
      '{"rival": "torch", "op": "x", "direction": "y"}',
    ),
    stdin=subprocess.DEVNULL,
    capture_output=True,
    check=False,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr
