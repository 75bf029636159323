"""Everything a continued-training run is judged by, as plain numbers.

Reads a work directory (see `dsv32_jax.training.recipe`), runs the held-out
evaluations on each stage's final parameters and returns JSON-able results.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from dsv32_jax import data
from dsv32_jax.checkpoints import load_params
from dsv32_jax.checkpoints.hf_import import variable_shapes
from dsv32_jax.config.model import AttentionMode
from dsv32_jax.config.training import RunConfig, StageConfig
from dsv32_jax.evaluation import (
  flops,
  observe,
  perplexity,
  recall_task,
  selection_recall,
)
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib

SELECTOR_NAMES = ('indexer', 'oracle', 'window', 'random')
_TRAINED_WITH = {
  'indexer': 'sparse',
  'all': 'dense',
  'window': 'window',
  'random': 'random',
}
# Lengths at which pairs and FLOPs are counted, beside the run's own.
_COST_LENGTHS = (1024, 4096, 16384, 65536, 131072)


def stage_observer(
  config: RunConfig,
) -> Callable[[DeepSeekV32, AttentionMode, StageConfig, data.Corpora], Any]:
  """The `observe` argument of `recipe.Run.run`.

  Args:
    config: its evaluation settings say on how many rows.

  Returns:
    (model, attention, stage, corpora) -> the loop's evaluation callable, on one
    batch of held-out text and one of recall rows of the stage's length.
  """

  def observe_stage(
    model: DeepSeekV32,
    attention: AttentionMode,
    stage: StageConfig,
    corpora: data.Corpora,
  ) -> Any:
    size = config.evaluation.batch_size
    text = data.held_out_batches(
      stage.data,
      corpora,
      seq_len=stage.data.seq_len,
      batch_size=size,
      num_batches=1,
    )
    recall: list[Mapping] = []
    if stage.data.recall.share > 0:
      part = data.held_out_recall(
        stage.data,
        corpora,
        vocab_size=model.cfg.vocab_size,
        seq_len=stage.data.seq_len,
        batch_size=size,
        distance=stage.data.seq_len // 2,
      )
      recall.append(part.batch)
    return observe.observer(
      model, attention, text=text, recall=recall, seed=config.seed
    )

  return observe_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trained:
  """A stage's model and final parameters."""

  stage: StageConfig
  model: DeepSeekV32
  variables: dict


