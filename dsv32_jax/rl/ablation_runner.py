"""Runs cells of ablations in parallel processes, resumably.

A directory of results holds `worker_N.jsonl`, one line a cell that is done, and
`claims/`, one file a cell that was begun. A process takes the next cell that
nobody has; whoever is killed loses the cell that it was at.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dsv32_jax.rl.ablations import VARIANTS, Cell

CLAIMS = 'claims'


def read(results: pathlib.Path) -> list[dict[str, Any]]:
  """All rows, the first of each cell, in the order of their cells' names.

  A line that was cut off when its process was killed is left out.
  """
  rows: dict[str, dict[str, Any]] = {}
  for path in sorted(pathlib.Path(results).glob('*.jsonl')):
    for line in path.read_text(encoding='utf-8').splitlines(keepends=True):
      if line.endswith('\n'):
        row = json.loads(line)
        rows.setdefault(row['cell'], row)
  return [rows[key] for key in sorted(rows)]


def clear_claims(results: pathlib.Path) -> None:
  """Gives back what processes claimed that are no more; none may be running."""
  folder = pathlib.Path(results) / CLAIMS
  folder.mkdir(parents=True, exist_ok=True)
  for path in folder.iterdir():
    path.unlink()


def work(
  run: Callable[[Cell], dict[str, Any]],
  cells: Sequence[Cell],
  results: pathlib.Path,
  *,
  worker: int,
  report: Callable[[str], None] = print,
) -> int:
  """Runs cells until none is left; returns how many this process ran.

  Within a seed a process begins with the variant of its own number, so that
  each compiles few programs.

  Args:
    run: runs one, as `Lab.run` does.
    cells: all, of all processes.
    results: the directory.
    worker: number of this process.
    report: gets a line a cell.
  """
  results = pathlib.Path(results)
  done = {row['cell'] for row in read(results)}
  names = list(VARIANTS)
  count = 0
  path = results / f'worker_{worker}.jsonl'
  _end_line(path)
  order = sorted(
    cells,
    key=lambda c: (c.seed, (names.index(c.variant) - worker) % len(names)),
  )
  for cell in order:
    if cell.key in done or not _claim(results, cell):
      continue
    row = run(cell)
    with path.open('a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')
      file.flush()
      os.fsync(file.fileno())
    count += 1
    report(line_of(row))
  return count


def line_of(row: dict[str, Any]) -> str:
  """One line on a finished cell."""
  ended = (
    f'diverged at step {row["diverged"]}'
    if row['after'] is None
    else f'{row["before"]["pass@1"]:.3f} -> {row["after"]["pass@1"]:.3f}'
  )
  return f'{row["cell"]}: {ended}, {row["seconds"]:.0f} s'


def run_all(
  command: Sequence[str],
  results: pathlib.Path,
  *,
  workers: int,
  cores: Sequence[int],
  report: Callable[[str], None] = print,
) -> list[int]:
  """Starts the processes and waits for them.

  Args:
    command: of this program, to which `--worker=N --cores=A,B` is added; it
      keeps to those cores.
    results: the directory.
    workers: how many processes.
    cores: shared out among them in equal parts.
    report: gets a line when a process ends.

  Returns:
    Exit codes.

  Raises:
    ValueError: for more processes than cores.
  """
  if not 1 <= workers <= len(cores):
    raise ValueError(
      f'workers: got {workers}, expected 1 to {len(cores)}, the cores'
    )
  clear_claims(results)
  share = len(cores) // workers
  running: dict[int, subprocess.Popen] = {}
  try:
    for number in range(workers):
      mine = ','.join(map(str, cores[number * share : (number + 1) * share]))
      running[number] = subprocess.Popen(
        [sys.executable, *command, f'--worker={number}', f'--cores={mine}']
      )
    codes: dict[int, int] = {}
    while len(codes) < workers:
      for number, process in running.items():
        if number not in codes and process.poll() is not None:
          codes[number] = process.returncode
          report(f'process {number} ended with {process.returncode}')
      time.sleep(0.2)
    return [codes[number] for number in range(workers)]
  finally:
    for process in running.values():
      if process.poll() is None:
        process.terminate()
    for process in running.values():
      process.wait()


def _claim(results: pathlib.Path, cell: Cell) -> bool:
  folder = results / CLAIMS
  folder.mkdir(parents=True, exist_ok=True)
  try:
    (folder / cell.key.replace('/', '.')).touch(exist_ok=False)
  except FileExistsError:
    return False
  return True


def _end_line(path: pathlib.Path) -> None:
  """Cuts off what a killed process left of a line."""
  if path.exists():
    text = path.read_bytes()
    whole = text[: text.rfind(b'\n') + 1]
    if whole != text:
      path.write_bytes(whole)
