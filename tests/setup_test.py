"""setup.py, the constraints and the tool settings agree with one another."""

import ast
import itertools
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONSTRAINTS = ('py311.txt', 'py312.txt')
# The build of these depends on the machine (docs/dependencies.md).
UNPINNED = {'torch'}


def setup_values() -> tuple[list[str], dict[str, list[str]]]:
  """install_requires and extras_require, read without running setup.py."""
  tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
  extras = requires = None
  for node in ast.walk(tree):
    if isinstance(node, ast.Assign) and ast.unparse(node.targets) == '_EXTRAS':
      extras = ast.literal_eval(node.value)
    if isinstance(node, ast.keyword) and node.arg == 'install_requires':
      requires = ast.literal_eval(node.value)
  return requires, extras


def read_pins(name: str) -> dict[str, str]:
  text = (ROOT / 'constraints' / name).read_text(encoding='utf-8')
  lines = [line for line in text.splitlines() if not line.startswith('#')]
  return dict(line.split('==') for line in lines)


@pytest.mark.parametrize('name', CONSTRAINTS)
def test_constraints_pin_what_setup_asks_for(name):
  requires, extras = setup_values()
  pins = read_pins(name)
  for text in itertools.chain(requires, *extras.values()):
    requirement = Requirement(text)
    package = canonicalize_name(requirement.name)
    if package not in UNPINNED:
      assert package in pins, f'{package} is not pinned'
      assert requirement.specifier.contains(pins[package]), (
        f'{text}, but {name} has {pins[package]}'
      )


@pytest.mark.parametrize('name', CONSTRAINTS)
def test_constraints_name_versions_only(name):
  for package, version in read_pins(name).items():
    assert canonicalize_name(package) == package
    assert re.fullmatch(r'[0-9]+(\.[0-9a-z]+)*', version), (package, version)


@pytest.mark.parametrize(
  ('name', 'jax', 'flax'),
  [('py311.txt', '0.10.2', '0.12.8'), ('py312.txt', '0.11.2', '0.12.12')],
)
def test_constraints_have_the_supported_jax_and_flax(name, jax, flax):
  pins = read_pins(name)
  assert (pins['jax'], pins['jaxlib'], pins['flax']) == (jax, jax, flax)


def test_cuda_and_triton_come_with_the_cuda_extras_only():
  requires, extras = setup_values()
  for name, requirements in {'': requires, **extras}.items():
    found = re.findall('cuda|triton|nvidia', ' '.join(requirements))
    assert bool(found) == name.startswith('cuda'), (name, requirements)


def test_extras_are_the_documented_ones():
  _, extras = setup_values()
  text = (ROOT / 'docs' / 'dependencies.md').read_text(encoding='utf-8')
  section = text.split('## Extras')[1].split('\n## ')[0]
  documented = re.findall(r'^\| `(\w+)` \|', section, re.MULTILINE)
  assert sorted(documented) == sorted(extras)


def test_every_folder_with_code_is_found_by_setup():
  # find_packages passes over a folder without __init__.py in silence.
  for package in ('dsv32_jax', 'pallas_kernels'):
    for path in (ROOT / package).rglob('*.py'):
      assert (path.parent / '__init__.py').exists(), path.parent


def test_pyproject_leaves_the_project_to_setup():
  text = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
  assert set(tomllib.loads(text)) == {'build-system', 'tool'}


def test_pre_commit_uses_the_pinned_ruff():
  text = (ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8')
  versions = set(re.findall(r'ruff==([0-9.]+)', text))
  assert versions == {read_pins(name)['ruff'] for name in CONSTRAINTS}
