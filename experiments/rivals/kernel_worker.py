"""A public kernel beside ours, as a worker process of `bench_kernels.py`.

  python kernel_worker.py '{"rival": "torch", "op": "select_topk", "direction":
    "forward"}'

Its questions come as lines of standard input, and its answers go to standard
output: `pallas_kernels.benchmarks.rivals` says which. Each package has a file
beside this one with a clock and, by op, an adapter: a function of (spec,
direction) that makes a case with something to `run`, if need be how many
`calls` that is, a `remark`, and whether it is `other_work` than the op's.
Inputs are random, of the shape that the spec gives (`arg_specs` of the op).
"""

import importlib
import json
import sys

# The file of a rival's adapters; a package's own name would hide the package.
ADAPTERS = {
  'torch': 'torch_kernels',
  'tokamax': 'tokamax_kernels',
  'deep_gemm': 'deep_gemm_kernels',
  'flash_mla': 'flash_mla_kernels',
  'cudnn_dsa': 'cudnn_kernels',
}


def main() -> None:
  request = json.loads(sys.argv[1])
  worker = Worker(**request)
  for line in sys.stdin:
    question = json.loads(line)
    try:
      answer = getattr(worker, question.pop('do'))(**question)
    except Exception as error:  # What a rival lacks is its own affair.
      message = ' '.join(f'{type(error).__name__}: {error}'.split())
      answer = {'error': message[:300]}
    print(json.dumps(answer), flush=True)


class Worker:
  """Answers questions, each a method."""

  def __init__(self, rival: str, op: str, direction: str):
    self._rival, self._op, self._direction = rival, op, direction
    self._case: dict | None = None

  def warm(self, spec: dict) -> dict:
    self.make(spec)
    return self.drop()

  def make(self, spec: dict) -> dict:
    adapters = importlib.import_module(ADAPTERS[self._rival])
    make = adapters.CASES.get(self._op)
    if make is None:
      raise NotImplementedError(
        f'{self._rival} has no {self._op} among these adapters'
      )
    self._case = make(spec, self._direction)
    self._seconds, self._free = adapters.seconds, adapters.free
    self._case['run']()
    return {
      'remark': self._case.get('remark'),
      'other_work': self._case.get('other_work', False),
    }

  def time(self) -> dict:
    assert self._case is not None
    seconds = self._seconds(self._case['run'])
    return {'seconds': seconds / self._case.get('calls', 1)}

  def drop(self) -> dict:
    self._case = None
    self._free()
    return {}


if __name__ == '__main__':
  main()
