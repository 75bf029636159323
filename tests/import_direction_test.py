"""Holds the direction of imports (docs/architecture.md) by reading the source.

Every import counts wherever it stands: inside a function, under
`if TYPE_CHECKING`, or as `importlib.import_module('a literal')`.
"""

import ast
import dataclasses
import graphlib
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('dsv32_jax', 'pallas_kernels')

# What each part may import directly; it may also import what that may import.
# A part is a folder of dsv32_jax, or one module where modules of a folder are
# held apart.
MAY_IMPORT: dict[str, set[str]] = {
  'pallas_kernels': set(),
  'config': set(),
  'chat': set(),
  'functional': {'pallas_kernels'},
  'sharding.axes': set(),
  'sharding.rules': {'sharding.axes'},
  'sharding.parallel': {'sharding.axes', 'sharding.rules'},
  'sharding.zigzag': set(),
  # The regions that say themselves how devices talk to each other: what a
  # module may know of sharding, with the three above.
  'sharding.attention_region': {
    'sharding.axes',
    'sharding.parallel',
    'sharding.zigzag',
  },
  'sharding.embedding_region': {
    'sharding.axes',
    'sharding.parallel',
    'sharding.zigzag',
  },
  'sharding.expert_parallel': {
    'sharding.axes',
    'sharding.parallel',
    'config',
    'functional',
  },
  'sharding': {
    'sharding.axes',
    'sharding.rules',
    'sharding.parallel',
    'sharding.zigzag',
    'sharding.attention_region',
    'sharding.embedding_region',
    'sharding.expert_parallel',
    'config',
    'functional',
  },
  # Reads shapes of whole models and optimizers, so it stands above them.
  'sharding.planning': {'training', 'evaluation'},
  'data': {'config', 'chat'},
  'losses': {'functional', 'pallas_kernels'},
  'modules': {
    'config',
    'functional',
    'losses',
    'sharding.axes',
    'sharding.parallel',
    'sharding.zigzag',
    'sharding.attention_region',
    'sharding.embedding_region',
    'sharding.expert_parallel',
    'pallas_kernels',
  },
  'checkpoints': {'config', 'modules', 'sharding'},
  'training': {'modules', 'losses', 'data', 'sharding', 'checkpoints'},
  # What a policy is asked and replies: all that the engine's knows of agents.
  'agents.types': {'chat'},
  'inference': {'modules', 'sharding', 'chat', 'agents.types'},
  'agents': {'chat', 'agents.types'},
  'rl': {'agents', 'inference', 'training', 'losses', 'evaluation.flops'},
  'serving': {'inference', 'chat', 'data', 'checkpoints'},
  # Counts from sizes alone: below everything that wants to report them.
  'evaluation.flops': {'config'},
  'evaluation': {
    'evaluation.flops',
    'agents',
    'inference',
    'data',
    'checkpoints',
  },
}

