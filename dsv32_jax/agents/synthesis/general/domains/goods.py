"""Domains that move and hand out things."""

from dsv32_jax.agents.synthesis.general.constraints import (
  Compare,
  Distinct,
)
from dsv32_jax.agents.synthesis.general.domains.parts import (
  amount,
  choice,
  least,
  number,
  same,
  within,
)
from dsv32_jax.agents.synthesis.general.domains.schedules import PEOPLE
from dsv32_jax.agents.synthesis.general.schema import (
  Domain,
  Field,
  Relation,
  Table,
)

_ZONES = ('harbour', 'hills', 'centre', 'airport')
_GENRES = ('crime', 'poetry', 'travel', 'science')

WAREHOUSE_ORDERS = Domain(
  name='warehouse_orders',
  tables=(
    Table(
      name='order',
      plural='orders',
      columns=(number('quantity', 'quantity', 5, 60), choice('zone', *_ZONES)),
      count=(10, 14),
      names=(
        ('Order', 'Reorder', 'Rush'),
        tuple(str(n) for n in range(310, 340)),
      ),
    ),
    Table(
      name='warehouse',
      plural='warehouses',
      columns=(
        choice('climate', 'dry', 'cooled', 'frozen'),
        amount('handling', 'cost', 10, 90),
      ),
      count=(4, 6),
      names=(('Dock', 'Mill', 'Quay', 'Canal'), ('Depot', 'Store', 'Shed')),
    ),
    Table(
      name='bin',
      plural='bins',
      parent='warehouse',
      columns=(
        number('stock', 'stock', 40, 120),
        number('aisle', 'aisle', 1, 20),
        amount('value', 'cost', 30, 300),
      ),
      count=(5, 6),
      names=(tuple('ABCDEFGH'), tuple(str(n) for n in range(10, 60))),
    ),
    Table(
      name='carrier',
      plural='carriers',
      columns=(
        choice('zone', *_ZONES),
        amount('fare', 'cost', 15, 160),
        number('days', 'days', 1, 9),
        choice('vehicle', 'van', 'bicycle', 'boat', 'lorry'),
      ),
      count=(18, 22),
      names=(
        ('Swift', 'Polar', 'Delta', 'Union', 'Comet'),
        ('Cargo', 'Freight', 'Post', 'Line'),
      ),
    ),
  ),
  relations=(
    Relation(
      name='pickup',
      first='warehouse',
      second='carrier',
      columns=(
        number('hour', 'hour', 6, 20),
        choice('gate', 'front', 'rear', 'rail'),
      ),
      says='pickup',
    ),
  ),
  given=Field(name='order', table='order', says='orders'),
  fields=(
    Field(name='warehouse', table='warehouse', says='warehouse'),
    Field(name='bin', table='bin', says='bin'),
    Field(name='carrier', table='carrier', says='carrier'),
  ),
  rows=(4, 5),
  base=(
    within('bin', 'warehouse'),
    least('bin', 'stock', 'order', 'quantity'),
    same('carrier', 'order', 'zone'),
    Distinct(fields=('bin',)),
    Distinct(fields=('carrier',)),
  ),
  openings=(
    'Decide how {rows} orders leave the warehouses.',
    'Pick a bin and a carrier for each of {rows} orders.',
    'Dispatch {rows} orders.',
  ),
  branch=('bin', 'value'),
)

LIBRARY_LOANS = Domain(
  name='library_loans',
  tables=(
    Table(
      name='reader',
      plural='readers',
      columns=(number('level', 'level', 1, 6), choice('taste', *_GENRES)),
      count=(8, 12),
      names=PEOPLE,
    ),
    Table(
      name='branch',
      plural='branches',
      columns=(
        choice('quarter', 'old town', 'station', 'campus'),
        number('shelves', 'shelves', 20, 90),
      ),
      count=(4, 5),
      names=(
        ('Park', 'Mill', 'Lake', 'Castle', 'Bridge'),
        ('Library', 'Branch'),
      ),
    ),
    Table(
      name='book',
      plural='books',
      parent='branch',
      columns=(
        choice('genre', *_GENRES),
        amount('pages', 'pages', 90, 800),
        number('year', 'year', 1950, 2024),
        choice('binding', 'cloth', 'paper', 'leather'),
      ),
      count=(12, 15),
      names=(
        (
          'A Winter',
          'The Lost',
          'Seven',
          'Under the',
          'Letters to',
          'Beyond the',
          'The Last',
          'Notes on',
        ),
        (
          'Orchard',
          'Bridges',
          'Island',
          'Stars',
          'Clockmaker',
          'Rivers',
          'Harbour',
          'Salt',
          'Atlas',
        ),
      ),
    ),
    Table(
      name='desk',
      plural='desks',
      columns=(
        number('queue', 'queue', 0, 12),
        amount('opening', 'minutes', 5, 60),
        choice('clerk', 'Ana', 'Bo', 'Cy'),
      ),
      count=(6, 8),
      names=(('Desk', 'Counter', 'Hatch'), tuple('12345')),
    ),
  ),
  given=Field(name='reader', table='reader', says='readers'),
  fields=(
    Field(name='branch', table='branch', says='branch'),
    Field(name='book', table='book', says='book'),
    Field(name='second_book', table='book', says='second book'),
    Field(name='desk', table='desk', says='desk'),
  ),
  rows=(3, 4),
  base=(
    within('book', 'branch'),
    within('second_book', 'branch'),
    same('book', 'reader', 'genre', 'taste'),
    Compare(
      first='second_book',
      first_column='genre',
      op='!=',
      second='book',
      second_column='genre',
    ),
    Distinct(fields=('book', 'second_book')),
  ),
  openings=(
    'Lend two books to each of {rows} readers.',
    '{rows} readers come to the library; choose their loans.',
    'Set aside a pair of books for {rows} people.',
  ),
  branch=('book', 'year'),
)

