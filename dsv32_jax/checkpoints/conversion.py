"""Between Hugging Face checkpoint directories and those of training stages.

A stage directory that was made here holds parameters and router biases at step
0, without an optimizer: enough to start a stage from, to generate and to export
again.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from dsv32_jax.checkpoints import (
  arrays,
  hf_check,
  hf_export,
  hf_import,
  reading,
)
from dsv32_jax.checkpoints.hf_check import Indexer, Plan
from dsv32_jax.checkpoints.hf_layout import Quantize
from dsv32_jax.checkpoints.manager import CheckpointManager
from dsv32_jax.checkpoints.stage_import import load_stage
from dsv32_jax.checkpoints.transfer_progress import Progress
from dsv32_jax.config import convert
from dsv32_jax.config.model import Precision
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding.parallel import Parallel

Report = Callable[[str], None]


def is_hf(path: str | os.PathLike) -> bool:
  """Whether a directory looks like a Hugging Face checkpoint."""
  root = pathlib.Path(path)
  return (root / 'config.json').is_file() and not (root / 'stages').is_dir()


def hf_to_stage(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  mtp: bool | None = None,
  indexer: Indexer = 'load',
  seed: int = 0,
  overrides: Mapping[str, Any] | None = None,
  precision: Precision | None = None,
  parallel: Parallel | None = None,
  progress: Progress | None = None,
  report: Report = print,
) -> None:
  """Imports a Hugging Face checkpoint as a stage directory.

  A second call with the same source finds the work done. An import that was
  interrupted starts again: until it is sealed, the stage has no checkpoint.

  Args:
    source: Hugging Face directory.
    target: stage directory, best WORKDIR/stages/NAME: then the tokenizer's
      files go to WORKDIR/tokenizer, where `experiments/generate.py` looks.
    mtp: see `load_hf`, as are indexer, seed, overrides, precision, parallel and
      progress.
    indexer: see there.
    seed: see there.
    overrides: see there.
    precision: see there.
    parallel: see there.
    progress: see there.
    report: receives lines for the user.

  Raises:
    ValueError: what `load_hf` raises, or a target that holds something else.
    CheckpointError: the disk is full or cannot be written.
  """
  stage = pathlib.Path(target).absolute()
  options = {
    'mtp': mtp,
    'indexer': indexer,
    'seed': seed if indexer == 'init' else None,
    'overrides': dict(overrides or {}),
    'precision': precision and convert.to_dict(precision),
  }
  plan = hf_check.check(
    source, mtp=mtp, indexer=indexer, overrides=overrides, precision=precision
  )
  report(f'{source}: {plan.summary()}')
  fingerprint = _fingerprint(plan, options)
  with CheckpointManager(stage / 'checkpoints', report=report) as manager:
    if manager.sealed_steps():
      step, extra = reading.read_extra(stage, report=report)
      if extra.get('fingerprint') != fingerprint:
        raise ValueError(
          f'{stage}: holds a checkpoint of step {step} that is not of this '
          'import, expected a new directory'
        )
      report(f'{stage}: imported already')
      return
    _check_space(stage, plan)
    model, variables = hf_import.load_hf(
      source,
      mtp=mtp,
      indexer=indexer,
      seed=seed,
      overrides=overrides,
      precision=precision,
      parallel=parallel,
      progress=progress,
      report=report,
    )
    manager.save(
      0,
      variables,
      {
        'stage': stage.name,
        'model': convert.to_dict(model.cfg),
        'source': os.fspath(source),
        'fingerprint': fingerprint,
      },
    )
    manager.wait()
  home = stage.parents[1] / 'tokenizer'
  if stage.parent.name == 'stages' and not home.exists():
    _copy_tokenizer(pathlib.Path(source), home)
  report(f'{stage}: imported')


def stage_to_hf(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  dtype: str | None = None,
  quantize: Quantize | None = None,
  max_shard_bytes: int = 5_000_000_000,
  tokenizer: str | os.PathLike | None = None,
  parallel: Parallel | None = None,
  progress: Progress | None = None,
  report: Report = print,
) -> None:
  """Exports the newest sound checkpoint of a stage to Hugging Face's layout.

  Args:
    source: stage directory, or one checkpoint.
    target: directory to make.
    dtype: see `save_hf`, as are quantize, max_shard_bytes and progress.
    quantize: see there.
    max_shard_bytes: see there.
    tokenizer: directory whose files go along; None takes WORKDIR/tokenizer of a
      source WORKDIR/stages/NAME, if there is one.
    parallel: lays the variables out meanwhile.
    progress: see `save_hf`.
    report: receives lines for the user.

  Raises:
    ValueError: what `save_hf` raises.
    CheckpointError: no undamaged checkpoint, or the disk is full.
  """
  if pathlib.Path(target).exists():
    raise ValueError(f'{target}: exists, expected the path of a new directory')
  if tokenizer is None:
    stage = pathlib.Path(source).absolute()
    home = stage.parents[1] / 'tokenizer'
    tokenizer = home if stage.parent.name == 'stages' else None
    if tokenizer is not None and not home.is_dir():
      tokenizer = None
  model, variables = load_stage(source, parallel)
  hf_export.save_hf(
    model,
    variables,
    target,
    dtype=dtype,
    quantize=quantize,
    max_shard_bytes=max_shard_bytes,
    tokenizer=tokenizer,
    progress=progress,
  )
  report(f'{target}: {hf_check.check(target).summary()}')


def hf_to_hf(
  source: str | os.PathLike,
  target: str | os.PathLike,
  *,
  dtype: str | None = None,
  quantize: Quantize | None = None,
  max_shard_bytes: int = 5_000_000_000,
  tokenizer: str | os.PathLike | None = None,
  mtp: bool | None = None,
  indexer: Indexer = 'load',
  seed: int = 0,
  overrides: Mapping[str, Any] | None = None,
  precision: Precision | None = None,
  parallel: Parallel | None = None,
  progress: Progress | None = None,
  report: Report = print,
) -> None:
  """Rewrites a Hugging Face checkpoint: other shards, dtypes, FP8 or not.

  Args:
    source: Hugging Face directory.
    target: directory to make.
    dtype: see `save_hf`, as are quantize and max_shard_bytes; FP8 matrices that
      stay FP8 keep their values and scales.
    quantize: see there.
    max_shard_bytes: see there.
    tokenizer: directory whose files go along; None takes the source's.
    mtp: see `load_hf`, as is all that follows.
    indexer: see there.
    seed: see there.
    overrides: see there.
    precision: see there.
    parallel: see there.
    progress: see there.
    report: receives lines for the user.

  Raises:
    ValueError: what `load_hf` and `save_hf` raise.
    CheckpointError: the disk is full or cannot be written.
  """
  if pathlib.Path(target).exists():
    raise ValueError(f'{target}: exists, expected the path of a new directory')
  model, variables = hf_import.load_hf(
    source,
    mtp=mtp,
    quantized='keep' if quantize else 'dequantize',
    indexer=indexer,
    seed=seed,
    overrides=overrides,
    precision=precision,
    parallel=parallel,
    progress=progress,
    report=report,
  )
  hf_export.save_hf(
    model,
    variables,
    target,
    dtype=dtype,
    quantize=quantize,
    max_shard_bytes=max_shard_bytes,
    tokenizer=source if tokenizer is None else tokenizer,
    progress=progress,
  )
  report(f'{target}: {hf_check.check(target).summary()}')


def _check_space(stage: pathlib.Path, plan: Plan) -> None:
  """Refuses a disk that cannot hold the parameters, before they are read."""
  shapes = hf_import.variable_shapes(DeepSeekV32(plan.cfg))
  # Orbax's own files, too.
  needed = arrays.num_bytes(shapes) + (1 << 20)
  there = next(p for p in (stage, *stage.parents) if p.exists())
  free = shutil.disk_usage(there).free
  if free < needed:
    raise reading.CheckpointError(
      f'{stage}: {free / 1e6:,.1f} MB free, expected at least '
      f'{needed / 1e6:,.1f} MB'
    )


def _fingerprint(plan: Plan, options: Mapping[str, Any]) -> str:
  """Names a source by its headers and sizes, and what is made of it."""
  files = {entry.file for entry in plan.stored.values()}
  content = {
    'model': convert.to_dict(plan.cfg),
    'options': options,
    'files': {file.name: file.stat().st_size for file in sorted(files)},
    'tensors': sorted(
      (name, entry.file.name, entry.shape, entry.dtype, entry.offset)
      for name, entry in plan.stored.items()
    ),
  }
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _copy_tokenizer(source: pathlib.Path, home: pathlib.Path) -> None:
  files = hf_export.tokenizer_files(source)
  if not any(file.name == 'tokenizer.json' for file in files):
    return
  partial = home.with_name(f'{home.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  for file in files:
    shutil.copyfile(file, partial / file.name)
  os.rename(partial, home)
