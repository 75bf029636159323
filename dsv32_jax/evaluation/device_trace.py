"""What a GPU's time goes to, from a profile of a program.

XLA's profiler records every kernel that a GPU runs. NCCL's carry the name of
the collective that they do; XLA's own kernels for peers on one host carry it
too. What a collective takes includes waiting for the slowest device, and may
run beside other work.
"""

import collections
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax

# Parts of kernel names, lower case, in the order they are looked for.
_KERNELS = (
  ('all-to-all', r'sendrecv|all-?_?to-?_?all'),
  ('all-gather', r'all-?_?gather'),
  ('reduce-scatter', r'reduce-?_?scatter'),
  ('all-reduce', r'all-?_?reduce'),
)


def kind_of(kernel: str) -> str | None:
  """The collective that a kernel belongs to, by its name; None for no one."""
  name = kernel.lower()
  for kind, pattern in _KERNELS:
    if re.search(pattern, name):
      return kind
  return None


def covered(spans: Iterable[tuple[float, float]]) -> float:
  """Length of the union of (start, end) intervals."""
  total, reached = 0.0, float('-inf')
  for start, end in sorted(spans):
    total += max(end - max(start, reached), 0.0)
    reached = max(reached, end)
  return total


def collective_seconds(directory: pathlib.Path) -> dict[str, dict[str, float]]:
  """Seconds in collectives of each GPU that a profile has.

  Args:
    directory: that `jax.profiler.trace` wrote to, one profile.

  Returns:
    By GPU: seconds that at least one kernel of a kind ran, by kind;
    'collectives' for any of them, 'exposed' for the part of it beside which no
    other kernel ran, 'busy' for all kernels.

  Raises:
    ValueError: the directory has no profile, or the profile no GPU.
  """
  return {
    device: summarise(kernels)
    for device, kernels in _kernels(directory).items()
  }


def kernel_seconds(directory: pathlib.Path) -> dict[str, Any]:
  """What the first GPU of a profile did between its first and last kernel.

  Args:
    directory: that `jax.profiler.trace` wrote to, one profile.

  Returns:
    'span' and 'busy': seconds in all, and of them with a kernel running;
    'kernels': (name, count, seconds), the longest in total first.

  Raises:
    ValueError: the directory has no profile, or the profile no GPU.
  """
  return totals(next(iter(_kernels(directory).values())))


def totals(kernels: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
  """Seconds by name of (name, start, end); see `kernel_seconds`."""
  kernels = list(kernels)
  counts: collections.Counter[str] = collections.Counter()
  seconds: dict[str, float] = collections.defaultdict(float)
  for name, start, end in kernels:
    counts[name] += 1
    seconds[name] += end - start
  spans = [(start, end) for _, start, end in kernels]
  longest = sorted(seconds, key=lambda name: -seconds[name])
  return {
    'span': max(end for _, end in spans) - min(start for start, _ in spans),
    'busy': covered(spans),
    'kernels': [(name, counts[name], seconds[name]) for name in longest],
  }


def _kernels(
  directory: pathlib.Path,
) -> dict[str, list[tuple[str, float, float]]]:
  """Every kernel's name, start and end in seconds, by GPU."""
  files = sorted(directory.rglob('*.xplane.pb'))
  if not files:
    raise ValueError(f'{directory}: expected a profile, found none')
  found = {}
  for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
    if plane.name.startswith('/device:GPU'):
      found[plane.name.removeprefix('/device:')] = [
        (event.name, 1e-9 * event.start_ns, 1e-9 * event.end_ns)
        for line in plane.lines
        if line.name.startswith('Stream')
        for event in line.events
      ]
  if not found:
    raise ValueError(f'{files[-1]}: expected a GPU in the profile, found none')
  return found


def summarise(
  kernels: Iterable[tuple[str, float, float]],
) -> dict[str, float]:
  """Seconds by kind of (name, start, end); see `collective_seconds`."""
  spans: dict[str, list] = collections.defaultdict(list)
  others = []
  for name, start, end in kernels:
    if (kind := kind_of(name)) is None:
      others.append((start, end))
    else:
      spans[kind].append((start, end))
  together = [span for kind in spans.values() for span in kind]
  busy = covered([*together, *others])
  seconds = {kind: covered(members) for kind, members in spans.items()}
  return seconds | {
    'collectives': covered(together),
    'exposed': busy - covered(others),
    'busy': busy,
  }
