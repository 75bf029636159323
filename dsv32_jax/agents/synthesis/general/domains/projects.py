"""Domains that pair up what must suit each other: fixtures, releases."""

from dsv32_jax.agents.synthesis.general.constraints import (
  Compare,
  Distinct,
  Listed,
)
from dsv32_jax.agents.synthesis.general.domains.parts import (
  amount,
  choice,
  least,
  number,
  within,
)
from dsv32_jax.agents.synthesis.general.domains.schedules import PEOPLE
from dsv32_jax.agents.synthesis.general.schema import (
  Domain,
  Field,
  Relation,
  Table,
)

SPORTS_LEAGUE = Domain(
  name='sports_league',
  tables=(
    Table(
      name='round',
      plural='rounds',
      columns=(number('week', 'week', 1, 30),),
      count=(7, 9),
      names=(tuple(f'Round {n}' for n in range(1, 10)), ()),
    ),
    Table(
      name='team',
      plural='teams',
      columns=(
        number('points', 'points', 3, 60),
        choice('division', 'north', 'south', 'islands'),
        amount('followers', 'attendance', 100, 3000, 25),
      ),
      count=(10, 11),
      names=(
        ('Harbour', 'Valley', 'Union', 'Royal', 'Forest'),
        ('Rovers', 'Falcons', 'Athletic', 'Wanderers', 'Stars'),
      ),
    ),
    Table(
      name='ground',
      plural='grounds',
      columns=(
        number('capacity', 'capacity', 2000, 9000, 100),
        choice('surface', 'grass', 'clay', 'hybrid'),
        amount('rent', 'cost', 50, 700, 10),
      ),
      count=(5, 7),
      names=(('Mill', 'Abbey', 'Quarry', 'Moor'), ('Park', 'Road', 'Arena')),
    ),
    Table(
      name='referee',
      plural='referees',
      columns=(
        number('grade', 'grade', 1, 9),
        amount('fee', 'cost', 40, 320, 5),
        choice('home_division', 'north', 'south', 'islands'),
      ),
      count=(6, 8),
      names=PEOPLE,
    ),
  ),
  relations=(
    Relation(
      name='rivalry',
      first='team',
      second='team',
      columns=(number('tension', 'tension', 0, 100),),
      says='rivalry',
    ),
  ),
  given=Field(name='round', table='round', says='rounds'),
  fields=(
    Field(name='home', table='team', says='home team'),
    Field(name='away', table='team', says='away team'),
    Field(name='ground', table='ground', says='ground'),
    Field(name='referee', table='referee', says='referee'),
  ),
  rows=(3, 5),
  base=(
    Distinct(fields=('home', 'away')),
    least('ground', 'capacity', 'home', 'followers'),
    Compare(
      first='referee',
      first_column='home_division',
      op='!=',
      second='home',
      second_column='division',
    ),
    Distinct(fields=('referee',)),
    Distinct(fields=('ground',)),
  ),
  openings=(
    'Draw up the fixtures of {rows} rounds, one match each.',
    'The cup has {rows} matches to arrange.',
    'Arrange {rows} matches of the league.',
  ),
  branch=('ground', 'rent'),
)

SOFTWARE_RELEASES = Domain(
  name='software_releases',
  tables=(
    Table(
      name='component',
      plural='components',
      columns=(
        number('importance', 'importance', 1, 9),
        choice('owner', 'core', 'web', 'data'),
      ),
      count=(6, 7),
      names=(
        ('auth', 'cart', 'feed', 'mail'),
        ('service', 'worker', 'gateway'),
      ),
    ),
    Table(
      name='version',
      plural='versions',
      parent='component',
      columns=(
        amount('memory', 'memory', 64, 1024, 16),
        number('age', 'age in days', 1, 400),
        choice('channel', 'stable', 'beta', 'nightly'),
        number('defects', 'known defects', 0, 25),
      ),
      count=(6, 9),
      names=(
        ('v1', 'v2', 'v3', 'v4', 'v5', 'v6', 'v7'),
        tuple(f'build{n}' for n in range(20, 60)),
      ),
    ),
    Table(
      name='runtime',
      plural='runtimes',
      columns=(
        amount('overhead', 'memory', 16, 300, 4),
        choice('language', 'Go', 'Java', 'Python', 'Rust'),
        number('support', 'months of support', 1, 48),
      ),
      count=(8, 10),
      names=(('Base', 'Slim', 'Full'), ('Alpha', 'Beacon', 'Cirrus', 'Dune')),
    ),
    Table(
      name='host',
      plural='hosts',
      columns=(
        number('cores', 'cores', 2, 64, 2),
        amount('rate', 'price', 5, 140),
        choice('site', 'Oslo', 'Lima', 'Pune'),
      ),
      count=(9, 12),
      names=(('rack', 'blade', 'node'), tuple(str(n) for n in range(11, 40))),
    ),
  ),
  relations=(
    Relation(
      name='compatibility',
      first='version',
      second='runtime',
      columns=(
        choice('status', 'tested', 'assumed', 'broken', 'patched'),
        number('startup', 'seconds to start', 1, 60),
      ),
      says='compatibility',
    ),
    Relation(
      name='link',
      first='host',
      second='host',
      columns=(number('latency', 'latency', 1, 90),),
      says='link',
    ),
  ),
  given=Field(name='component', table='component', says='components'),
  fields=(
    Field(name='version', table='version', says='version'),
    Field(name='runtime', table='runtime', says='runtime'),
    Field(name='host', table='host', says='host'),
  ),
  rows=(4, 5),
  base=(
    within('version', 'component'),
    Listed(
      relation='compatibility',
      first='version',
      second='runtime',
      column='status',
      op='!=',
      value='broken',
    ),
    Distinct(fields=('host',)),
  ),
  openings=(
    'Choose what to release of {rows} components, and where it runs.',
    'A release bundles {rows} components.',
    'Roll out {rows} components.',
  ),
  branch=('version', 'memory'),
)
