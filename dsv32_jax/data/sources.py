"""Corpora: where documents come from, and which of them are held out.

A document is a name and UTF-8 bytes. Everything is ordered by name and nothing
depends on the clock or on the order in which a directory happens to be listed,
so that the same files give the same documents on every machine.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable
from typing import Literal

from dsv32_jax.config.data import SourceConfig
from dsv32_jax.data import synthetic_documents

Split = Literal['train', 'held_out', 'all']

_SKIPPED_DIRS = frozenset(('site-packages', 'dist-packages', '__pycache__'))
# Written when Python is built or by the administrator: they name this machine.
_SKIPPED_PREFIXES = ('_sysconfigdata', 'sitecustomize', 'usercustomize')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
  """Documents of one split of one source, ordered by name.

  Attributes:
    names: relative paths (with ':line' or ':number' for parts of a file).
    texts: UTF-8 bytes, one for each name; never empty.
    label: the source in words, for messages.
  """

  names: tuple[str, ...]
  texts: tuple[bytes, ...]
  label: str

  @property
  def num_bytes(self) -> int:
    return sum(len(text) for text in self.texts)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of all names and texts."""
    digest = hashlib.blake2b(digest_size=16)
    for name, text in zip(self.names, self.texts, strict=True):
      digest.update(f'{name}\0{len(text)}\0'.encode())
      digest.update(text)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _File:
  name: str
  path: str


def load_documents(
  source: SourceConfig,
  *,
  split: Split = 'train',
  held_out_fraction: float = 0.05,
) -> Documents:
  """Reads one split of a source.

  Args:
    source: which corpus.
    split: 'train' or 'held_out' (disjoint by name, together 'all').
    held_out_fraction: share of the names that are held out.

  Returns:
    The documents of the split; empty ones are left out.

  Raises:
    ValueError: in one line naming the path and what was expected there, for a
      source that does not exist, cannot be read or holds no document, for text
      that is not UTF-8, for a bad JSONL line, or when the split is empty.
  """
  label = label_of(source)
  paths: dict[str, str] = {}
  parts: dict[str, bytes] = {}
  if source.kind in ('copy', 'arithmetic'):
    parts = _limit_parts(
      synthetic_documents.generate(
        source.kind, num_documents=source.max_documents or 1000
      ),
      source,
    )
  elif source.kind == 'jsonl' or source.separator:
    parts = _limit_parts(
      (part for file in _list_files(source) for part in _cut(file, source)),
      source,
    )
  else:
    files = _limit_files(_list_files(source), source)
    paths = {file.name: file.path for file in files}
  names = [*paths, *parts]
  if not names:
    raise ValueError(f'{label}: holds no document, expected at least one')
  held_out = held_out_names(names, held_out_fraction)
  wanted = [
    name
    for name in names
    if split == 'all' or (name in held_out) == (split == 'held_out')
  ]
  # Only the files of this split are read.
  skip = source.kind in ('stdlib', 'site_packages')
  texts = [
    (name, text)
    for name in wanted
    if (text := parts.get(name) or _read(paths[name], skip_invalid=skip))
  ]
  if not texts:
    raise ValueError(
      f'{label}: the {split} split is empty ({len(names)} documents, '
      f'held_out_fraction {held_out_fraction}), expected more documents with '
      "text in them (kind 'text': `separator` cuts files into documents)"
    )
  texts.sort()
  return Documents(
    names=tuple(name for name, _ in texts),
    texts=tuple(text for _, text in texts),
    label=label,
  )


def held_out_names(names: Iterable[str], fraction: float) -> frozenset[str]:
  """Chooses the held-out documents by a hash of their names.

  A name's side does not depend on the other names, except that of two names or
  more both sides get at least one (when the fraction is above 0).

  Args:
    names: of all documents.
    fraction: expected share that is held out.
  """
  rank = {name: _unit_hash('split', name) for name in names}
  chosen = {name for name, value in rank.items() if value < fraction}
  if fraction > 0 and len(rank) >= 2:
    if not chosen:
      chosen = {min(rank, key=rank.__getitem__)}
    elif len(chosen) == len(rank):
      chosen -= {max(rank, key=rank.__getitem__)}
  return frozenset(chosen)


def _unit_hash(purpose: str, name: str) -> float:
  digest = hashlib.sha256(f'{purpose}:{name}'.encode()).digest()
  return int.from_bytes(digest[:8], 'big') / 2**64


def jsonl_lines(source: SourceConfig) -> list[tuple[str, bytes]]:
  """The lines of a JSONL source with their names (file:line), none empty.

  Args:
    source: its `path`, `max_documents` and `max_bytes` count.

  Raises:
    ValueError: as `load_documents`, but lines are not looked into.
  """
  lines = (
    (f'{file.name}:{number}', line)
    for file in sorted(_given_files(source), key=lambda file: file.name)
    for number, line in enumerate(
      _read(file.path, skip_invalid=False).split(b'\n'), start=1
    )
    if line.strip()
  )
  return list(_limit_parts(lines, source).items())


def label_of(source: SourceConfig) -> str:
  """A source in words, for messages."""
  return f'source {source.kind} {source.path}'.rstrip()


