import json
import os
import sysconfig

import pytest

from dsv32_jax.config.data import SourceConfig
from dsv32_jax.data import sources


def _write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text if isinstance(text, bytes) else text.encode())


def _text(path, **options):
  return SourceConfig(kind='text', path=str(path), **options)


def test_stdlib_documents_are_python_files_in_order_without_site_packages():
  documents = sources.load_documents(SourceConfig(max_bytes=400_000))
  assert documents.names == tuple(sorted(documents.names))
  root = sysconfig.get_paths()['stdlib']
  for name, text in zip(documents.names, documents.texts, strict=True):
    assert name.endswith('.py')
    assert 'site-packages' not in name
    with open(os.path.join(root, name), 'rb') as file:
      assert file.read() == text
  assert 100_000 < documents.num_bytes <= 400_000


def test_stdlib_splits_are_disjoint_and_complete():
  source = SourceConfig(max_bytes=3_000_000)
  train = sources.load_documents(source, split='train')
  held_out = sources.load_documents(source, split='held_out')
  both = sources.load_documents(source, split='all')
  assert not set(train.names) & set(held_out.names)
  assert sorted(train.names + held_out.names) == list(both.names)
  assert train.fingerprint != held_out.fingerprint


def test_held_out_names_share_and_side_depend_on_name_only():
  names = [f'package/module_{i}.py' for i in range(4000)]
  held_out = sources.held_out_names(names, 0.05)
  assert 150 < len(held_out) < 250
  fewer = sources.held_out_names(names[:2000], 0.05)
  assert fewer == held_out & set(names[:2000])


@pytest.mark.parametrize('fraction', [0.0001, 0.9999])
def test_held_out_names_few_documents_leave_one_on_each_side(fraction):
  held_out = sources.held_out_names(['a', 'b', 'c'], fraction)
  assert 1 <= len(held_out) <= 2
  assert not sources.held_out_names(['a', 'b', 'c'], 0.0)


def test_load_documents_twice_gives_equal_documents():
  source = SourceConfig(max_documents=20)
  first = sources.load_documents(source, split='all')
  assert sources.load_documents(source, split='all') == first
  assert len(first.names) <= 20
  assert len(first.names) >= 15  # Empty and non-UTF-8 files are left out.


def test_site_packages_named_package_gives_its_files_only():
  source = SourceConfig(kind='site_packages', packages=('pytest',))
  documents = sources.load_documents(source, split='all')
  assert documents.names
  assert all(name.startswith('pytest/') for name in documents.names)
  missing = SourceConfig(kind='site_packages', packages=('no_such_package',))
  with pytest.raises(ValueError, match="packages: got 'no_such_package'"):
    sources.load_documents(missing)


def test_text_directory_and_glob_give_relative_names(tmp_path):
  _write(tmp_path / 'a.txt', 'first')
  _write(tmp_path / 'deep' / 'b.txt', 'second')
  _write(tmp_path / 'deep' / 'c.md', 'third')
  every = sources.load_documents(_text(tmp_path), split='all')
  assert every.names == ('a.txt', 'deep/b.txt', 'deep/c.md')
  some = sources.load_documents(_text(tmp_path / '**' / '*.txt'), split='all')
  assert some.names == ('a.txt', 'deep/b.txt')
  assert some.texts == (b'first', b'second')


def test_text_separator_cuts_file_into_documents(tmp_path):
  _write(tmp_path / 'a.txt', 'one\n---\ntwo\n---\n\n---\nthree')
  source = _text(tmp_path / 'a.txt', separator='\n---\n')
  documents = sources.load_documents(source, split='all')
  assert documents.texts == (b'one', b'two', b'three')
  assert documents.names == ('a.txt:1', 'a.txt:2', 'a.txt:4')


def test_jsonl_field_is_read_line_by_line(tmp_path):
  lines = [json.dumps({'body': f'text {i}'}) for i in range(3)]
  _write(tmp_path / 'a.jsonl', lines[0] + '\n\n' + '\n'.join(lines[1:]) + '\n')
  source = SourceConfig(
    kind='jsonl', path=str(tmp_path / '*.jsonl'), field='body'
  )
  documents = sources.load_documents(source, split='all')
  assert documents.names == ('a.jsonl:1', 'a.jsonl:3', 'a.jsonl:4')
  assert documents.texts == (b'text 0', b'text 1', b'text 2')


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"text": ', 'a.jsonl:2: not JSON'),
    ('[1]', 'a.jsonl:2: a list, expected a JSON object'),
    ('{"body": "x"}', r"a.jsonl:2: has fields \['body'\], expected .*'text'"),
    ('{"text": 3}', "a.jsonl:2: .*string field 'text'"),
    ('{"text": "\\ud800"}', 'a.jsonl:2: .*half a surrogate pair'),
  ],
)
def test_jsonl_bad_line_is_refused_with_file_and_line(tmp_path, line, message):
  _write(tmp_path / 'a.jsonl', '{"text": "fine"}\n' + line + '\n')
  source = SourceConfig(kind='jsonl', path=str(tmp_path / 'a.jsonl'))
  with pytest.raises(ValueError, match=message) as error:
    sources.load_documents(source)
  assert '\n' not in str(error.value)


def test_missing_empty_and_unreadable_corpora_are_refused_by_path(tmp_path):
  def refusal(source):
    with pytest.raises(ValueError, match=r'expected|usable') as error:
      sources.load_documents(source, split='all')
    message = str(error.value)
    assert str(tmp_path) in message
    assert 'expected' in message
    assert '\n' not in message
    return message

  assert 'does not exist' in refusal(_text(tmp_path / 'missing.txt'))
  assert 'matches no file' in refusal(_text(tmp_path / '*.txt'))
  assert 'matches no file' in refusal(_text(tmp_path))
  _write(tmp_path / 'latin.txt', 'caf\u00e9'.encode('latin-1'))
  assert 'latin.txt: byte 3 is not UTF-8' in refusal(_text(tmp_path))
  _write(tmp_path / 'latin.txt', b'')
  assert 'is empty' in refusal(_text(tmp_path))
  _write(tmp_path / 'empty.jsonl', b'\n')
  empty = SourceConfig(kind='jsonl', path=str(tmp_path / 'empty.jsonl'))
  assert 'holds no document' in refusal(empty)


def test_file_that_cannot_be_opened_is_refused_by_path(tmp_path, monkeypatch):
  _write(tmp_path / 'a.txt', 'text')

  def refuse(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr('builtins.open', refuse)
  with pytest.raises(ValueError, match=r'a.txt: cannot be read \(Permission'):
    sources.load_documents(_text(tmp_path / 'a.txt'), split='all')


def test_single_document_has_no_held_out_split(tmp_path):
  _write(tmp_path / 'a.txt', 'text')
  source = _text(tmp_path / 'a.txt')
  with pytest.raises(ValueError, match=r'held_out split is empty.*separator'):
    sources.load_documents(source, split='held_out')


def test_arithmetic_and_copy_documents_are_correct():
  source = SourceConfig(kind='arithmetic', max_documents=5)
  documents = sources.load_documents(source, split='all')
  assert len(documents.names) == 5
  for text in documents.texts:
    for line in text.decode().splitlines():
      left, right = line.split('=')
      assert eval(left) == int(right)
  source = SourceConfig(kind='copy', max_documents=5)
  for text in sources.load_documents(source, split='all').texts:
    for line in text.decode().splitlines():
      first, second = line.split('|')
      assert first == second
      assert first
