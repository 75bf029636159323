"""What the README and the docs tell a reader to type exists."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import pytest

from tests import setup_test

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted(
  str(path.relative_to(ROOT))
  for path in (
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/**/*.md'),
    *ROOT.glob('pallas_kernels/**/*.md'),
    *ROOT.glob('experiments/**/*.md'),
  )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """A fenced block of a page: its language and its text."""

  language: str
  text: str


def read_page(name: str) -> str:
  return (ROOT / name).read_text(encoding='utf-8')


def blocks(text: str) -> list[Block]:
  found = re.findall(r'^```(\w*)[^\n]*\n(.*?)^```', text, re.M | re.S)
  return [Block(language=language, text=body) for language, body in found]


def commands(text: str) -> list[list[str]]:
  """The words of each shell command in a page, continuations joined."""
  found = []
  for block in blocks(text):
    if block.language not in ('bash', 'sh', 'shell', 'console', ''):
      continue
    for line in block.text.replace('\\\n', ' ').splitlines():
      line = line.strip().removeprefix('$ ')
      try:
        words = shlex.split(line, comments=True)
      except ValueError:  # Output or a diagram, not a command.
        continue
      while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
        words = words[1:]
      if words:
        found.append(words)
  return found


def make_targets() -> set[str]:
  return set(re.findall(r'^([a-z-]+):', read_page('Makefile'), re.M))


def make_variables() -> set[str]:
  return set(re.findall(r'^([A-Z]+) \?=', read_page('Makefile'), re.M))


def problems(words: list[str]) -> list[str]:
  """What a command names that is not there."""
  if words[0] == 'make':
    return make_problems(words[1:])
  if words[0] == 'pip' and words[1] == 'install':
    return extras_problems(words)
  if re.fullmatch(r'(.*/)?python[0-9.]*', words[0]):
    return python_problems(words[1:])
  return []


def make_problems(words: list[str]) -> list[str]:
  found = []
  for word in words:
    name, is_variable, _ = word.partition('=')
    if is_variable and name not in make_variables():
      found.append(f'the Makefile has no variable {name}')
    if not is_variable and name not in make_targets():
      found.append(f'the Makefile has no target {name}')
  return found


def extras_problems(words: list[str]) -> list[str]:
  _, known = setup_test.setup_values()
  named = re.findall(r'\.\[([\w,]+)\]', ' '.join(words))
  extras = [extra for group in named for extra in group.split(',')]
  return [f'setup.py has no extra {e}' for e in extras if e not in known]


def python_problems(words: list[str]) -> list[str]:
  if words[:3] == ['-m', 'pip', 'install']:
    return extras_problems(words)
  if not words or not words[0].endswith('.py'):
    return []
  if not (ROOT / words[0]).is_file():
    return [f'there is no {words[0]}']
  for word in words[1:]:
    if match := re.fullmatch(r'--config=([^:]+)(?::(.+))?', word):
      return config_problems(match[1], match[2], words)
  return []


def config_problems(
  path: str, preset: str | None, words: list[str]
) -> list[str]:
  """Checks the config file, its preset, and the fields that are overridden."""
  if not (ROOT / path).is_file():
    return [f'there is no {path}']
  spec = importlib.util.spec_from_file_location('config_of_a_page', ROOT / path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    config = module.get_config(*([preset] if preset else []))
  except (KeyError, TypeError, ValueError) as error:
    return [f'{path}:{preset}: {error}']
  found = []
  for word in words:
    if match := re.match(r'--config\.([\w.]+)', word):
      value = config
      for field in match[1].split('.'):
        if not hasattr(value, field):
          found.append(f'{path}:{preset} has no field {match[1]}')
          break
        value = getattr(value, field)
  return found


def anchors(text: str) -> set[str]:
  """The fragment names that a Markdown page's headings get."""
  headings = re.findall(r'^#+ +(.+)$', text, re.M)
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    for heading in headings
  }


def broken_links(name: str) -> list[str]:
  text = re.sub(r'^```.*?^```', '', read_page(name), flags=re.M | re.S)
  found = []
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if re.match(r'[a-z]+:', link):
      continue
    path, _, fragment = link.partition('#')
    target = (ROOT / name).parent / path if path else ROOT / name
    if not target.exists():
      found.append(link)
    elif fragment and target.suffix == '.md':
      if fragment not in anchors(target.read_text(encoding='utf-8')):
        found.append(link)
  return found


@pytest.mark.parametrize('name', PAGES)
def test_page_commands_name_what_exists(name):
  found = [
    f'{shlex.join(words)}: {problem}'
    for words in commands(read_page(name))
    for problem in problems(words)
  ]
  assert found == []


@pytest.mark.parametrize('name', PAGES)
def test_page_links_lead_somewhere(name):
  assert broken_links(name) == []


def test_readme_gives_its_two_commands():
  given = commands(read_page('README.md'))
  assert ['make', 'reproduce'] in given
  assert ['make', 'test'] in given


@pytest.mark.slow
def test_readme_python_runs():
  # One after the other in one namespace, as a reader would type them.
  python = [b for b in blocks(read_page('README.md')) if b.language == 'python']
  assert python
  namespace = {'__name__': 'readme'}
  for block in python:
    exec(compile(block.text, 'README.md', 'exec'), namespace)


@pytest.mark.parametrize(
  ('command', 'problem'),
  [
    ('make reproduce WORKDIR=runs/x', None),
    ('make reproduced', 'no target reproduced'),
    ('make test WORK=1', 'no variable WORK'),
    ("pip install -e '.[test,tokenizers]'", None),
    ("python3.12 -m pip install -e '.[tests]'", 'no extra tests'),
    ('python experiments/nothing.py', 'there is no experiments/nothing.py'),
    ('python tools/environment.py --config=nothing.py:x', 'no nothing.py'),
    ('git clone somewhere', None),
  ],
)
def test_check_of_commands_sees_what_is_missing(command, problem):
  (words,) = commands(f'```bash\n{command}\n```\n')
  found = problems(words)
  assert len(found) == (problem is not None)
  assert all(problem in text for text in found)


def test_check_of_configs_sees_unknown_presets_and_fields(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(
    'import types\n'
    'def get_config(preset):\n'
    '  if preset != "tiny":\n'
    '    raise ValueError(f"unknown preset {preset}")\n'
    '  return types.SimpleNamespace(model=types.SimpleNamespace(layers=1))\n'
  )
  name = str(path)
  assert config_problems(name, 'tiny', ['--config.model.layers=2']) == []
  assert 'unknown preset' in config_problems(name, 'large', [])[0]
  found = config_problems(name, 'tiny', ['--config.model.depth=2'])
  assert found == [f'{name}:tiny has no field model.depth']
