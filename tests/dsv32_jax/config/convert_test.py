import dataclasses
import json

import pytest

from dsv32_jax.config import convert, presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.model import ModelConfig, RopeScaling
from dsv32_jax.config.training import RunConfig, StageConfig

pytestmark = pytest.mark.usefixtures('without_type_hook')


def _run():
  stages = {
    'pretrain': StageConfig(kind='pretrain', steps=3, data=DataConfig()),
    'extension': StageConfig(
      kind='context_extension',
      steps=2,
      data=DataConfig(),
      init_from='pretrain',
      rope_scaling=RopeScaling(factor=4.0),
    ),
  }
  return RunConfig(
    model=presets.small(), stages=stages, order=('pretrain', 'extension')
  )


def test_convert_round_trip_through_json_is_the_same_run():
  text = json.dumps(convert.to_dict(_run()))
  assert convert.from_dict(RunConfig, json.loads(text)) == _run()


def test_convert_to_dict_is_plain_and_independent():
  values = convert.to_dict(_run())
  assert values['model']['rope_scaling']['factor'] == 40.0
  values['model']['rope_scaling']['factor'] = 1.0
  assert _run().model.rope_scaling.factor == 40.0


def test_convert_missing_fields_take_their_defaults():
  values = convert.to_dict(presets.tiny())
  del values['rms_norm_eps'], values['precision']
  assert convert.from_dict(ModelConfig, values) == presets.tiny()


def test_convert_keeps_dataclasses_that_are_built_already():
  values = convert.to_dict(presets.tiny()) | {'rope_scaling': RopeScaling()}
  expected = dataclasses.replace(presets.tiny(), rope_scaling=RopeScaling())
  assert convert.from_dict(ModelConfig, values) == expected


def _changed(path, value):
  """The run's dict with one value replaced, or removed if it is `del`."""
  values = json.loads(json.dumps(convert.to_dict(_run())))
  *parents, last = path.split('.')
  node = values
  for name in parents:
    node = node[name]
  if value is del_:
    del node[last]
  else:
    node[last] = value
  return values


del_ = object()


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    (
      'model.hidden_dim',
      3,
      r'model\.hidden_dim: .*unknown field.*hidden_size',
    ),
    (
      'stages.extension.optimizer.lr',
      3,
      r'stages\.extension\.optimizer\.lr: .*peak_learning_rate',
    ),
    ('model.hidden_size', del_, r'model\.hidden_size: missing; expected'),
    (
      'model.hidden_size',
      '64',
      r"model: ModelConfig\.hidden_size: got '64', expected int",
    ),
    (
      'model.index_topk',
      0,
      r'model: index_topk: got 0, expected at least 1',
    ),
    (
      'stages.extension.rope_scaling.factor',
      0.5,
      r'stages\.extension\.rope_scaling: .*factor: got 0\.5, expected',
    ),
    (
      'stages.extension',
      5,
      r'stages\.extension: got 5, expected the fields of StageConfig',
    ),
    ('order', 'pretrain', r"order: got 'pretrain', expected"),
    (
      'evaluation.seq_lens',
      256,
      r'evaluation: EvaluationConfig\.seq_lens: got 256, expected tuple',
    ),
  ],
)
def test_convert_bad_values_are_named_by_their_path(path, value, message):
  with pytest.raises(ValueError, match=message):
    convert.from_dict(RunConfig, _changed(path, value))
