"""The tool `python`: what it remembers, what it forgets, what it leaves."""

import dataclasses
import pathlib
import time
import uuid

import pytest

from dsv32_jax.agents.interpreter import PythonTool, cut
from dsv32_jax.agents.sandbox import (
  Limits,
  Program,
  Sandbox,
  isolation,
  why_not,
)
from dsv32_jax.agents.tools import ToolSet
from dsv32_jax.agents.types import Tool, ToolError

LIMITS = Limits(
  # A loaded machine gives a process little of its time.
  wall_s=60.0,
  cpu_s=0.8,
  memory_bytes=128 << 20,
  processes=8,
  file_bytes=1 << 20,
  output_bytes=20_000,
)
WORKING = [name for name in isolation.AUTOMATIC if why_not(name) is None]


@pytest.fixture(
  params=[
    *WORKING[:1],
    *(pytest.param(name, marks=pytest.mark.slow) for name in WORKING[1:]),
    pytest.param('unsafe_rlimits', marks=pytest.mark.slow),
  ]
)
def sandbox(request):
  return Sandbox(backend=request.param, disk_bytes=4 << 20)


@pytest.fixture
def tool(sandbox):
  with PythonTool(sandbox=sandbox, limits=LIMITS) as made:
    yield made


def run(tool, code):
  return tool({'code': code})


def test_it_is_a_tool_and_its_schema_is_held(tool):
  assert isinstance(tool, Tool)
  tools = ToolSet([tool])
  assert tools.call('python', {'code': '1 + 1'}) == '2'
  with pytest.raises(ToolError, match='do not fit'):
    tools.call('python', {'source': '1 + 1'})


def test_last_expression_is_shown_and_statements_are_quiet(tool):
  assert run(tool, 'x = [1, 2]') == '[no output]'
  assert run(tool, 'x.append(3)') == '[no output]'
  assert run(tool, 'x') == '[1, 2, 3]'
  assert run(tool, '_ + [4]') == '[1, 2, 3, 4]'
  assert run(tool, 'for i in x:\n  print(i)\nlen(x)') == '1\n2\n3\n3'
  assert run(tool, '"é"') == "'é'"


def test_functions_imports_classes_and_files_stay(tool):
  run(tool, 'import math\ndef area(r):\n  return math.pi * r * r')
  run(tool, 'class A:\n  b: int = 3\nopen("note", "w").write("kept")')
  assert run(tool, 'round(area(2), 3), A().b') == '(12.566, 3)'
  assert run(tool, 'open("note").read()') == "'kept'"
  run(tool, 'import pickle\na = pickle.loads(pickle.dumps(A()))')
  assert run(tool, 'type(a) is A') == 'True'


def test_errors_are_in_the_result_and_cost_no_state(tool):
  run(tool, 'x = 1')
  found = run(tool, 'print("before")\ny = 2\nx / 0')
  lines = found.splitlines()
  assert lines[0] == 'before'
  assert lines[1].startswith('Traceback')
  assert '"<call 2>", line 3' in lines[2]
  assert lines[3].strip() == 'x / 0'
  assert lines[-1] == 'ZeroDivisionError: division by zero'
  assert 'repl' not in found
  assert run(tool, 'x, y') == '(1, 2)'
  assert 'SyntaxError' in run(tool, 'x = = 1')
  assert 'KeyboardInterrupt' in run(tool, 'raise KeyboardInterrupt')
  assert 'EOFError' in run(tool, 'input()')
  assert run(tool, 'x') == '1'


@pytest.mark.parametrize(
  ('code', 'why'),
  [
    ('while True: pass', '0.8 s of processor time'),
    ('print("y" * 100_000)', 'more than 20000 bytes'),
    ('import os\nos._exit(3)', 'ended the session'),
    ('import sys\nsys.exit("so long")', 'ended the session'),
    ('import os\nos.kill(os.getpid(), 9)', 'signal 9'),
  ],
)
def test_what_goes_beyond_a_limit_loses_its_state_and_says_so(tool, code, why):
  run(tool, 'x = 1\nopen("note", "w").close()')
  found = run(tool, 'print("so far")\n' + code)
  assert found.startswith('so far')
  assert why in found
  assert 'without its variables and files' in found
  assert 'NameError' in run(tool, 'x')
  assert run(tool, 'import os\nos.listdir(".")') == '[]'


def test_what_takes_too_long_is_ended(sandbox):
  limits = dataclasses.replace(LIMITS, wall_s=2.0)
  with PythonTool(sandbox=sandbox, limits=limits) as tool:
    found = run(tool, 'import time\ntime.sleep(100)')
    assert 'ran for more than 2 s' in found
    assert 'without its variables and files' in found


