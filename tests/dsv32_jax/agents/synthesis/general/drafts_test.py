import random

import pytest

from dsv32_jax.agents.synthesis.general import constraints, data, drafts, solver
from dsv32_jax.agents.synthesis.general.author import ProceduralAuthor
from dsv32_jax.agents.synthesis.general.domains import DOMAINS
from dsv32_jax.agents.synthesis.roles import AuthorError

TRIP = DOMAINS['trip_planning']
BOUND = {
  'family': 'bound',
  'row': 0,
  'field': 'hotel',
  'column': 'price',
  'op': '<=',
  'value': 500,
}


@pytest.mark.parametrize('name', DOMAINS)
def test_procedural_drafts_come_back_from_json_and_are_in_order(name, tmp_path):
  domain = DOMAINS[name]
  rng = random.Random(name)
  rows = data.generate(domain, rng)
  data.store(rows, tmp_path / 'x.db')
  database = data.connect(tmp_path / 'x.db')
  given = [row['name'] for row in rows[domain.given.table][:3]]
  hidden = solver.Solver(domain, database).solve(given, domain.base).answer
  database.close()
  assert hidden is not None
  author = ProceduralAuthor(domain, rows, given, hidden, rng)
  seen = set()
  for _ in range(10):
    draft = author.propose()
    for level in (2, 3, 4):
      try:
        draft = author.harden(draft, level)
      except AuthorError:
        continue
    found = drafts.read(domain, 3, draft)
    assert [constraints.to_json(one) for one in found] == draft
    seen |= {one['family'] for one in draft}
  assert 'bound' in seen
  assert len(seen) >= 4
  drafts.read(domain, 3, [constraints.to_json(x) for x in domain.base])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'family': 'wish'}, "family: got 'wish'"),
    ({'row': 7}, 'row: got 7, expected -1 to 2'),
    ({'row': True}, 'row: got True'),
    ({'field': 'pool'}, 'StopIteration'),
    ({'column': 'colour'}, 'hotel has no column colour'),
    ({'op': '<'}, "op: got '<'"),
    ({'value': 'cheap'}, "price: got 'cheap', expected a whole number"),
    ({'column': 'style', 'value': 'garden'}, "style: got <= 'garden'"),
    ({'extra': 1}, 'bound: got fields'),
  ],
)
def test_condition_that_makes_no_sense_is_refused(change, message):
  with pytest.raises(ValueError, match='condition 2: ') as error:
    drafts.read(TRIP, 3, [BOUND, {**BOUND, **change}])
  assert message in str(error.value)
