"""The two scripts behind `make`: choosing a Python, and making its environment.

Fake interpreters stand on a PATH of the test's own; nothing is installed.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIND = ROOT / 'tools' / 'find_python'

pytestmark = pytest.mark.skipif(
  os.name != 'posix', reason='the scripts need a POSIX shell'
)


@pytest.fixture
def machine(tmp_path):
  """A machine that has a shell, and the Pythons that a test adds."""
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in ('sh', 'ls', 'sort'):
    (tools / name).symlink_to(shutil.which(name))

  class Machine:
    path = tmp_path / 'bin'
    home = tmp_path / 'home'

    def add(self, file: pathlib.Path, answer: str, status: int = 0) -> str:
      """An interpreter that answers the probe with `answer`."""
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(f'#!/bin/sh\necho "{answer}"\nexit {status}\n')
      file.chmod(0o755)
      return str(file)

    def on_path(self, name: str, answer: str, status: int = 0) -> str:
      return self.add(self.path / name, answer, status)

    def in_pyenv(self, version: str, answer: str) -> str:
      minor = '.'.join(version.split('.')[:2])
      folder = self.home / '.pyenv' / 'versions' / version / 'bin'
      return self.add(folder / f'python{minor}', answer)

    def find(self, *arguments: str, python: str = ''):
      return subprocess.run(
        [tools / 'sh', FIND, *arguments],
        env={
          'PATH': f'{self.path}:{tools}',
          'HOME': str(self.home),
          'PYTHON': python,
        },
        capture_output=True,
        text=True,
        check=False,
      )

  return Machine()


def test_find_python_prefers_the_newest_of_312_and_313(machine):
  machine.on_path('python3.11', '3.11 ')
  machine.on_path('python3.12', '3.12 ')
  machine.on_path('python3.14', '3.14 ')
  expected = machine.in_pyenv('3.13.0', '3.13 ')
  assert machine.find().stdout.split() == [expected]


def test_find_python_prefers_a_later_patch_of_pyenv(machine):
  machine.in_pyenv('3.12.9', '3.12 ')
  expected = machine.in_pyenv('3.12.10', '3.12 ')
  assert machine.find().stdout.split() == [expected]


@pytest.mark.parametrize('version', ['3.11', '3.13', '3.14'])
def test_find_python_alone_under_its_plain_name_is_found(machine, version):
  expected = machine.on_path('python3', f'{version} ')
  assert machine.find().stdout.split() == [expected]


def test_find_python_passes_over_a_shim_that_does_not_run(machine):
  machine.on_path('python3.13', 'pyenv: command not found', status=127)
  expected = machine.in_pyenv('3.13.0', '3.13 ')
  assert machine.find().stdout.split() == [expected]


def test_find_python_passes_over_one_without_venv_and_says_so(machine):
  machine.on_path('python3.13', '3.13 lacks the module ensurepip')
  expected = machine.on_path('python3.12', '3.12 ')
  result = machine.find()
  assert result.stdout.split() == [expected]
  assert 'python3.13: it lacks the module ensurepip' in result.stderr


def test_find_python_all_lists_each_version_once(machine):
  newest = machine.on_path('python3.13', '3.13 ')
  middle = machine.on_path('python3.12', '3.12 ')
  machine.in_pyenv('3.12.1', '3.12 ')
  oldest = machine.in_pyenv('3.11.7', '3.11 ')
  assert machine.find('--all').stdout.split() == [newest, middle, oldest]


def test_find_python_with_none_usable_fails_and_says_what_to_do(machine):
  machine.on_path('python3', '3.9 is Python 3.9; 3.11 or later is needed')
  result = machine.find()
  assert result.returncode == 1
  assert result.stdout == ''
  assert 'no usable Python of 3.11 or later' in result.stderr


@pytest.mark.parametrize(
  ('answer', 'status', 'complaint'),
  [
    ('3.10 is Python 3.10; 3.11 or later is needed', 0, 'it is Python 3.10'),
    ('', 127, 'it does not run'),
  ],
)
def test_find_python_override_that_cannot_serve_is_refused(
  machine, answer, status, complaint
):
  machine.on_path('python3.12', '3.12 ')
  mine = machine.on_path('mine', answer, status)
  result = machine.find(python=mine)
  assert result.returncode == 1
  assert f'PYTHON={mine}: {complaint}' in result.stderr


def test_find_python_override_that_is_missing_is_refused(machine):
  result = machine.find(python='python9')
  assert result.returncode == 1
  assert 'PYTHON=python9: there is no such program' in result.stderr


def test_find_python_override_is_taken_over_a_newer_one(machine):
  machine.on_path('python3.13', '3.13 ')
  expected = machine.on_path('python3.11', '3.11 ')
  assert machine.find(python='python3.11').stdout.split() == [expected]


def test_find_python_probe_accepts_the_python_of_this_test():
  result = subprocess.run(
    ['sh', FIND],
    env=dict(os.environ, PYTHON=sys.executable),
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.stdout.strip() == sys.executable, result.stderr


@pytest.fixture
def checkout(tmp_path):
  """tools/environment.py in a checkout whose pip only writes down its calls.

  The interpreter is the real one; venv and pip are replaced through a module
  on PYTHONPATH, so that the test takes milliseconds and no network.
  """
  root = tmp_path / 'checkout'
  (root / 'tools').mkdir(parents=True)
  (root / 'constraints').mkdir()
  for name in ('setup.py', 'tools/environment.py'):
    shutil.copy(ROOT / name, root / name)
  for name in ('py311.txt', 'py312.txt'):
    (root / 'constraints' / name).write_text('')
  fake = tmp_path / 'fake'
  fake.mkdir()
  (fake / 'venv.py').write_text(
    'import os, pathlib, sys\n'
    'root = pathlib.Path(sys.argv[1])\n'
    '(root / "bin").mkdir(parents=True)\n'
    'python = root / "bin" / "python"\n'
    'python.write_text("#!/bin/sh\\n"\n'
    f'  "echo $* >> {tmp_path}/calls\\n"\n'
    f'  "echo pip says no\\n"\n'
    f'  "! [ -e {tmp_path}/broken ]\\n")\n'
    'python.chmod(0o755)\n'
  )

  class Checkout:
    path = root
    calls_file = tmp_path / 'calls'
    broken = tmp_path / 'broken'
    version = '.'.join(map(str, sys.version_info[:2]))
    environment = root / f'.venv-py{version}'

    def make(self, *extras: str):
      """Runs the script; the pip installs that it did come with the result."""
      self.calls_file.write_text('')
      result = subprocess.run(
        [sys.executable, root / 'tools' / 'environment.py', *extras],
        env=dict(os.environ, PYTHONPATH=str(fake)),
        capture_output=True,
        text=True,
        check=False,
      )
      calls = self.calls_file.read_text().splitlines()
      return result, [call.split()[-1] for call in calls]

  return Checkout()


def test_environment_made_once_is_left_alone(checkout):
  result, calls = checkout.make('test')
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == str(checkout.environment / 'bin' / 'python')
  assert calls == ['setuptools', '.[test]']
  assert checkout.make('test')[1] == []
  # It also serves for less.
  assert checkout.make()[1] == []


def test_environment_asked_for_more_extras_keeps_those_it_has(checkout):
  checkout.make('test')
  marker = checkout.environment / 'kept'
  marker.touch()
  assert checkout.make('dev')[1] == ['setuptools', '.[dev,test]']
  assert marker.exists()


def test_environment_after_a_change_of_setup_is_updated(checkout):
  checkout.make('test')
  with open(checkout.path / 'setup.py', 'a', encoding='utf-8') as file:
    file.write('# changed\n')
  assert checkout.make()[1] == ['setuptools', '.[test]']


def test_environment_after_a_change_of_constraints_is_made_anew(checkout):
  checkout.make('test')
  (checkout.environment / 'old').touch()
  for file in (checkout.path / 'constraints').iterdir():
    file.write_text('numpy==1\n')
  assert checkout.make('test')[1] == ['setuptools', '.[test]']
  assert not (checkout.environment / 'old').exists()


def test_environment_of_a_failed_installation_is_made_anew(checkout):
  checkout.broken.touch()
  result, _ = checkout.make('test')
  assert result.returncode == 1
  assert result.stdout == ''
  assert 'pip says no' in result.stderr
  assert not (checkout.environment / 'installed.json').exists()
  (checkout.environment / 'half').touch()
  checkout.broken.unlink()
  assert checkout.make('test')[1] == ['setuptools', '.[test]']
  assert not (checkout.environment / 'half').exists()


def test_environment_of_a_failed_update_is_made_anew(checkout):
  checkout.make('test')
  checkout.broken.touch()
  assert checkout.make('dev', 'test')[0].returncode == 1
  checkout.broken.unlink()
  # Not current for what it had before, either: the update may have half run.
  assert checkout.make('test')[1] == ['setuptools', '.[test]']


def test_environment_with_a_damaged_stamp_is_made_anew(checkout):
  checkout.make('test')
  stamp = checkout.environment / 'installed.json'
  stamp.write_text(stamp.read_text()[:20])
  assert checkout.make('test')[1] == ['setuptools', '.[test]']
  assert json.loads(stamp.read_text())['extras'] == ['test']