# Installed packages, for the parts that are held to few: the only ones allowed
# beside the standard library ...
ONLY: dict[str, set[str]] = {
  'config': set(),
  'chat': {'jsonschema', 'referencing'},
  # jaxlib: the dialects that inline code of a Mosaic kernel is written in.
  'pallas_kernels': {'jax', 'jaxlib', 'jaxtyping', 'numpy'},
  'functional': {'jax', 'jaxtyping', 'numpy'},
  'sharding.axes': set(),
}
# ... and, elsewhere, those that would be a subject out of place.
NEVER: dict[str, set[str]] = {
  'data': {'jax', 'flax', 'optax', 'orbax'},
  'losses': {'flax', 'optax', 'orbax'},
  'modules': {'optax', 'orbax', 'grain'},
  'agents': {'jax', 'flax', 'optax', 'orbax'},
  'inference': {'optax', 'orbax', 'grain'},
}
# The one file of an operation that holds its Triton kernel.
TRITON_FILE, TRITON = 'jax_triton', {'jax_triton', 'triton'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
  """One import: the module it stands in, and the module it names."""

  source: str
  target: str
  line: int

  def __str__(self) -> str:
    return f'{self.source}:{self.line} imports {self.target}'


def find_modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Dotted name to file, for both packages and the experiments."""
  modules = {}
  for package in (*PACKAGES, 'experiments'):
    for path in sorted((root / package).rglob('*.py')):
      parts = path.relative_to(root).with_suffix('').parts
      name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
      modules[name] = path
  return modules


def read_imports(root: pathlib.Path) -> list[Import]:
  """Every import of every module under `root`."""
  modules = find_modules(root)
  found = []
  for source, path in modules.items():
    tree = ast.parse(path.read_text(encoding='utf-8'), str(path))
    is_package = path.name == '__init__.py'
    for node in ast.walk(tree):
      for target in named_modules(node, source, is_package, modules):
        found.append(Import(source=source, target=target, line=node.lineno))
  return found


def named_modules(
  node: ast.AST, source: str, is_package: bool, modules: dict
) -> Iterator[str]:
  """The modules that an import statement, or import_module call, names."""
  if isinstance(node, ast.Import):
    yield from (alias.name for alias in node.names)
  elif isinstance(node, ast.ImportFrom):
    base = node.module or ''
    if node.level:
      package = source.split('.') if is_package else source.split('.')[:-1]
      package = package[: len(package) - node.level + 1]
      base = '.'.join([*package, base] if base else package)
    for alias in node.names:
      # `from package import module` names the module, not the package.
      module = f'{base}.{alias.name}'
      yield module if module in modules else base
  elif (
    isinstance(node, ast.Call)
    and ast.unparse(node.func).split('.')[-1] in ('import_module', '__import__')
    and node.args
    and isinstance(node.args[0], ast.Constant)
  ):
    yield node.args[0].value


def part_of(module: str) -> str | None:
  """The part of the DAG that a module belongs to; None for the root package."""
  head, *rest = module.split('.')
  if head == 'pallas_kernels':
    return head
  if not rest:
    return None
  pair = '.'.join(rest[:2])
  return pair if pair in MAY_IMPORT else rest[0]


def reachable(part: str) -> set[str]:
  """All parts that `part` may import, itself included."""
  found, queue = set(), [part]
  while queue:
    name = queue.pop()
    if name not in found:
      found.add(name)
      queue += MAY_IMPORT[name]
  return found


def violations(root: pathlib.Path) -> list[str]:
  """What breaks the direction of imports under `root`, a line each."""
  modules = find_modules(root)
  wrong = []
  for module in modules:
    part = part_of(module)
    if module.startswith('dsv32_jax.') and part not in MAY_IMPORT:
      wrong.append(f'{module}: {part} is not in the table of this test')
  if wrong:
    return wrong

  # A script's own folder is on its path, so it can also name a neighbour bare.
  scripts = {'experiments'} | {
    name.split('.')[1] for name in modules if name.startswith('experiments.')
  }
  for edge in read_imports(root):
    source_top, target_top = (
      name.split('.')[0] for name in (edge.source, edge.target)
    )
    if target_top == 'experiments' or (
      source_top == 'experiments' and target_top in scripts
    ):
      wrong.append(f'{edge}: nothing imports an experiment')
    elif source_top == 'experiments':
      if target_top in PACKAGES and '._' in edge.target:
        wrong.append(f'{edge}: experiments use the public surface')
    elif target_top in PACKAGES:
      wrong += internal_violation(edge)
    else:
      wrong += external_violation(edge)
  return wrong + cycles(root)


def internal_violation(edge: Import) -> list[str]:
  """Judges an import of one of our modules by another."""
  source, target = part_of(edge.source), part_of(edge.target)
  if source is None:
    return []
  if target is None:
    return [f'{edge}: inside the package name the module, not the root']
  if target not in MAY_IMPORT or target not in reachable(source):
    return [f'{edge}: {source} may not import {target}']
  return []


def external_violation(edge: Import) -> list[str]:
  """Judges an import of an installed package by one of our modules."""
  part, package = part_of(edge.source), edge.target.split('.')[0]
  if part is None or package in sys.stdlib_module_names:
    return []
  if part == 'pallas_kernels' and edge.source.split('.')[-1] == TRITON_FILE:
    allowed = ONLY[part] | TRITON
  else:
    allowed = ONLY.get(part)
  if allowed is not None and package not in allowed:
    return [f'{edge}: {part} may not import the package {package}']
  if package in NEVER.get(part, ()):
    return [f'{edge}: {part} may not import the package {package}']
  return []


def cycles(root: pathlib.Path) -> list[str]:
  """A cycle among our modules, if there is one."""
  modules = find_modules(root)
  graph = {module: set() for module in modules}
  for edge in read_imports(root):
    if edge.target in modules and edge.target != edge.source:
      graph[edge.source].add(edge.target)
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return ['a cycle: ' + ' -> '.join(reversed(error.args[1]))]
  return []


def test_imports_of_this_repository_follow_the_dag():
  edges = read_imports(ROOT)
  # The reader sees what is known to be there, so silence means something.
  assert any(
    edge.source.startswith('dsv32_jax.modules.')
    and edge.target == 'pallas_kernels'
    for edge in edges
  )
  assert violations(ROOT) == []


def test_table_of_parts_has_no_cycle():
  graphlib.TopologicalSorter(MAY_IMPORT).prepare()


GOOD = {
  'pallas_kernels/__init__.py': 'from pallas_kernels.op.api import run',
  'pallas_kernels/op/api.py': 'import jax\nfrom pallas_kernels.op import xla',
  'pallas_kernels/op/xla.py': 'import numpy, functools',
  'pallas_kernels/op/jax_triton.py': 'import jax_triton',
  'dsv32_jax/__init__.py': 'from dsv32_jax.modules import mla',
  'dsv32_jax/config/model.py': 'import dataclasses',
  'dsv32_jax/functional/rotary.py': 'import jax.numpy as jnp',
  'dsv32_jax/sharding/axes.py': 'EMBED = 1',
  'dsv32_jax/sharding/mesh.py': 'from . import axes',
  'dsv32_jax/modules/mla.py': (
    'import flax.linen, pallas_kernels\n'
    'from dsv32_jax.sharding import axes\n'
    'from dsv32_jax.functional import rotary\n'
    'from dsv32_jax.config.model import MLAConfig'
  ),
  'dsv32_jax/training/step.py': 'from dsv32_jax.functional import rotary',
  'experiments/train.py': (
    'import dsv32_jax\nfrom dsv32_jax.training import step'
  ),
  'experiments/other.py': 'import optax',
}

# name: (file, its text, what the complaint says).
PLANTED = {
  'upward': (
    'dsv32_jax/functional/bad.py',
    'from dsv32_jax.modules import mla',
    'functional may not import modules',
  ),
  'upward_relative': (
    'dsv32_jax/functional/bad.py',
    'from ..modules import mla',
    'functional may not import modules',
  ),
  'upward_in_a_function': (
    'dsv32_jax/losses/bad.py',
    'def f():\n  import dsv32_jax.training.step',
    'losses may not import training',
  ),
  'upward_by_import_module': (
    'dsv32_jax/data/bad.py',
    'import importlib\nimportlib.import_module("dsv32_jax.modules.mla")',
    'data may not import modules',
  ),
  'sideways': (
    'dsv32_jax/inference/bad.py',
    'from dsv32_jax.training import step',
    'inference may not import training',
  ),
  'module_of_sharding_that_is_held_apart': (
    'dsv32_jax/modules/bad.py',
    'from dsv32_jax.sharding import mesh',
    'modules may not import sharding',
  ),
  'root_package_from_inside': (
    'dsv32_jax/modules/bad.py',
    'from dsv32_jax import ModelConfig',
    'name the module, not the root',
  ),
  'kernels_import_the_model': (
    'pallas_kernels/op/bad.py',
    'from dsv32_jax.functional import rotary',
    'pallas_kernels may not import functional',
  ),
  'kernels_import_flax': (
    'pallas_kernels/op/bad.py',
    'import flax.linen as nn',
    'pallas_kernels may not import the package flax',
  ),
  'triton_outside_its_file': (
    'pallas_kernels/op/bad.py',
    'import jax_triton',
    'may not import the package jax_triton',
  ),
  'config_imports_jax': (
    'dsv32_jax/config/bad.py',
    'import jax',
    'config may not import the package jax',
  ),
  'data_imports_jax': (
    'dsv32_jax/data/bad.py',
    'from jax import numpy',
    'data may not import the package jax',
  ),
  'package_imports_an_experiment': (
    'dsv32_jax/training/bad.py',
    'import experiments.train',
    'nothing imports an experiment',
  ),
  'experiment_imports_another': (
    'experiments/bad.py',
    'from experiments import train',
    'nothing imports an experiment',
  ),
  'experiment_imports_its_neighbour_by_bare_name': (
    'experiments/bad.py',
    'import train',
    'nothing imports an experiment',
  ),
  'experiment_imports_a_private_module': (
    'experiments/bad.py',
    'import dsv32_jax._private',
    'experiments use the public surface',
  ),
  'cycle': (
    'dsv32_jax/functional/rotary.py',
    'from dsv32_jax.functional import helper',
    'a cycle: ',
  ),
  'unknown_folder': (
    'dsv32_jax/utils/bad.py',
    '',
    'utils is not in the table',
  ),
}


def write_tree(root: pathlib.Path, files: dict[str, str]) -> None:
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def test_tree_that_follows_the_dag_is_accepted(tmp_path):
  write_tree(tmp_path, GOOD)
  assert violations(tmp_path) == []


@pytest.mark.parametrize('name', PLANTED)
def test_planted_violation_is_reported_alone(tmp_path, name):
  file, text, complaint = PLANTED[name]
  helper = 'from dsv32_jax.functional import rotary'
  write_tree(tmp_path, GOOD | {'dsv32_jax/functional/helper.py': helper})
  write_tree(tmp_path, {file: text})
  found = violations(tmp_path)
  assert len(found) == 1, found
  assert complaint in found[0]
