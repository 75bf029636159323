"""Domains of food: a feast that is ordered, a week that is cooked."""

from dsv32_jax.agents.synthesis.general.constraints import Compare, Distinct
from dsv32_jax.agents.synthesis.general.domains.parts import (
  amount,
  choice,
  least,
  number,
  same,
  within,
)
from dsv32_jax.agents.synthesis.general.schema import (
  Domain,
  Field,
  Relation,
  Table,
)

_COURSES = ('starter', 'soup', 'main', 'dessert')
_DAYS = (
  'Monday',
  'Tuesday',
  'Wednesday',
  'Thursday',
  'Friday',
  'Saturday',
  'Sunday',
)

EVENT_CATERING = Domain(
  name='event_catering',
  tables=(
    Table(
      name='table_group',
      plural='table_groups',
      columns=(
        number('guests', 'guests', 4, 30),
        choice('wish', 'halal', 'vegan', 'fish', 'any'),
      ),
      count=(6, 9),
      names=(
        ('Family', 'Friends', 'Office', 'Choir', 'Club'),
        ('North', 'South', 'Window', 'Garden', 'Stage'),
      ),
    ),
    Table(
      name='supplier',
      plural='suppliers',
      columns=(
        number('kitchens', 'kitchens', 1, 6),
        amount('delivery', 'price', 10, 120, 5),
      ),
      count=(4, 6),
      names=(('Basil', 'Clove', 'Sage', 'Fennel'), ('Caterers', 'Feasts')),
    ),
    Table(
      name='dish',
      plural='dishes',
      parent='supplier',
      columns=(
        choice('diet', 'halal', 'vegan', 'fish', 'any'),
        amount('price', 'price', 8, 95),
        number('portions', 'portions', 30, 80),
        number('heat', 'heat', 0, 5),
      ),
      count=(9, 12),
      names=(
        ('Baked', 'Grilled', 'Stuffed', 'Smoked', 'Braised', 'Pickled'),
        ('Aubergine', 'Trout', 'Dumplings', 'Lentils', 'Chicken', 'Squash'),
      ),
    ),
    Table(
      name='drink',
      plural='drinks',
      columns=(
        amount('price', 'price', 3, 60),
        choice('base', 'grape', 'apple', 'tea', 'milk'),
        number('sugar', 'sugar', 0, 40),
      ),
      count=(9, 12),
      names=(
        ('Cold', 'Warm', 'Spiced', 'Dry'),
        ('Cup', 'Brew', 'Fizz', 'Cider'),
      ),
    ),
    Table(
      name='waiter',
      plural='waiters',
      columns=(
        amount('tariff', 'price', 40, 160, 5),
        choice('shift', 'early', 'late', 'split'),
      ),
      count=(8, 10),
      names=(
        ('Amir', 'Bea', 'Carl', 'Dina'),
        ('Quick', 'Stone', 'Vale', 'West'),
      ),
    ),
  ),
  relations=(
    Relation(
      name='pairing',
      first='dish',
      second='drink',
      columns=(choice('verdict', 'fine', 'great', 'bland', 'clash', 'odd'),),
      says='pairing',
    ),
  ),
  given=Field(name='table_group', table='table_group', says='tables'),
  fields=(
    Field(name='supplier', table='supplier', says='supplier'),
    Field(name='dish', table='dish', says='dish'),
    Field(name='drink', table='drink', says='drink'),
    Field(name='waiter', table='waiter', says='waiter'),
  ),
  rows=(3, 5),
  base=(
    within('dish', 'supplier'),
    same('dish', 'table_group', 'diet', 'wish'),
    least('dish', 'portions', 'table_group', 'guests'),
    Distinct(fields=('dish',)),
    Distinct(fields=('waiter',)),
  ),
  openings=(
    'Order a dish, a drink and a waiter for {rows} tables.',
    'A feast with {rows} tables is to be catered.',
    'Cater for {rows} tables.',
  ),
  branch=('dish', 'price'),
)

RECIPE_PLANNING = Domain(
  name='recipe_planning',
  tables=(
    Table(
      name='day',
      plural='days',
      columns=(),
      count=(7, 7),
      names=(_DAYS, ()),
    ),
    Table(
      name='recipe',
      plural='recipes',
      columns=(
        amount('energy', 'energy', 150, 900, 5),
        amount('minutes', 'cooking time', 10, 120, 5),
        choice('course', *_COURSES),
        choice('season', 'spring', 'summer', 'autumn', 'winter'),
      ),
      count=(26, 34),
      names=(
        ('Creamy', 'Roast', 'Spicy', 'Sweet', 'Rustic', 'Fresh', 'Crisp'),
        ('Leeks', 'Noodles', 'Beans', 'Plums', 'Salmon', 'Barley', 'Beets'),
      ),
    ),
    Table(
      name='market',
      plural='markets',
      columns=(
        number('stalls', 'stalls', 5, 60),
        amount('walk', 'cooking time', 5, 40),
        choice('side', 'left bank', 'right bank'),
      ),
      count=(5, 7),
      names=(('Corn', 'Fish', 'Flower', 'Hay'), ('Market', 'Square', 'Arcade')),
    ),
  ),
  relations=(
    Relation(
      name='market_on_day',
      first='market',
      second='day',
      columns=(choice('state', 'open', 'closed', 'half open', 'festive'),),
      says='opening',
    ),
  ),
  given=Field(name='day', table='day', says='days'),
  fields=(
    Field(name='lunch', table='recipe', says='lunch'),
    Field(name='dinner', table='recipe', says='dinner'),
    Field(name='market', table='market', says='market'),
  ),
  rows=(4, 6),
  base=(
    Distinct(fields=('lunch', 'dinner')),
    Compare(
      first='lunch',
      first_column='course',
      op='!=',
      second='dinner',
      second_column='course',
    ),
  ),
  openings=(
    'Plan what to cook on {rows} days.',
    'Write a menu of lunch and dinner for {rows} days.',
    '{rows} days need a lunch, a dinner and a market to shop at.',
  ),
  branch=('lunch', 'energy'),
)
