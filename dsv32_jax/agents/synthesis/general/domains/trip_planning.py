"""Trips: the paper's example (arXiv:2512.02556, section 3.2)."""

from dsv32_jax.agents.synthesis.general.constraints import Compare, Distinct
from dsv32_jax.agents.synthesis.general.schema import (
  Column,
  Domain,
  Field,
  Relation,
  Table,
)

_RATING = Column(name='rating', says='rating out of 50', low=28, high=50)
_DATES = tuple(f'2025-10-{day:02d}' for day in range(1, 13))

TRIP_PLANNING = Domain(
  name='trip_planning',
  tables=(
    Table(
      name='date',
      plural='dates',
      columns=(),
      count=(7, 12),
      names=(_DATES, ()),
    ),
    Table(
      name='city',
      plural='cities',
      columns=(
        Column(
          name='setting',
          says='setting',
          options=('lakeside', 'riverside', 'coastal', 'hilly'),
        ),
        Column(
          name='transit_pass',
          says='price',
          low=6,
          high=40,
          step=2,
          is_summed=True,
        ),
      ),
      count=(6, 8),
      names=(('places',), ()),
    ),
    Table(
      name='hotel',
      plural='hotels',
      parent='city',
      columns=(
        Column(
          name='price',
          says='price',
          low=220,
          high=1180,
          step=10,
          is_summed=True,
        ),
        _RATING,
        Column(
          name='style', says='style', options=('boutique', 'business', 'garden')
        ),
      ),
      count=(3, 5),
      names=(
        ('Willow', 'Jade', 'Harbour', 'Linden', 'Silver', 'Maple', 'Old Gate'),
        ('Hotel', 'Inn', 'House', 'Residence', 'Lodge', 'Court'),
      ),
    ),
    Table(
      name='restaurant',
      plural='restaurants',
      parent='city',
      columns=(
        Column(
          name='price', says='price', low=40, high=320, step=5, is_summed=True
        ),
        _RATING,
        Column(
          name='cuisine',
          says='cuisine',
          options=('noodles', 'seafood', 'grill', 'vegetarian', 'bakery'),
        ),
      ),
      count=(4, 6),
      names=(
        ('Copper', 'Lotus', 'Corner', 'Garden', 'Blue', 'Lantern', 'River'),
        ('Kitchen', 'Table', 'Bistro', 'Canteen', 'Spoon', 'Terrace', 'Oven'),
      ),
    ),
    Table(
      name='attraction',
      plural='attractions',
      parent='city',
      columns=(
        Column(
          name='ticket', says='price', low=0, high=240, step=5, is_summed=True
        ),
        _RATING,
        Column(
          name='kind',
          says='kind',
          options=('museum', 'temple', 'park', 'tower'),
        ),
      ),
      count=(3, 5),
      names=(
        ('Crane', 'Pearl', 'Bamboo', 'Castle', 'Northern', 'Cloud', 'Stone'),
        ('Museum', 'Garden', 'Pavilion', 'Tower', 'Bridge', 'Gallery', 'Park'),
      ),
    ),
  ),
  relations=(
    Relation(
      name='weather_by_city_date',
      first='city',
      second='date',
      columns=(
        Column(
          name='sky', says='sky', options=('clear', 'cloudy', 'rain', 'fog')
        ),
        Column(name='temperature', says='temperature', low=8, high=29),
      ),
      says='weather',
    ),
    Relation(
      name='inter_city_transport',
      first='city',
      second='city',
      columns=(
        Column(name='distance_km', says='distance in km', low=100, high=100),
        Column(name='train_price', says='train price', low=30, high=60),
      ),
      says='transport',
      kind='distance',
    ),
  ),
  given=Field(name='date', table='date', says='dates'),
  fields=(
    Field(name='city', table='city', says='city'),
    Field(name='hotel', table='hotel', says='hotel'),
    Field(
      name='afternoon_restaurant',
      table='restaurant',
      says='afternoon restaurant',
    ),
    Field(
      name='afternoon_attraction',
      table='attraction',
      says='afternoon attraction',
    ),
    Field(
      name='evening_restaurant', table='restaurant', says='evening restaurant'
    ),
  ),
  base=(
    *(
      Compare(
        first=field,
        first_column='city',
        op='==',
        second='city',
        second_column='name',
      )
      for field in (
        'hotel',
        'afternoon_restaurant',
        'afternoon_attraction',
        'evening_restaurant',
      )
    ),
    Distinct(fields=('city',)),
    Distinct(fields=('afternoon_restaurant', 'evening_restaurant')),
  ),
  openings=(
    'Plan a trip of {rows} days.',
    'I have {rows} days off and want to see a different city on each.',
    'Help me put together a {rows}-day journey with a stay in every city.',
  ),
  branch=('hotel', 'price'),
)