def _list_files(source: SourceConfig) -> list[_File]:
  """Files of a source, ordered by name."""
  if source.kind == 'stdlib':
    files = _python_files(sysconfig.get_paths()['stdlib'])
  elif source.kind == 'site_packages':
    roots = {sysconfig.get_paths()[key] for key in ('purelib', 'platlib')}
    files = [file for root in sorted(roots) for file in _python_files(root)]
    files = list({file.name: file for file in files}.values())
    if source.packages:
      tops = {os.path.splitext(f.name.split('/')[0])[0] for f in files}
      missing = sorted(set(source.packages) - tops)
      if missing:
        raise ValueError(
          f'packages: got {missing[0]!r}, expected an installed package (under '
          f'{", ".join(sorted(roots))})'
        )
      files = [
        file
        for file in files
        if os.path.splitext(file.name.split('/')[0])[0] in source.packages
      ]
  else:
    files = _given_files(source)
  return sorted(files, key=lambda file: file.name)


def _python_files(root: str) -> list[_File]:
  """The *.py files below `root`; another installation's inside are skipped."""
  files = []
  for directory, subdirs, filenames in os.walk(root):
    subdirs[:] = sorted(set(subdirs) - _SKIPPED_DIRS)
    for filename in filenames:
      if filename.endswith('.py') and not filename.startswith(
        _SKIPPED_PREFIXES
      ):
        path = os.path.join(directory, filename)
        files.append(_File(_relative(path, root), path))
  if not files:
    raise ValueError(
      f'{root}: holds no Python source, expected unpacked .py files (use a '
      "source of kind 'text' instead)"
    )
  return files


def _given_files(source: SourceConfig) -> list[_File]:
  """Files of a path that the user gave: a file, a directory or a glob."""
  path = os.path.expanduser(source.path)
  if os.path.isfile(path):
    return [_File(os.path.basename(path), path)]
  if os.path.isdir(path):
    pattern = '*' if source.kind == 'text' else '*.jsonl'
    found = glob.glob(
      os.path.join(glob.escape(path), '**', pattern), recursive=True
    )
    root = path
  elif glob.has_magic(path):
    found = glob.glob(path, recursive=True)
    root = path
    while glob.has_magic(root):
      root = os.path.dirname(root)
  else:
    raise ValueError(
      f'{label_of(source)}: does not exist, expected a file, a directory or a '
      'glob pattern'
    )
  files = [_File(_relative(p, root or '.'), p) for p in found]
  files = [file for file in files if os.path.isfile(file.path)]
  if not files:
    raise ValueError(
      f'{label_of(source)}: matches no file, expected at least one'
    )
  return files


def _relative(path: str, root: str) -> str:
  return os.path.relpath(path, root).replace(os.sep, '/')


def _limit_files(files: list[_File], source: SourceConfig) -> list[_File]:
  """Applies `max_documents` and `max_bytes`, judging files by their size."""
  if not source.max_documents and not source.max_bytes:
    return files
  files = sorted(files, key=lambda file: _unit_hash('order', file.name))
  chosen: list[_File] = []
  total = 0
  for file in files:
    if source.max_documents and len(chosen) >= source.max_documents:
      break
    size = os.path.getsize(file.path)
    if source.max_bytes and chosen and total + size > source.max_bytes:
      continue
    if size:
      chosen.append(file)
      total += size
  return chosen


def _limit_parts(
  parts: Iterable[tuple[str, bytes]], source: SourceConfig
) -> dict[str, bytes]:
  """Applies `max_documents` and `max_bytes` in the order of the parts."""
  chosen: dict[str, bytes] = {}
  total = 0
  for name, text in parts:
    if source.max_documents and len(chosen) >= source.max_documents:
      break
    if source.max_bytes and chosen and total + len(text) > source.max_bytes:
      break
    chosen[name] = text
    total += len(text)
  return chosen


def _read(path: str, *, skip_invalid: bool) -> bytes:
  """Bytes of a UTF-8 file; b'' for another encoding if that is to be skipped.

  The standard library's tests hold files in other encodings on purpose, while
  in a corpus that somebody chose one is a mistake.
  """
  try:
    with open(path, 'rb') as file:
      data = file.read()
    data.decode('utf-8')
  except OSError as error:
    raise ValueError(
      f'{path}: cannot be read ({error.strerror}), expected a readable file'
    ) from None
  except UnicodeDecodeError as error:
    if skip_invalid:
      return b''
    raise ValueError(
      f'{path}: byte {error.start} is not UTF-8, expected UTF-8 text (a glob '
      'pattern chooses among files)'
    ) from None
  return data


def _cut(file: _File, source: SourceConfig) -> list[tuple[str, bytes]]:
  """Named documents of a file that holds several."""
  data = _read(file.path, skip_invalid=False)
  if source.kind == 'text':
    pieces = enumerate(data.split(source.separator.encode()), start=1)
    return [(f'{file.name}:{i}', p) for i, p in pieces if p.strip()]
  parts = []
  for number, line in enumerate(data.split(b'\n'), start=1):
    if not line.strip():
      continue
    where = f'{file.path}:{number}'
    expected = f'expected a JSON object with a string field {source.field!r}'
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f'{where}: not JSON ({error}), {expected}') from None
    if not isinstance(record, dict):
      raise ValueError(f'{where}: a {type(record).__name__}, {expected}')
    if not isinstance(record.get(source.field), str):
      raise ValueError(f'{where}: has fields {sorted(record)}, {expected}')
    text = record[source.field].encode('utf-8', errors='surrogatepass')
    try:
      text.decode('utf-8')
    except UnicodeDecodeError:
      raise ValueError(
        f'{where}: field {source.field!r} holds half a surrogate pair, '
        'expected Unicode text'
      ) from None
    if text:
      parts.append((f'{file.name}:{number}', text))
  return parts
