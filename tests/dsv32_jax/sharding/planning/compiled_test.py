"""Plans against compiled train steps: arguments exactly, collectives to 5 %."""

import dataclasses
import pathlib
import shlex
import subprocess
import sys

import pytest

from dsv32_jax.sharding.planning import compiled
from tests import experiments_test, readme_test

LARGE = {
  'preset': 'deepseek_v32_671b',
  'rules': 'fsdp_expert_context',
  'compute_dtype': 'float32',
}
SMALL = {
  'preset': 'tiny',
  'rules': 'fsdp_expert_context',
  'length': 256,
  'batch_size': 8,
  'micro_batches': 1,
  'query_chunk': 64,
}


def check(result: compiled.Comparison) -> None:
  planned, found = result.state
  assert planned == found
  everything = sum(sizes[0] for sizes in result.by_kind.values())
  for kind, (planned, found) in result.by_kind.items():
    # Scalars and what orders the tokens are left out of the plan.
    assert abs(found - planned) <= 0.05 * planned + 1e-3 * everything, kind
  assert result.by_kind['all-gather'][1] > 0


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
  'changes',
  [
    {'sizes': {'fsdp': 2, 'context': 4, 'expert': 8}, 'length': 131_072,
     'batch_size': 16, 'micro_batches': 1},
    {'sizes': {'context': 4, 'expert': 4}, 'length': 8192, 'batch_size': 4,
     'stage': 'dense_warmup', 'remat': 'save_attention'},
  ],
  ids=['sparse_training_128k', 'dense_warmup'],
)  # fmt: skip
def test_step_of_the_whole_671b_model_is_what_was_planned(changes):
  """61 layers and MTP, 256 experts, 64 and 16 virtual devices."""
  check(compiled.compare({**LARGE, **changes}, timeout=880))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
  'changes',
  [
    {'sizes': {'fsdp': 2, 'context': 2, 'expert': 2}},
    {'sizes': {'data': 2, 'fsdp': 4}, 'rules': 'fsdp'},
    {'sizes': {'data': 2, 'expert': 4}, 'rules': 'fsdp_expert'},
    {'sizes': {'expert': 4, 'tensor': 2}, 'rules': 'fsdp_tensor_expert'},
    {'sizes': {'context': 4, 'expert': 2}, 'remat': 'save_attention'},
    {'sizes': {'context': 2, 'expert': 4}, 'stage': 'dense_warmup'},
    {'sizes': {'fsdp': 2, 'context': 2, 'expert': 2}, 'micro_batches': 2},
  ],
  ids=lambda changes: ' '.join(map(str, changes.values())),
)
def test_step_of_a_small_model_has_the_planned_arguments(changes):
  """The rule sets of training; here vectors and scalars are no small part."""
  result = compiled.compare({**SMALL, **changes}, timeout=110)
  planned, found = result.state
  assert planned == found
  for kind in ('all-to-all', 'reduce-scatter'):
    planned, found = result.by_kind.get(kind, (0, 0))
    assert found == pytest.approx(planned, rel=0.05), kind


@pytest.mark.slow
@pytest.mark.exhaustive
def test_failure_of_the_compiling_process_is_told():
  with pytest.raises(RuntimeError, match=r'(?s)failed:.*ValueError'):
    compiled.compare({**SMALL, 'sizes': {'expert': 3}})


def plan(*arguments: str) -> subprocess.CompletedProcess:
  return experiments_test.script('plan', *arguments)


@pytest.mark.slow
def test_script_prints_a_plan_and_writes_files(tmp_path):
  done = plan(
    '--preset=tiny', '--mesh=expert=4,context=2', '--length=4096',
    '--batch_size=16', '--query_chunk=64', '--gpus=8',
    f'--jsonl={tmp_path / "plans.jsonl"}', f'--plot={tmp_path / "plan.png"}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  for part in ('parameters: ', 'memory of one device', 'the recipe'):
    assert part in done.stdout
  assert (tmp_path / 'plans.jsonl').read_text().count('\n') == 1
  assert (tmp_path / 'plan.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--mesh=pipe=2',), "mesh: axis: got 'pipe', expected one of"),
    (('--mesh=fsdp=32', '--gpus=64'), 'fsdp 32 = 32 devices, expected the 64'),
    (('--search',), 'gpus: got None, expected a number'),
    (('--rules=pipeline',), "rules: got 'pipeline', expected one of"),
    (
      ('--mesh=expert=512', '--batch_size=512'),
      'is not divisible by the 512 devices',
    ),
  ],
)
@pytest.mark.slow
@pytest.mark.exhaustive
def test_script_says_in_one_line_what_is_wrong(arguments, message):
  done = plan(*arguments)
  assert done.returncode == 1
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith('error: ')
  assert message in line


def documented() -> list[tuple[str, ...]]:
  """Arguments of every command that docs/plan_671b.md shows."""
  found = readme_test.commands(readme_test.read_page('docs/plan_671b.md'))
  return [
    tuple(words[2:])
    for words in found
    if words[:2] == ['python', 'experiments/plan.py']
  ]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize('arguments', documented(), ids=shlex.join)
def test_commands_of_the_docs_run(arguments, tmp_path):
  redirected = [
    f'{name}={tmp_path / pathlib.Path(value).name}'
    if name in ('--jsonl', '--plot')
    else word
    for word in arguments
    for name, _, value in [word.partition('=')]
  ]
  done = plan(*redirected)
  assert done.returncode == 0, done.stderr
  assert 'DOES NOT FIT' not in done.stdout


def test_docs_show_commands():
  assert len(documented()) >= 3


def test_comparison_is_plain_data():
  names = [field.name for field in dataclasses.fields(compiled.Comparison)]
  assert names == ['state', 'by_kind', 'seconds', 'found']
  assert sys.executable
