import json

import pytest

from dsv32_jax.rl.speciale import protocols, report, sources
from dsv32_jax.rl.speciale.labels import LabelConfig
from dsv32_jax.rl.speciale.refinement import SearchConfig
from dsv32_jax.rl.speciale.selection import Contest
from tests.support.scripted_prover import ScriptedProver

KINDS = {'kinds': ['compute']}


def config(protocol, **more):
  return protocols.ProtocolConfig(
    protocol=protocol,
    **{
      'tasks': 3,
      'at_a_time': 2,
      'search': SearchConfig(proofs=3, analyses=3, kept=2, pairs=2, rounds=2),
      'contest': Contest(samples=6, submissions=2),
      'label': LabelConfig(analyses=4, checks=2, lowest=1),
      **more,
    },
  )


def source(protocol):
  name = 'speciale/review' if protocol == 'label' else 'speciale/proof'
  return sources.make(name, KINDS)


def prover():
  return ScriptedProver(right=0.4, blind=0.2, unreadable=0.05)


def quiet(line):
  del line


class Ended(Exception):
  """Stands in for a kill."""


@pytest.mark.parametrize('protocol', protocols.PROTOCOLS)
def test_run_that_was_ended_goes_on_to_the_same_rows(tmp_path, protocol):
  whole = protocols.run(
    prover(), source(protocol), config(protocol), tmp_path / 'a', report=quiet
  )
  assert [row['place'] for row in whole] == list(range(3))

  path = tmp_path / 'b'
  good, calls, limit = prover(), [], [0]

  def dies(prompts):
    calls.append(len(prompts))
    if len(calls) == limit[0]:
      raise Ended
    return good(prompts)

  for limit[0] in (2, 3, 5):
    calls.clear()
    try:
      protocols.run(
        dies, source(protocol), config(protocol), path, report=quiet
      )
    except Ended:
      # As if it had been ended in the middle of a line and of a group.
      text = path.read_text()
      path.write_text(text + text.splitlines()[-1][:7])
  rows = protocols.run(
    good, source(protocol), config(protocol), path, report=quiet
  )
  assert rows == whole
  assert path.read_bytes() == (tmp_path / 'a').read_bytes()
  before = len(good.asked)
  protocols.run(good, source(protocol), config(protocol), path, report=quiet)
  assert len(good.asked) == before
  text = report.table(protocol, rows)
  assert text.count('\n') >= 3
  assert len({line.count('|') for line in text.splitlines()}) == 1


def test_rows_of_another_run_are_refused(tmp_path):
  path = tmp_path / 'rows'
  protocols.run(
    prover(), source('refine'), config('refine'), path, report=quiet
  )
  with pytest.raises(ValueError, match='holds a run of'):
    protocols.run(
      prover(), source('refine'), config('refine', seed=1), path, report=quiet
    )
  assert json.loads(path.read_text().splitlines()[0])['config']['seed'] == 0


def test_perfect_prover_is_right_at_once_in_every_protocol(tmp_path):
  for protocol in ('refine', 'search', 'contest'):
    rows = protocols.run(
      ScriptedProver(right=1.0, blind=0.0),
      source(protocol),
      config(protocol),
      tmp_path / protocol,
      report=quiet,
    )
    for row in rows:
      if protocol == 'refine':
        assert (row['truth'], row['stopped']) == ([1.0], 'passed')
      elif protocol == 'search':
        assert (row['rounds'], row['best_truth']) == (0, 1.0)
      else:
        assert row['longest']
        assert row['shortest']
        assert row['unfiltered'] == 1


def test_protocol_that_is_none_is_refused():
  with pytest.raises(ValueError, match='tasks: got 0'):
    config('refine', tasks=0)


@pytest.mark.parametrize(
  ('right', 'total', 'ends'),
  # Newcombe (1998), table I: the score method without continuity correction.
  [
    (81, 263, (0.2553, 0.3662)),
    (15, 148, (0.0624, 0.1605)),
    (0, 20, (0, 0.1611)),
  ],
)
def test_wilson_interval_equals_published_ones(right, total, ends):
  assert report.wilson(right, total) == pytest.approx(ends, abs=1e-4)


def test_table_of_refinement_keeps_a_task_that_has_stopped():
  rows = [
    {'truth': [1.0], 'self': [1.0], 'tokens': [10]},
    {'truth': [0.0, 1.0], 'self': [0.5, 1.0], 'tokens': [10, 20]},
    {'truth': [0.0, 0.0], 'self': [None, 1.0], 'tokens': [10, 20]},
  ]
  first, second = report.table('refine', rows).splitlines()[2:]
  assert first.startswith('| 1 | 33.3 %')
  assert '100.0 %' in first
  assert first.endswith('| 10.00 |')
  assert second.startswith('| 2 | 66.7 %')
  assert second.endswith('| 23.33 |')
