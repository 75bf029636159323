"""Progress of a transfer: bytes, rate, time left."""

import io

import pytest

from dsv32_jax.checkpoints.transfer_progress import Display, describe


@pytest.mark.parametrize(
  ('arguments', 'text'),
  [
    ((0, 10**10, 0, 0.0), '0.00/10.00 GB'),
    ((10**9, 10**10, 10**9, 10.0), '1.00/10.00 GB  100 MB/s  ETA 0:01:30'),
    # What an earlier session did says nothing of the rate.
    ((9 * 10**9, 10**10, 10**9, 3600.0), '9.00/10.00 GB  0 MB/s  ETA 1:00:00'),
  ],
)
def test_describe_gives_bytes_rate_and_time_left(arguments, text):
  assert describe(*arguments) == text


def test_display_writes_a_line_every_few_seconds_and_the_last():
  stream, now = io.StringIO(), [0.0]
  with Display(
    'x', stream=stream, every_s=5.0, clock=lambda: now[0]
  ) as display:
    for second in range(12):
      now[0] = float(second)
      display(second * 10**9, 11 * 10**9, f'shard {second}')
    # A new total is a new transfer: its time left counts from here.
    now[0] = 100.0
    display(0, 10**9, 'second')
  lines = stream.getvalue().splitlines()
  assert [line.split()[1] for line in lines] == [
    '0.00/11.00',
    '5.00/11.00',
    '10.00/11.00',
    '11.00/11.00',
    '0.00/1.00',
  ]
  assert lines[1].endswith('1000 MB/s  ETA 0:00:06  shard 5')
  assert 'ETA' not in lines[4]


def test_display_on_a_terminal_draws_a_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  with Display('import', stream=stream) as display:
    display(0, 2 * 10**9, 'one')
    display(10**9, 2 * 10**9, 'two')
  assert 'import' in stream.getvalue()
  assert 'GB' in stream.getvalue()
