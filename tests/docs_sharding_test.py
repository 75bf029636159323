"""Runs every command of docs/sharding.md, on virtual devices."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def commands() -> list[tuple[dict[str, str], list[str]]]:
  """Environment and words of each command, in the order of the page."""
  text = (ROOT / 'docs' / 'sharding.md').read_text(encoding='utf-8')
  found = []
  for body in re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S):
    for line in body.replace('\\\n', ' ').splitlines():
      words = shlex.split(line, comments=True)
      environment = {}
      while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
        name, _, value = words.pop(0).partition('=')
        environment[name] = value
      if words:
        found.append((environment, words))
  return found


def test_commands_of_the_page_are_found():
  names = [words[1] for _, words in commands()]
  assert names.count('experiments/continued_training.py') >= 2
  assert 'experiments/evaluate.py' in names


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.multidevice
@pytest.mark.timeout(3600)
def test_commands_of_the_page_run_one_after_the_other(tmp_path):
  (tmp_path / 'experiments').symlink_to(ROOT / 'experiments')
  for environment, words in commands():
    assert words[0] == 'python', words
    done = subprocess.run(
      [sys.executable, *words[1:]],
      cwd=tmp_path,
      env=os.environ
      | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
      | environment,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, f'{shlex.join(words)}\n{done.stderr}'
