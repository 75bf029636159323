import pytest

from dsv32_jax.config import convert
from dsv32_jax.config.data import (
  DataConfig,
  LengthBucket,
  RecallConfig,
  SourceConfig,
  TokenizerConfig,
)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: DataConfig(seq_len=0), 'seq_len: got 0'),
    (lambda: DataConfig(batch_size=0), 'batch_size: got 0'),
    (lambda: DataConfig(sources=()), 'sources: got none'),
    (lambda: DataConfig(held_out_fraction=1.0), 'held_out_fraction: got 1.0'),
    (lambda: SourceConfig(kind='text'), "path: got '' for kind 'text'"),
    (lambda: SourceConfig(path='x.txt'), "path: got 'x.txt' for kind 'stdlib'"),
    (lambda: SourceConfig(separator='x'), "separator: got 'x'"),
    (lambda: SourceConfig(packages=('x',)), 'packages: got'),
    (lambda: SourceConfig(weight=0.0), 'weight: got 0.0'),
    (lambda: SourceConfig(max_bytes=-1), 'max_bytes: got -1'),
    (lambda: TokenizerConfig(kind='hf'), "path: got '' for kind 'hf'"),
    (lambda: TokenizerConfig(vocab_size=300), 'vocab_size: got 300'),
    (lambda: RecallConfig(share=1.5), 'share: got 1.5'),
    (lambda: RecallConfig(min_gap=0), 'min_gap: got 0'),
    (lambda: RecallConfig(max_gap=8), 'max_gap: got 8'),
    (lambda: RecallConfig(num_keys=17), 'num_keys: got 17'),
    (lambda: RecallConfig(num_values=1), 'num_values: got 1'),
    (lambda: LengthBucket(min_fraction=-1.0, share=1.0), 'min_fraction: got'),
    (lambda: LengthBucket(min_fraction=0.0, share=0.0), 'share: got 0.0'),
  ],
)
def test_data_config_impossible_value_is_refused_by_name(build, message):
  with pytest.raises(ValueError, match=message) as error:
    build()
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('config', 'name', 'value', 'message'),
  [
    (DataConfig(), 'seq_len', '256', "seq_len: got '256', expected int"),
    (DataConfig(), 'sources', ('stdlib',), "sources: got 'stdlib'"),
    (DataConfig(), 'length_mix', (1,), 'length_mix: got 1, expected Length'),
    (SourceConfig(), 'kind', 'web', "kind: got 'web', expected one of"),
    (RecallConfig(), 'share', None, 'share: got None, expected float'),
  ],
)
def test_data_config_wrong_type_is_refused_by_name(
  config, name, value, message
):
  # The tests' own type checker stands before the constructor.
  object.__setattr__(config, name, value)
  with pytest.raises(ValueError, match=message):
    config.__post_init__()


def test_data_config_length_mix_out_of_order_is_refused():
  mix = (
    LengthBucket(min_fraction=1.0, share=0.5),
    LengthBucket(min_fraction=0.0, share=0.5),
  )
  with pytest.raises(ValueError, match='length_mix: got min_fraction'):
    DataConfig(length_mix=mix)


def test_data_config_recall_too_large_for_row_is_refused_with_its_need():
  recall = RecallConfig(share=0.5, min_gap=32, num_keys=16)
  DataConfig(seq_len=63, recall=recall)
  with pytest.raises(ValueError, match='seq_len: got 62, expected at least 63'):
    DataConfig(seq_len=62, recall=recall)
  # A share of 0 asks for no row.
  DataConfig(seq_len=8, recall=RecallConfig(num_keys=16))


def test_data_config_nested_dict_round_trip_gives_equal_config():
  config = DataConfig(
    sources=(SourceConfig(), SourceConfig(kind='copy', weight=0.5)),
    length_mix=(LengthBucket(min_fraction=0.0, share=1.0),),
    recall=RecallConfig(share=0.25, max_gap=100),
  )
  assert convert.from_dict(DataConfig, convert.to_dict(config)) == config