FLEET_ROUTING = Domain(
  name='fleet_routing',
  tables=(
    Table(
      name='stage',
      plural='stages',
      columns=(number('load', 'load', 1, 8),),
      count=(5, 6),
      names=(('first', 'second', 'third', 'fourth', 'fifth', 'sixth'), ()),
    ),
    Table(
      name='town',
      plural='towns',
      columns=(
        amount('toll', 'cost', 5, 80),
        choice('road', 'motorway', 'country road', 'mountain pass'),
        number('demand', 'demand', 1, 40),
      ),
      count=(9, 10),
      names=(('places',), ()),
    ),
    Table(
      name='truck',
      plural='trucks',
      columns=(
        number('capacity', 'capacity', 4, 20),
        amount('hire', 'cost', 80, 400, 5),
        choice('fuel', 'diesel', 'electric', 'gas'),
      ),
      count=(9, 12),
      names=(
        ('Red', 'Blue', 'Green', 'White', 'Black'),
        ('Ox', 'Heron', 'Badger', 'Lynx'),
      ),
    ),
    Table(
      name='driver',
      plural='drivers',
      columns=(
        amount('wage', 'cost', 60, 220),
        number('hours', 'hours', 4, 12),
        choice('licence', 'C', 'C1', 'CE'),
      ),
      count=(10, 12),
      names=PEOPLE,
    ),
  ),
  relations=(
    Relation(
      name='road_between',
      first='town',
      second='town',
      columns=(
        number('km', 'km', 110, 135),
        number('minutes', 'minutes', 80, 140),
      ),
      says='road',
      kind='distance',
    ),
    Relation(
      name='permit',
      first='driver',
      second='truck',
      columns=(choice('state', 'valid', 'expired', 'provisional', 'renewed'),),
      says='permit',
    ),
  ),
  given=Field(name='stage', table='stage', says='stages of the route'),
  fields=(
    Field(name='town', table='town', says='town'),
    Field(name='truck', table='truck', says='truck'),
    Field(name='driver', table='driver', says='driver'),
  ),
  rows=(4, 5),
  base=(
    least('truck', 'capacity', 'stage', 'load'),
    Distinct(fields=('town',)),
    Distinct(fields=('truck',)),
    Distinct(fields=('driver',)),
  ),
  openings=(
    'Route a delivery over {rows} stages.',
    'A load goes through {rows} towns, with a new truck and driver each time.',
    'Plan the relay of a freight in {rows} stages.',
  ),
  branch=('truck', 'hire'),
)

INSURANCE_CLAIMS = Domain(
  name='insurance_claims',
  tables=(
    Table(
      name='claim',
      plural='claims',
      columns=(
        number('damage', 'damage', 200, 5000, 50),
        choice('cause', 'fire', 'water', 'theft', 'storm'),
      ),
      count=(10, 14),
      names=(('Claim', 'File'), tuple(str(n) for n in range(7100, 7130))),
    ),
    Table(
      name='region',
      plural='regions',
      columns=(
        choice('office', 'branch', 'agency'),
        number('backlog', 'backlog', 0, 40),
      ),
      count=(4, 5),
      names=(
        ('Upper', 'Lower', 'Outer', 'Inner'),
        ('Valley', 'Coast', 'Plain'),
      ),
    ),
    Table(
      name='workshop',
      plural='workshops',
      parent='region',
      columns=(
        amount('estimate', 'cost', 150, 2400, 10),
        number('wait', 'days of wait', 1, 30),
        choice('guarantee', 'none', 'one year', 'five years'),
      ),
      count=(4, 6),
      names=(
        ('Bolt', 'Forge', 'Anvil', 'Spark', 'Plumb'),
        ('Repairs', 'Works', 'Brothers'),
      ),
    ),
    Table(
      name='adjuster',
      plural='adjusters',
      columns=(
        number('limit', 'limit', 4000, 9000, 100),
        choice('field', 'fire', 'water', 'theft', 'storm'),
        amount('fee', 'cost', 90, 500, 5),
      ),
      count=(16, 20),
      names=PEOPLE,
    ),
  ),
  relations=(
    Relation(
      name='travel',
      first='adjuster',
      second='region',
      columns=(
        number('hours', 'hours', 1, 12),
        choice('means', 'car', 'train', 'ferry'),
      ),
      says='travel',
    ),
  ),
  given=Field(name='claim', table='claim', says='claims'),
  fields=(
    Field(name='region', table='region', says='region'),
    Field(name='workshop', table='workshop', says='workshop'),
    Field(name='adjuster', table='adjuster', says='adjuster'),
  ),
  rows=(4, 5),
  base=(
    within('workshop', 'region'),
    least('adjuster', 'limit', 'claim', 'damage'),
    same('adjuster', 'claim', 'field', 'cause'),
    Distinct(fields=('workshop',)),
    Distinct(fields=('adjuster',)),
  ),
  openings=(
    'Settle {rows} claims.',
    'Assign {rows} claims to adjusters and workshops.',
    'For {rows} insurance claims choose who looks and who repairs.',
  ),
  branch=('workshop', 'estimate'),
)
