"""Where models come from, and what is refused before anything is served."""

import pathlib

import jax
import pytest

from dsv32_jax import checkpoints, inference, serving
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.serving.server import address, bind
from tests.support import tiny_configs

CFG = tiny_configs.config(
  vocab_size=ByteTokenizer.vocab_size, scan_layers=False
)
FIXTURE = str(pathlib.Path(__file__).parents[2] / 'fixtures' / 'hf_tiny_v32')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({}, 'expected one of them'),
    ({'preset': 'tiny', 'checkpoint': 'x'}, 'expected one of them'),
    ({'preset': 'huge'}, "preset: got 'huge'"),
    ({'checkpoint': FIXTURE, 'tokenizer': 'nowhere'}, 'nowhere'),
    ({'checkpoint': FIXTURE}, 'tokenizer.json'),
    ({'preset': 'tiny', 'weights': 'fp8'}, "weights: got 'fp8' for tiny"),
  ],
)
def test_load_without_a_whole_model_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    serving.load(**options)


@pytest.fixture(scope='module')
def float8(tmp_path_factory):
  """A Hugging Face directory with float8 matrices and a tokenizer."""
  path = tmp_path_factory.mktemp('float8') / 'checkpoint'
  variables = tiny_configs.variables(CFG)
  checkpoints.save_hf(DeepSeekV32(CFG), variables, path, quantize='fp8')
  ByteTokenizer().save(str(path))
  return str(path)


def test_load_of_a_hugging_face_directory_keeps_float8_if_asked(float8):
  for weights, sizes in (('compute', {4}), ('fp8', {1, 4})):
    loaded = serving.load(checkpoint=float8, weights=weights)
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert loaded.model.cfg.vocab_size == CFG.vocab_size
    leaves = jax.tree.leaves(loaded.variables)
    assert {leaf.dtype.itemsize for leaf in leaves} == sizes


@pytest.mark.slow
@pytest.mark.exhaustive
def test_warm_up_runs_a_short_and_a_longer_prompt_of_a_float8_model(float8):
  loaded = serving.load(checkpoint=float8, weights='fp8')
  engine = inference.Engine(
    loaded.model,
    loaded.variables,
    inference.EngineConfig(
      max_batch=1, max_tokens=32, prefill_chunk=16, decode_steps=1
    ),
    tokenizer=loaded.tokenizer,
  )
  serving.warm_up(engine)
  # A prompt of one token, and one as long as a piece of a prompt may be.
  stats = engine.stats()
  assert stats.prompt_tokens == 1 + 16
  assert stats.finished == {'length': 2}
  assert stats.free_pages == stats.total_pages


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'model': ''}, 'model: got'),
    ({'api_key': ''}, 'api_key: expected'),
    ({'api_key': 'schlüssel'}, 'api_key: expected'),
    ({'max_body_bytes': 0}, 'max_body_bytes: got 0'),
    ({'default_max_tokens': 0}, 'default_max_tokens: got 0'),
    ({'shutdown_seconds': -1}, 'shutdown_seconds: got -1'),
  ],
)
def test_settings_that_cannot_be_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    serving.Settings(**{'model': 'm'} | options)


def test_bind_takes_any_free_port_and_no_other_ones():
  with bind('127.0.0.1', 0) as listener:
    listener.listen()
    assert address(listener).startswith('http://127.0.0.1:')
    port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=f'port: got 127.0.0.1:{port}'):
      bind('127.0.0.1', port)
  for wrong in (70_000, -1):
    with pytest.raises(ValueError, match=f'port: got 127.0.0.1:{wrong}'):
      bind('127.0.0.1', wrong)
