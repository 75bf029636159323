import dataclasses
import json

import jax
import numpy as np
import pytest

from dsv32_jax.checkpoints import load_params
from dsv32_jax.config.data import SourceConfig
from dsv32_jax.config.training import MeshConfig, RunConfig
from dsv32_jax.evaluation import report, results
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import recipe
from dsv32_jax.training import state as state_lib
from tests.support import small_runs

# The fixture compiles every stage of a run, in the first test that asks.
pytestmark = pytest.mark.timeout(600)

ONE_DEVICE = MeshConfig(data=1)


def quiet(line):
  del line


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A whole small run: its config and work directory."""
  root = tmp_path_factory.mktemp('recipe')
  corpus = small_runs.write_corpus(root / 'corpus')
  config = small_runs.run_config(corpus, mesh=ONE_DEVICE)
  workdir = root / 'run'
  run = recipe.Run(config, workdir, report=quiet)
  run.run(observe=results.stage_observer(config))
  return config, workdir


def load(config: RunConfig, workdir, name: str) -> dict:
  model = DeepSeekV32(config.stage_model(name))
  shapes = state_lib.variable_shapes(model)
  return load_params(workdir / 'stages' / name, shapes).state


def with_stage(config: RunConfig, name: str, **changes) -> RunConfig:
  stages = dict(config.stages)
  stages[name] = dataclasses.replace(stages[name], **changes)
  return dataclasses.replace(config, stages=stages)


def test_recipe_second_run_skips_every_stage(finished):
  config, workdir = finished
  said = []
  before = (workdir / 'stages' / 'pretrain' / 'metrics.jsonl').read_bytes()
  recipe.Run(config, workdir, report=said.append).run()
  assert said == [f'{name}: done already, skipped' for name in config.order]
  after = (workdir / 'stages' / 'pretrain' / 'metrics.jsonl').read_bytes()
  assert before == after


def test_recipe_stage_starts_from_the_stage_before(finished):
  config, workdir = finished
  base = load(config, workdir, 'pretrain')
  warm = load(config, workdir, 'dense_warmup')
  np.testing.assert_array_equal(
    base['params']['lm_head'], warm['params']['lm_head']
  )
  old, new = (
    v['params']['dense_layers']['layers']['attention']['indexer']['w_ik']
    for v in (base, warm)
  )
  assert np.max(np.abs(old - new)) > 0


def test_recipe_warmup_leaves_a_true_proof(finished):
  _, workdir = finished
  path = workdir / 'stages' / 'dense_warmup' / 'proof.json'
  proof = json.loads(path.read_text())
  for name in (
    'dense_forward',
    'full_row_kl',
    'others_bit_identical',
    'indexers_moved',
  ):
    assert proof[name] is True, name
  assert proof['arrays_compared'] > 20


def test_recipe_metrics_show_realised_sparsity(finished):
  _, workdir = finished

  def last(name):
    path = workdir / 'stages' / name / 'metrics.jsonl'
    return json.loads(path.read_text().splitlines()[-1])

  assert last('pretrain')['sparsity/realised'] == [0.0, 0.0]
  assert min(last('sparse_training')['sparsity/realised']) > 0.3
  assert len(last('sparse_training')['indexer/text/overlap']) == 2


@pytest.mark.slow
def test_recipe_report_holds_every_part_with_data_beside(finished):
  config, workdir = finished
  found = results.collect(config, workdir)
  path = report.write(workdir, found)
  text = path.read_text()
  for part in ('Held-out loss', 'Recall task', 'Selection after', 'Cost'):
    assert f'## {part}' in text
  for name in ('training', 'recall', 'loss_by_position', 'cost'):
    assert (workdir / 'report' / f'{name}.png').stat().st_size > 5000
    json.loads((workdir / 'report' / f'{name}.json').read_text())
  page = (workdir / 'report.html').read_text()
  assert 'data:image/png;base64,' in page
  assert 'src="http' not in page
  saved = json.loads((workdir / 'report' / 'results.json').read_text())
  assert set(saved['quality']) == {'dense_warmup', 'sparse_training'}


def test_recipe_other_config_in_same_workdir_is_refused(finished):
  config, workdir = finished
  before = (workdir / 'config.json').read_bytes()
  other = with_stage(config, 'pretrain', steps=3)
  with pytest.raises(
    ValueError, match=r'stages\.pretrain\.steps = 2, this one has 3'
  ):
    recipe.Run(other, workdir, report=quiet)
  assert (workdir / 'config.json').read_bytes() == before


def test_recipe_foreign_directory_is_refused(finished, tmp_path):
  config, _ = finished
  (tmp_path / 'thesis.tex').write_text('mine')
  with pytest.raises(ValueError, match=r'holds files that are not of a run'):
    recipe.Run(config, tmp_path, report=quiet)
  assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']


def test_recipe_unknown_stage_is_refused(finished):
  config, workdir = finished
  with pytest.raises(ValueError, match=r"stage: got 'warmup', expected one of"):
    recipe.Run(config, workdir, report=quiet).run(only='warmup')


def test_recipe_stage_before_its_start_is_refused(finished, tmp_path):
  config, _ = finished
  run = recipe.Run(config, tmp_path / 'new', report=quiet)
  with pytest.raises(ValueError, match=r"'pretrain' is not done"):
    run.run(only='dense_warmup')


def test_recipe_start_from_checkpoint_path_works(finished, tmp_path):
  config, workdir = finished
  other = with_stage(
    config, 'dense_warmup', init_from=str(workdir / 'stages' / 'pretrain')
  )
  other = dataclasses.replace(other, order=('dense_warmup',))
  recipe.Run(other, tmp_path / 'new', report=quiet).run()
  mine = load(other, tmp_path / 'new', 'dense_warmup')
  theirs = load(config, workdir, 'dense_warmup')
  for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)


def test_recipe_start_from_other_shape_is_refused(finished, tmp_path):
  config, workdir = finished
  other = with_stage(
    config, 'dense_warmup', init_from=str(workdir / 'stages' / 'pretrain')
  )
  wider = dataclasses.replace(config.model, intermediate_size=160)
  other = dataclasses.replace(other, order=('dense_warmup',), model=wider)
  run = recipe.Run(other, tmp_path / 'new', report=quiet)
  with pytest.raises(ValueError, match=r'128.*160|160.*128'):
    run.run()


@pytest.mark.parametrize('kind', ['missing', 'empty'])
def test_recipe_bad_corpus_is_refused_before_anything_is_written(
  kind, finished, tmp_path
):
  config, _ = finished
  path = tmp_path / 'corpus'
  if kind == 'empty':
    path.mkdir()
  source = (SourceConfig(kind='text', path=str(path)),)
  for name, stage in config.stages.items():
    data = dataclasses.replace(stage.data, sources=source)
    config = with_stage(config, name, data=data)
  with pytest.raises(ValueError, match=str(path)):
    recipe.Run(config, tmp_path / 'new', report=quiet)
  assert not (tmp_path / 'new').exists()


@pytest.mark.multidevice
@pytest.mark.parametrize(
  ('mesh', 'message'),
  [
    (
      MeshConfig(fsdp=4, data=1),
      r'stages\.pretrain\.data\.batch_size: got 2, expected a multiple of 4',
    ),
    (
      MeshConfig(rules='fsdp_expert_context', data=1, context=5),
      r'stages\.pretrain\.data\.seq_len: got 48, expected a multiple of 10',
    ),
    (
      MeshConfig(rules='decode_expert', data=1, tensor=3),
      r"dimension '(vocab|heads)' of size .* the 3 devices of mesh axes tensor",
    ),
    (MeshConfig(data=1, expert=2), r'mesh\.expert: got 2 with mesh\.rules'),
  ],
  ids=['rows', 'tokens', 'parameters', 'rules'],
)
def test_recipe_layout_that_does_not_divide_is_refused_before_writing(
  mesh, message, finished, tmp_path
):
  config, _ = finished
  config = dataclasses.replace(config, mesh=mesh)
  with pytest.raises(ValueError, match=message):
    recipe.Run(config, tmp_path / 'new', report=quiet)
  assert not (tmp_path / 'new').exists()


def test_recipe_vocabulary_too_small_is_refused(finished, tmp_path):
  config, _ = finished
  small = dataclasses.replace(config.model, vocab_size=200)
  config = dataclasses.replace(config, model=small)
  with pytest.raises(ValueError, match='200'):
    recipe.Run(config, tmp_path / 'new', report=quiet)
  assert not (tmp_path / 'new').exists()


def test_recipe_start_optimizer_state_is_kept_and_schedule_restarts(finished):
  config, workdir = finished
  config = with_stage(
    config, 'dense_control', init_from='pretrain', keep_optimizer_state=True
  )
  run = recipe.Run.__new__(recipe.Run)
  run.config, run.workdir, run._report = config, workdir, quiet
  run._parallel = None
  name = 'dense_control'
  model = DeepSeekV32(config.stage_model(name))
  stage = recipe.stages.build(config.stages[name], model.cfg)
  tx = recipe.optimizer.build(config.stages[name], stage)
  start = run._start_variables(name, model)
  state = run._with_optimizer_state(name, state_lib.create(start, stage, tx))
  counts, moments = [], 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    where = jax.tree_util.keystr(path)
    if where.endswith('.count'):
      counts.append(int(leaf))
    elif '.nu' in where:
      moments += float(np.sum(leaf))
  assert moments > 0
  # Adam's own count goes on (2 steps were done), the schedule's begins anew.
  assert sorted(counts) == [0, 2]
