"""What the adapters of packages on torch share: a clock, inputs, memory."""

import gc
import importlib
import statistics
import time

import torch

# Shorter calls are timed several at once, as ours are.
SHORT, SEVERAL = 1e-3, 10


def need_cuda() -> None:
  if not torch.cuda.is_available():
    raise NotImplementedError('torch sees no CUDA device')


def seconds(run) -> float:
  """Median time of a call between CUDA events."""
  if not torch.cuda.is_available():
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
  run()
  calls = SEVERAL if _between_events(run, 1) < SHORT else 1
  return statistics.median(_between_events(run, calls) for _ in range(7))


def _between_events(run, calls: int) -> float:
  begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  begin.record()
  for _ in range(calls):
    run()
  end.record()
  end.synchronize()
  return begin.elapsed_time(end) * 1e-3 / calls


def free() -> None:
  """Gives the memory of a case back to the device: others need it."""
  gc.collect()
  if torch.cuda.is_available():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def normal(*shape: int, factor: float = 1.0):
  """Random bfloat16."""
  x = torch.randn(*shape, device='cuda', dtype=torch.bfloat16)
  return x if factor == 1 else x * factor


def random_indices(queries: int, keys: int, k: int):
  """Distinct keys of each query, of all keys."""
  out = torch.empty(queries, k, dtype=torch.int32, device='cuda')
  for i in range(0, queries, 512):
    n = min(512, queries - i)
    scores = torch.rand(n, keys, device='cuda')
    out[i : i + n] = scores.topk(k, dim=-1, sorted=False).indices.int()
  return out


def first_module(*names: str):
  """The first of some packages that is there."""
  for name in names[:-1]:
    try:
      return importlib.import_module(name)
    except ImportError:
      pass
  return importlib.import_module(names[-1])