def test_memory_is_limited_and_may_be_survived(tool):
  run(tool, 'x = 1')
  assert 'MemoryError' in run(tool, 'big = bytearray(1 << 30)')
  assert run(tool, 'x') == '1'


def test_files_are_limited_and_that_may_be_survived(tool):
  run(tool, 'x = 1')
  found = run(tool, 'open("big", "wb").write(b"x" * (2 << 20))')
  assert 'File too large' in found
  assert run(tool, 'x') == '1'


def test_processor_time_is_counted_for_each_call(tool):
  burn = 'import time\nend = time.process_time() + 0.3\n'
  burn += 'while time.process_time() < end: pass\n"done"'
  for _ in range(4):  # More than the limit together.
    assert run(tool, burn) == "'done'"


def test_nothing_moves_between_calls(tool):
  run(
    tool,
    'import threading, time\ncount = 0\ndef tick():\n'
    '  global count\n  while True:\n    count += 1\n    time.sleep(0.01)\n'
    'threading.Thread(target=tick, daemon=True).start()',
  )
  run(tool, 'time.sleep(0.2)')
  before = int(run(tool, 'count'))
  time.sleep(0.5)
  after = int(run(tool, 'count'))
  assert before >= 5
  assert after - before <= 10


def test_long_results_are_cut_in_the_middle_with_a_note(tool):
  sandbox_limits = Limits(output_bytes=1 << 20)
  with PythonTool(limits=sandbox_limits, max_characters=200) as small:
    found = run(small, 'print("a" * 500 + "b" * 500)')
    assert found == f'{"a" * 100}\n[800 characters cut here]\n{"b" * 100}'
    assert run(small, '1') == '1'


def test_a_copy_of_the_process_does_not_answer_in_its_place(tool):
  run(tool, 'import os\nx = 1')
  run(tool, 'if os.fork() == 0:\n  x = 2')
  assert run(tool, 'x') == '1'


def test_speaking_out_of_turn_confuses_nobody(tool):
  run(tool, 'import os\nx = 1')
  for code in ('os.write(4, b"0" * 9)', 'os.write(4, b"?")'):
    run(tool, code)
  assert 'x' not in run(tool, '"a"')
  with PythonTool() as other:
    assert 'NameError' in run(other, 'x')
  deaf = run(tool, 'os.close(3)\nos.close(4)')
  assert 'ended the session' in deaf
  assert run(tool, '5') == '5'
  run(tool, 'import os\nos.close(3)')  # Found out by the next call.
  assert 'ended the session' in run(tool, '6')
  assert run(tool, '7') == '7'


def processes_with(marker):
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      if marker.encode() in path.read_bytes():
        found.append(path)
    except OSError:
      continue
  return found


def test_close_leaves_no_process(tool):
  marker = f'left-{uuid.uuid4().hex}'
  half = len(marker) // 2
  run(
    tool,
    f'import subprocess, sys\nname = {marker[:half]!r} + {marker[half:]!r}\n'
    'subprocess.Popen([sys.executable or "/usr/bin/sleep", "-c", '
    '"import time; time.sleep(60) #" + name], start_new_session=True)',
  )
  assert processes_with(marker)
  tool.close()
  assert not processes_with(marker)
  with pytest.raises(ToolError, match='closed'):
    run(tool, '1')


def test_another_program_of_the_sandbox_finds_nothing_of_the_session():
  with Sandbox(limits=LIMITS) as sandbox:
    first = sandbox.run(
      Program(source='x = 1\nopen("f", "w").close()', keeps_state=True)
    )
    assert first.is_alive
    other = sandbox.run(Program(source='import os\nprint(os.listdir("."))'))
    assert (other.stdout, other.is_alive) == ('[]\n', False)
    again = sandbox.run(Program(source='x', keeps_state=True))
    assert again.status == 'exit'
    assert again.is_alive
    assert 'NameError' in again.stderr
    assert sandbox.num_started == 1


def test_what_does_not_fit_the_pipe_is_an_error_and_no_end():
  with Sandbox(limits=LIMITS) as sandbox:
    found = sandbox.run(Program(source='#' * (2 << 20), keeps_state=True))
    assert found.status == 'error'
    assert sandbox.run(Program(source='1', keeps_state=True)).stdout == '1\n'


def test_code_that_is_too_long_is_refused(tool):
  with pytest.raises(ToolError, match='got 100001 characters'):
    run(tool, '#' * 100_001)


def test_state_goes_with_a_source_only():
  with pytest.raises(ValueError, match='keeps_state'):
    Program(argv=('/bin/true',), keeps_state=True)


def test_short_text_is_not_cut():
  assert cut('abc', 100) == 'abc'
