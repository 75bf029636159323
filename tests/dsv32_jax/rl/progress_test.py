import io

from dsv32_jax.rl.progress import Board


def test_board_without_a_terminal_writes_a_line_every_few_seconds():
  now = [0.0]
  stream = io.StringIO()
  board = Board(
    title='rl', step=0, total_steps=4, stream=stream, clock=lambda: now[0]
  )
  board.phase('rollout', 1, 8)
  board.phase('rollout', 8, 8)
  now[0] = 6.0
  board.update(1, {'reward/mean': 0.25, 'entropy': 1.0})
  now[0] = 7.0
  board.update(2, {'entropy': 0.5})
  board.update(4, {'entropy': 0.125})
  board.close()
  assert stream.getvalue().splitlines() == [
    'rl 0/4 rollout 1/8',
    'rl 1/4 reward 0.250  entropy 1.000  ETA 0:00:18',
    # The reward is of the last batch that had one.
    'rl 4/4 reward 0.250  entropy 0.125  ETA 0:00:00',
  ]


def test_board_on_a_terminal_draws_steps_and_phase():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  board = Board(title='rl', step=0, total_steps=2, stream=stream)
  board.phase('rollout', 3, 8)
  board.update(2, {'reward/mean': 0.25})
  board.close()
  text = stream.getvalue()
  assert '3/8' in text
  assert '2/2' in text
  assert 'reward 0.250' in text
