"""What a run reports while it trains: a JSONL file, TensorBoard, the terminal.

Keys are paths (`loss/lm`, `grad_norm/main`, `time/step_s`); a value is a number
or, for one number a layer, a list.

Letters: L layers, E experts.
"""

import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dsv32_jax.training import progress

Values = Mapping[str, Any]
JSONL = 'metrics.jsonl'


class MetricsWriter:
  """Writes each step's metrics to every sink; process 0 only.

  Example:
    >>> import tempfile
    >>> with MetricsWriter(tempfile.mkdtemp(), display=None) as metrics:
    ...   metrics.start(step=0, total_steps=2)
    ...   metrics.write(1, {'loss/lm': 5.5, 'indexer/kl': [0.1, 0.2]})
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    title: str = '',
    tensorboard: bool | None = None,
    display: Callable[..., progress.Display] | None = progress.open_display,
  ):
    """Names the sinks; `start` opens them.

    Args:
      directory: gets `metrics.jsonl`, and `tensorboard/`.
      title: what the terminal calls this run.
      tensorboard: False leaves it out, True insists; None writes it if
        tensorboardX is installed.
      display: makes the progress display from (title, step, total_steps); None
        shows nothing.

    Raises:
      ValueError: if tensorboard is True without tensorboardX.
    """
    installed = importlib.util.find_spec('tensorboardX') is not None
    if tensorboard and not installed:
      raise ValueError(
        'tensorboard: got True, expected tensorboardX to be installed'
      )
    self.directory = pathlib.Path(directory)
    self._title = title
    self._use_tensorboard = installed if tensorboard is None else tensorboard
    self._make_display = display
    self._jsonl: Any = None
    self._tensorboard: Any = None
    self._display: progress.Display | None = None

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def start(self, *, step: int, total_steps: int) -> None:
    """Opens the sinks so that they continue after `step`.

    What an earlier run of the same directory wrote for later steps is dropped,
    and a line that it could not finish as well: those steps are taken again.

    Args:
      step: steps done, of the checkpoint that training continues from.
      total_steps: at which training ends.
    """
    self.close()
    if jax.process_index() != 0:
      return
    self.directory.mkdir(parents=True, exist_ok=True)
    path = self.directory / JSONL
    _drop_lines_after(path, step)
    self._jsonl = open(path, 'a', encoding='utf-8')
    if self._use_tensorboard:
      import tensorboardX

      self._tensorboard = tensorboardX.SummaryWriter(
        str(self.directory / 'tensorboard'), purge_step=step + 1
      )
    if self._make_display is not None:
      self._display = self._make_display(
        title=self._title, step=step, total_steps=total_steps
      )

  def write(self, step: int, values: Values) -> None:
    """Writes one line; it is with the operating system on return.

    Args:
      step: counts from 1.
      values: numbers, and arrays or lists of them. Numbers that JSON does not
        have are written as the strings 'NaN', 'Infinity' and '-Infinity'.
    """
    if self._jsonl is None:
      return
    line = {'step': step} | json_values(values)
    self._jsonl.write(json.dumps(line, allow_nan=False) + '\n')
    self._jsonl.flush()
    plain = {key: np.asarray(value).tolist() for key, value in values.items()}
    if self._tensorboard is not None:
      for key, value in _scalars(plain):
        self._tensorboard.add_scalar(key, value, step)
    if self._display is not None:
      self._display.update(step, plain)

  def close(self) -> None:
    for sink in (self._jsonl, self._tensorboard, self._display):
      if sink is not None:
        sink.close()
    self._jsonl = self._tensorboard = self._display = None


def read(directory: str | os.PathLike) -> list[dict]:
  """The lines that a `MetricsWriter` wrote to a directory."""
  path = pathlib.Path(directory) / JSONL
  return [parsed for _, parsed in _lines(path)]


def summarise(values: Values, rows: Mapping[str, np.ndarray]) -> dict:
  """Turns a training step's per-layer arrays into metrics under path names.

  `indexer_kl_L` becomes `indexer/kl`; `num_pairs_L` becomes
  `sparsity/realised`, the share of the causal (query, key) pairs that attention
  left out (0 is dense); `expert_load_LE` becomes `moe/load_max` and
  `moe/load_min`, relative to an even load. All are lists over layers.

  Args:
    values: of the step, on the host.
    rows: the batch, for the number of causal pairs if the step does not say.

  Returns:
    The metrics to write; other values as they were.
  """
  metrics = dict(values)
  metrics.pop('num_tokens', None)
  kl_L = metrics.pop('indexer_kl_L', None)
  if kl_L is not None:
    metrics['indexer/kl'] = kl_L
  pairs_L = metrics.pop('num_pairs_L', None)
  if pairs_L is not None:
    causal = metrics.pop('causal_pairs', None)
    if causal is None:
      causal = causal_pairs(rows['segment_ids'])
    metrics['sparsity/realised'] = 1 - np.asarray(pairs_L) / max(causal, 1)
  load_LE = metrics.pop('expert_load_LE', None)
  if load_LE is not None and np.size(load_LE):
    even_L = np.maximum(np.mean(load_LE, axis=-1), 1e-9)
    metrics['moe/load_max'] = np.max(load_LE, axis=-1) / even_L
    metrics['moe/load_min'] = np.min(load_LE, axis=-1) / even_L
  return metrics


def causal_pairs(segment_ids_BT: np.ndarray) -> int:
  """(query, key) pairs of dense causal attention within documents.

  Args:
    segment_ids_BT: contiguous documents, 0 is padding.
  """
  B, T = segment_ids_BT.shape
  is_start_BT = np.ones((B, T), bool)
  is_start_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  place_T = np.arange(T)
  start_BT = np.maximum.accumulate(
    np.where(is_start_BT, place_T[None, :], 0), axis=1
  )
  count_BT = place_T[None, :] - start_BT + 1
  return int(np.sum(count_BT[segment_ids_BT > 0]))


def parameter_overview(params: Any, *, depth: int = 2) -> str:
  """A table of parameter counts by the first parts of their paths.

  Args:
    params: tree of arrays or shapes.
    depth: how many parts of the path make a group.

  Returns:
    Lines: group, arrays, parameters, share, size; and a total.
  """
  groups: dict[str, list] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path[:depth], simple=True, separator='/')
    groups.setdefault(name, []).append(leaf)
  total = sum(math.prod(x.shape) for group in groups.values() for x in group)
  rows = [('group', 'arrays', 'parameters', 'share', 'MB')]
  for name, leaves in [
    *groups.items(),
    ('total', [x for group in groups.values() for x in group]),
  ]:
    count = sum(math.prod(x.shape) for x in leaves)
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)
    rows.append(
      (
        name,
        f'{len(leaves)}',
        f'{count:,}',
        f'{count / max(total, 1):.1%}',
        f'{size / 1e6:,.1f}',
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(width) if column == 0 else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  )


def _lines(path: pathlib.Path) -> list[tuple[bytes, dict]]:
  """Whole lines of a metrics file with their contents."""
  if not path.exists():
    return []
  lines = []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      parsed = json.loads(line)
    except ValueError:
      continue
    if line.endswith(b'\n') and isinstance(parsed, dict) and 'step' in parsed:
      lines.append((line, parsed))
  return lines


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  kept = b''.join(
    line for line, parsed in _lines(path) if parsed['step'] <= step
  )
  if kept != path.read_bytes():
    # A crash in between leaves either file whole.
    temporary = path.with_name(f'{path.name}.tmp')
    temporary.write_bytes(kept)
    os.replace(temporary, path)


def json_values(values: Values) -> dict:
  """Numbers and nested lists; 'NaN' and 'Infinity' where JSON has none."""
  return {
    key: _json(np.asarray(value).tolist()) for key, value in values.items()
  }


def _json(value: Any) -> Any:
  if isinstance(value, list):
    return [_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return 'NaN' if math.isnan(value) else f'{"-" * (value < 0)}Infinity'
  return value


def _scalars(values: Mapping[str, Any]) -> list[tuple[str, float]]:
  """What TensorBoard can show: numbers, and each layer's number."""
  scalars = []
  for key, value in values.items():
    if isinstance(value, list):
      scalars += [
        (f'{key}/{layer}', item)
        for layer, item in enumerate(value)
        if isinstance(item, (int, float))
      ]
    elif isinstance(value, (int, float)):
      scalars.append((key, value))
  return scalars
