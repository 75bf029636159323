"""Where results that are slow to make are kept, and how they are written."""

import os
import tempfile


def default_cache_dir() -> str:
  """dsv32_jax in the user's cache directory."""
  root = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return os.path.join(root, 'dsv32_jax')


def write_atomically(path: str, text: str) -> None:
  """Writes a file so that a reader sees all of it or nothing."""
  directory = os.path.dirname(path)
  os.makedirs(directory, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=directory, prefix='.tmp-')
  try:
    with os.fdopen(handle, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise
