"""The solver against enumeration by the verifier, which shares no code."""

import itertools
import random

import pytest

from dsv32_jax.agents.synthesis.general import constraints as c
from dsv32_jax.agents.synthesis.general import data
from dsv32_jax.agents.synthesis.general.author import ProceduralAuthor
from dsv32_jax.agents.synthesis.general.schema import (
  Column,
  Domain,
  Field,
  Relation,
  Table,
)
from dsv32_jax.agents.synthesis.general.solver import Solver
from dsv32_jax.agents.synthesis.general.verifier import Verifier

# Small enough to try every answer.
DOMAIN = Domain(
  name='small',
  tables=(
    Table(
      name='day',
      plural='days',
      columns=(),
      count=(3, 3),
      names=(('d1', 'd2', 'd3'), ()),
    ),
    Table(
      name='town',
      plural='towns',
      columns=(
        Column(name='tax', says='price', low=1, high=5, is_summed=True),
        Column(name='kind', says='kind', options=('a', 'b')),
      ),
      count=(3, 3),
      names=(('t1', 't2', 't3'), ()),
    ),
    Table(
      name='inn',
      plural='inns',
      columns=(
        Column(name='price', says='price', low=1, high=9, is_summed=True),
        Column(name='kind', says='kind', options=('a', 'b')),
      ),
      parent='town',
      count=(2, 2),
      names=(('Red', 'Blue', 'Old', 'New'), ('Inn', 'Lodge', 'House')),
    ),
  ),
  relations=(
    Relation(
      name='road',
      first='town',
      second='town',
      columns=(Column(name='km', says='km', low=1, high=9),),
      says='road',
    ),
    Relation(
      name='sky',
      first='town',
      second='day',
      columns=(
        Column(name='state', says='state', options=('sun', 'rain', 'fog')),
      ),
      says='weather',
    ),
  ),
  given=Field(name='day', table='day', says='days'),
  fields=(
    Field(name='town', table='town', says='town'),
    Field(name='inn', table='inn', says='inn'),
  ),
  base=(
    c.Compare(
      first='inn',
      first_column='town',
      op='==',
      second='town',
      second_column='name',
    ),
  ),
  openings=('Go.',),
  branch=('inn', 'price'),
)
GIVEN = ('d1', 'd2', 'd3')


def workshop(seed, path):
  rows = data.generate(DOMAIN, random.Random(seed))
  data.store(rows, path)
  return rows, data.connect(path)


def drawn(rows, seed):
  """Conditions around a random answer, with some changed: they may clash."""
  rng = random.Random(seed)
  hidden = [
    {'day': day, 'town': inn['town'], 'inn': inn['name']}
    for day, inn in zip(GIVEN, rng.choices(rows['inn'], k=3), strict=True)
  ]
  author = ProceduralAuthor(DOMAIN, rows, GIVEN, hidden, rng)
  draft = author.propose()
  for level in (2, 3, 4, 4):
    draft = author.harden(draft, level)
  found = [c.from_json(one) for one in draft]
  found += [
    c.Distinct(fields=('town',)),
    c.Distinct(fields=('town', 'inn'), together=True),
    c.Sum(row=-1, terms=(('inn', 'price'),), op='!=', value=9),
  ]
  return [*DOMAIN.base, *rng.sample(found, rng.randint(1, len(found)))]


@pytest.mark.parametrize('seed', range(12))
def test_solver_agrees_with_trying_every_answer(seed, tmp_path):
  rows, database = workshop(seed, tmp_path / 'x.db')
  solver, verifier = Solver(DOMAIN, database), Verifier(DOMAIN, database)
  stays = [(inn['town'], inn['name']) for inn in rows['inn']]
  answers = [
    [
      {'day': day, 'town': town, 'inn': inn}
      for day, (town, inn) in zip(GIVEN, chosen, strict=True)
    ]
    for chosen in itertools.product(stays, repeat=3)
  ]
  for turn in range(12):
    found = drawn(rows, f'{seed}/{turn}')
    right = [x for x in answers if not verifier.violations(x, found)]
    solved = solver.solve(GIVEN, found)
    assert solved.is_proof
    assert (solved.answer in right) if right else (solved.answer is None)
    shuffled = solver.solve(GIVEN, found, shuffle=random.Random(turn))
    assert (shuffled.answer in right) if right else (shuffled.answer is None)
  database.close()


def test_search_that_is_cut_off_proves_nothing(tmp_path):
  _, database = workshop(0, tmp_path / 'x.db')
  solved = Solver(DOMAIN, database).solve(GIVEN, DOMAIN.base, max_nodes=2)
  assert solved.answer is None
  assert not solved.is_proof
  database.close()