class _Reader:
  """Loads stages and held-out data of a work directory."""

  def __init__(self, config: RunConfig, workdir: pathlib.Path):
    self.config = config
    self.workdir = workdir
    self.tokenizer = data.load_tokenizer(str(workdir / 'tokenizer'))
    self._corpora: dict = {}

  def trained(self, name: str) -> _Trained:
    """A finished stage."""
    model = DeepSeekV32(self.config.stage_model(name))
    state = load_params(
      self.workdir / 'stages' / name,
      variable_shapes(model, parallel_lib.active()),
    ).state
    return _Trained(
      stage=self.config.stages[name], model=model, variables=state
    )

  def corpora(self, stage: StageConfig) -> data.Corpora:
    """Tokenized sources of a stage."""
    key = (stage.data.sources, stage.data.tokenizer)
    if key not in self._corpora:
      self._corpora[key] = data.load_corpora(stage.data, self.tokenizer)
    return self._corpora[key]

  def text(self, stage: StageConfig, seq_len: int) -> tuple:
    """Held-out rows of one length."""
    settings = self.config.evaluation
    return data.held_out_batches(
      stage.data,
      self.corpora(stage),
      seq_len=seq_len,
      batch_size=settings.batch_size,
      num_batches=max(settings.rows // settings.batch_size, 1),
    )

  def recall(self, stage: StageConfig, vocab_size: int) -> dict[int, list]:
    """Held-out recall rows by distance."""
    settings = self.config.evaluation
    count = max(settings.recall_rows // settings.batch_size, 1)
    return {
      distance: [
        data.held_out_recall(
          stage.data,
          self.corpora(stage),
          vocab_size=vocab_size,
          seq_len=stage.data.seq_len,
          batch_size=settings.batch_size,
          distance=distance,
          seed=index,
        )
        for index in range(count)
      ]
      for distance in settings.recall_distances
      if distance < stage.data.seq_len
    }


def collect(config: RunConfig, workdir: pathlib.Path) -> dict[str, Any]:
  """Evaluates a finished run, under the layout of `config.mesh`.

  Args:
    config: of the run; the mesh may be another one.
    workdir: where its stages are.

  Returns:
    JSON-able: `stages` (what ran), `training` (metrics by stage), `quality`
    (selection by stage, text and recall rows), `loss` (held-out loss by length
    and way of training), `recall` (accuracy by distance), `cost` (pairs and
    FLOPs). Parts whose stages are not in the recipe are left out.
  """
  with parallel_lib.use(mesh_lib.make_parallel(config.mesh)):
    return _collect(config, workdir.absolute())


def _collect(config: RunConfig, workdir: pathlib.Path) -> dict[str, Any]:
  reader = _Reader(config, workdir)
  found: dict[str, Any] = {
    'stages': _stages(config, workdir),
    'training': {
      name: _metrics(workdir / 'stages' / name) for name in config.order
    },
    'cost': _cost(config),
  }
  warm = [n for n in config.order if config.stages[n].kind == 'dense_warmup']
  by_selector = {
    config.stages[name].selector: name
    for name in config.order
    if config.stages[name].kind == 'sparse_training'
  }
  trained = {
    _TRAINED_WITH[selector]: reader.trained(name)
    for selector, name in by_selector.items()
    if selector in _TRAINED_WITH
  }
  rated = {name: reader.trained(name) for name in warm}
  if 'sparse' in trained:
    rated[by_selector['indexer']] = trained['sparse']
  found['quality'] = {
    name: _timed(f'selection after {name}', _quality, reader, part)
    for name, part in rated.items()
  }
  if trained:
    found['loss'] = _timed('held-out loss', _losses, reader, trained)
  if 'sparse' in trained and trained['sparse'].stage.data.recall.share > 0:
    found['recall'] = _timed('recall task', _recall, reader, trained)
  return found


def _timed(label: str, function: Callable, *arguments: Any) -> Any:
  started = time.time()
  result = function(*arguments)
  print(f'evaluated {label} in {time.time() - started:.1f} s', flush=True)
  return result


def _stages(config: RunConfig, workdir: pathlib.Path) -> list[dict]:
  rows = []
  for name in config.order:
    stage = config.stages[name]
    path = workdir / 'stages' / name / 'stage.json'
    done = json.loads(path.read_text(encoding='utf-8'))
    last = done['last_metrics']
    rows.append(
      {
        'name': name,
        'kind': stage.kind,
        'selector': stage.selector,
        'steps': stage.steps,
        'batch': [stage.data.batch_size, stage.data.seq_len],
        'k': config.stage_model(name).index_topk,
        'tokens': done['tokens'],
        'lm_loss': last.get('loss/lm'),
        'indexer_kl': last.get('loss/indexer_kl'),
        'step_s': last.get('time/step_s'),
      }
    )
  return rows


def _metrics(directory: pathlib.Path) -> list[dict]:
  text = (directory / 'metrics.jsonl').read_text(encoding='utf-8')
  return [json.loads(line) for line in text.splitlines()]


def _quality(reader: _Reader, part: _Trained) -> dict[str, Any]:
  """Selection quality on text rows and on recall rows of the stage's length."""
  seq_len = part.stage.data.seq_len
  batches: dict[str, Any] = {'text': reader.text(part.stage, seq_len)}
  if part.stage.data.recall.share > 0:
    vocab = part.model.cfg.vocab_size
    batches['recall'] = [
      rows.batch
      for parts in reader.recall(part.stage, vocab).values()
      for rows in parts[:2]
    ]
  result: dict[str, Any] = {}
  for name, rows in batches.items():
    means = observe.quality(
      part.model, part.variables, rows, seed=reader.config.seed
    ).means()
    ratios = [
      mine / best
      for mine, best in zip(
        means['mass/indexer'], means['mass/oracle'], strict=True
      )
    ]
    result[name] = {
      'by_layer': means,
      'k': part.model.cfg.index_topk,
      'seq_len': seq_len,
      'of_oracle_by_layer': ratios,
      'of_oracle_mean': sum(ratios) / len(ratios),
      'of_oracle_worst': min(ratios),
      'mass_mean': {
        selector: sum(means[f'mass/{selector}']) / len(ratios)
        for selector in selection_recall.SELECTORS
      },
    }
    mass = result[name]['mass_mean']
    result[name]['above_window'] = mass['indexer'] - mass['window']
  return result


def _losses(reader: _Reader, trained: Mapping[str, _Trained]) -> dict[str, Any]:
  """Held-out text loss of each way of training, attending as it trained."""
  seed = reader.config.seed
  result: dict[str, Any] = {'by_length': {}}
  for seq_len in reader.config.evaluation.seq_lens:
    row: dict[str, Any] = {}
    for how, part in trained.items():
      measured = perplexity.held_out_loss(
        part.model,
        part.variables,
        reader.text(part.stage, seq_len),
        AttentionMode(selector=part.stage.selector),
        seed=seed,
      )
      row[how] = dataclasses.asdict(measured)
    if 'dense' in row:
      dense = row['dense']['loss']
      for how in row:
        row[how]['relative_to_dense'] = row[how]['loss'] / dense - 1
    result['by_length'][str(seq_len)] = row
  return result


def _recall(reader: _Reader, trained: Mapping[str, _Trained]) -> dict[str, Any]:
  """Accuracy by distance: four selectors on the sparse model, and controls."""
  part = trained['sparse']
  batches = reader.recall(part.stage, part.model.cfg.vocab_size)
  first = next(iter(batches.values()))[0]
  seed = reader.config.seed

  def accuracy(part: _Trained, selector: Any) -> dict[str, float]:
    measured = recall_task.recall_accuracy(
      part.model,
      part.variables,
      batches,
      AttentionMode(selector=selector),
      seed=seed,
    )
    return {str(distance): value for distance, value in measured.items()}

  sparse_model = {'dense': accuracy(part, 'all')}
  for selector in SELECTOR_NAMES:
    sparse_model[selector] = accuracy(part, selector)
  return {
    'chance': first.chance,
    'k': part.model.cfg.index_topk,
    'answers_per_distance': {
      str(distance): sum(len(rows.answer) for rows in parts)
      for distance, parts in batches.items()
    },
    'sparse_model': sparse_model,
    'trained_with': {
      how: accuracy(control, control.stage.selector)
      for how, control in trained.items()
      if how != 'sparse'
    },
  }


def _cost(config: RunConfig) -> dict[str, Any]:
  """Pairs and FLOPs of the run's model by length."""
  name = config.order[-1]
  model = config.stage_model(name)
  lengths = sorted({config.stages[name].data.seq_len, *_COST_LENGTHS})
  return {
    'k': model.index_topk,
    'by_length': [
      dataclasses.asdict(flops.attention_cost(model, length))
      for length in lengths
    ],
  }
