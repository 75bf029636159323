"""Seals finished checkpoints, and says what is wrong with a damaged one.

Orbax commits a checkpoint by renaming its directory, so a save that was cut
short is never mistaken for a whole one. It does not promise to notice a
truncated or altered file later. So a manifest with the size and SHA-256 of
every file is written once the commit is done: a checkpoint with a manifest is
sealed, one without was interrupted before its end.
"""

import hashlib
import json
import os
import pathlib

MANIFEST = 'manifest.json'


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file that is either absent, old or whole after a crash."""
  temporary = path.with_name(f'{path.name}.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def seal(directory: pathlib.Path) -> None:
  """Writes the manifest of a directory whose files are final."""
  files = {
    path.relative_to(directory).as_posix(): {
      'size': path.stat().st_size,
      'sha256': _digest(path),
    }
    for path in sorted(directory.rglob('*'))
    if path.is_file() and not path.name.startswith(MANIFEST)
  }
  write_atomically(directory / MANIFEST, json.dumps({'files': files}, indent=1))


def is_sealed(directory: pathlib.Path) -> bool:
  """Whether the save of this directory came to its end."""
  return (directory / MANIFEST).is_file()


def damage(directory: pathlib.Path) -> str | None:
  """What differs between a sealed directory and its manifest.

  Reads every file; files that the manifest does not name are not looked at.

  Returns:
    A phrase that names the first bad file, or None if all is as it was.
  """
  try:
    files = json.loads((directory / MANIFEST).read_text(encoding='utf-8'))
    entries = [
      (name, int(entry['size']), str(entry['sha256']))
      for name, entry in files['files'].items()
    ]
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return f'{MANIFEST} is not readable'
  if not entries:
    return f'{MANIFEST} names no files'
  for name, size, digest in entries:
    path = directory / name
    try:
      found = path.stat().st_size
      if found != size:
        return f'{name} has {found} bytes, expected {size}'
      if _digest(path) != digest:
        return f'{name} has other contents than were written (SHA-256 differs)'
    except OSError as error:
      return f'{name} cannot be read ({error.strerror})'
  return None


def _digest(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
