r"""Evaluates the stages of a work directory again, or a model on a suite.

    python experiments/evaluate.py --workdir=runs/quick

Reads the configuration that the run was started with and rewrites its report.
With other settings of the evaluation: --rows=64 --recall_rows=64
--seq_lens=256,512. On other devices than the run was on: --mesh=data=1, or
--mesh=expert=2,fsdp=2 --mesh_rules=fsdp_expert.

    python experiments/evaluate.py --suite=human_eval --solutions=reference
    python experiments/evaluate.py --suite=human_eval --mode=completion \
      --checkpoint=runs/quick/stages/sparse_training --samples=4 --k=1,4

Scores the suite's own solutions, mutated ones, or a model's samples; prints a
table and writes a row a sample to --rows_file (docs/evaluation.md).
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from dsv32_jax import inference
from dsv32_jax.agents.sandbox import SandboxPool
from dsv32_jax.config import convert
from dsv32_jax.config.training import MeshConfig, RunConfig
from dsv32_jax.evaluation import report, results
from dsv32_jax.evaluation.suites import human_eval, runner, sampling
from dsv32_jax.serving import loading
from dsv32_jax.sharding.planning import request
from dsv32_jax.sharding.rules import RULE_SETS
from dsv32_jax.training import flags as run_flags

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Work directory of a finished run.'
)
_ROWS = flags.DEFINE_integer('rows', None, 'Text rows a length.')
_RECALL_ROWS = flags.DEFINE_integer('recall_rows', None, 'Rows a distance.')
_SEQ_LENS = flags.DEFINE_list('seq_lens', None, 'Lengths of the text rows.')
_MESH = flags.DEFINE_string(
  'mesh', None, "Axes with sizes, fsdp=4,expert=2; the run's own if not given."
)
_RULES = flags.DEFINE_enum(
  'mesh_rules', 'fsdp', sorted(RULE_SETS), 'Rule set, with --mesh.'
)
_DISTANCES = flags.DEFINE_list('distances', None, 'Recall distances, tokens.')
_SUITE = flags.DEFINE_enum('suite', None, [human_eval.NAME], 'Outside suite.')
_SOLUTIONS = flags.DEFINE_enum(
  'solutions', None, ['reference', 'mutated'], 'Instead of a model.'
)
_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'Stage or Hugging Face directory of the model.'
)
_MODE = flags.DEFINE_enum('mode', 'chat', sampling.MODES, 'How it is asked.')
_SAMPLES = flags.DEFINE_integer('samples', 1, 'Of each problem.')
_PROBLEMS = flags.DEFINE_integer('problems', None, 'The first so many; or all.')
_K = flags.DEFINE_list('k', ['1'], 'Of pass@k.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 is greedy.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw from this much probability.')
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 512, 'Of a sample.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of all samples.')
_ROWS_FILE = flags.DEFINE_string(
  'rows_file', 'runs/evaluation/rows.jsonl', 'Where rows are written.'
)
_SANDBOXES = flags.DEFINE_integer('sandboxes', 2, 'That run at a time.')


def main(argv: list[str]) -> None:
  del argv
  if (_SUITE.value is None) == (_WORKDIR.value is None):
    raise ValueError('suite: expected --suite or --workdir, one of them')
  if _SUITE.value is None:
    _evaluate_stages(pathlib.Path(str(_WORKDIR.value)))
  else:
    _evaluate_on_suite()


def _evaluate_on_suite() -> None:
  if (_SOLUTIONS.value is None) == (_CHECKPOINT.value is None):
    raise ValueError(
      'solutions: expected --solutions or --checkpoint, one of them'
    )
  chosen = human_eval.problems()[: _PROBLEMS.value]
  if _SOLUTIONS.value is None:
    weights = sampling.hash_of_weights(pathlib.Path(str(_CHECKPOINT.value)))
    samples = _sample(chosen)
  else:
    weights = _SOLUTIONS.value
    samples = (
      runner.reference_samples(chosen)
      if weights == 'reference'
      else runner.mutated_samples(chosen)
    )
  with SandboxPool(sandboxes=_SANDBOXES.value) as pool:
    rows = runner.score(samples, pool, weights=weights)
  path = pathlib.Path(_ROWS_FILE.value)
  runner.write(path, rows)
  print(runner.table(rows, [int(k) for k in _K.value]))
  passed = sum(row.passed for row in rows)
  print(f'{passed} of {len(rows)} samples pass; rows: {path}')


def _sample(chosen: Sequence[human_eval.Problem]) -> list[runner.Sample]:
  loaded = loading.load(checkpoint=_CHECKPOINT.value)
  engine = inference.Engine(
    loaded.model,
    loaded.variables,
    inference.EngineConfig(max_batch=8, fill_first=True),
    tokenizer=loaded.tokenizer,
  )
  return sampling.samples(
    engine,
    loaded.tokenizer,
    chosen,
    mode=_MODE.value,
    per_problem=_SAMPLES.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    sampling=inference.Sampling(
      temperature=_TEMPERATURE.value, top_p=_TOP_P.value
    ),
    seed=_SEED.value,
  )


def _evaluate_stages(workdir: pathlib.Path) -> None:
  path = workdir / 'config.json'
  if not path.exists():
    raise ValueError(f'workdir: {workdir} holds no run (no config.json there)')
  saved = json.loads(path.read_text(encoding='utf-8'))['config']
  config = convert.from_dict(RunConfig, saved)
  changes: dict = {'rows': _ROWS.value, 'recall_rows': _RECALL_ROWS.value}
  for name, value in (
    ('seq_lens', _SEQ_LENS.value),
    ('recall_distances', _DISTANCES.value),
  ):
    changes[name] = value and tuple(int(item) for item in value)
  config = dataclasses.replace(
    config,
    evaluation=dataclasses.replace(
      config.evaluation,
      **{name: value for name, value in changes.items() if value},
    ),
  )
  if _MESH.value is not None:
    sizes: Any = {'data': 1} | request.parse_mesh(_MESH.value)
    rules: Any = _RULES.value
    mesh = MeshConfig(rules=rules, **sizes)
    config = dataclasses.replace(config, mesh=mesh)
  report.write(workdir, results.collect(config, workdir))


if __name__ == '__main__':
  run_flags.run(main)
