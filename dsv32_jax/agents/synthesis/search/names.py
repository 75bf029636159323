"""Invented names, each only once."""

import random
from collections.abc import Callable

_ONSETS = (
  'b br d dr f g gr h j k kl l m n p pr qu r s sk st t tr v w z th sh'.split()
)
_VOWELS = 'a e i o u ae ei ia ou y'.split()
_CODAS = 'l n r s m th nd rk st v x lm ng rn sk'.split()
_GIVEN_ENDS = 'a o ek in is ara iel une'.split()
_LAST_ENDS = 'er ov ani ström quist wick ley ano ette ham'.split()
_CITY_ENDS = 'burg ford ville mouth stad holm dale grad haven wick'.split()
_ADJECTIVES = (
  'Amber Bitter Broken Crooked Distant Drowned Early Empty Faithful Forgotten '
  'Frozen Gilded Glass Green Hidden Hollow Iron Last Lonely Long Narrow Paper '
  'Patient Quiet Restless Salt Second Silent Silver Sleeping Slow Stolen '
  'Thirsty Unsent Velvet Wandering White Winter Wooden Yellow'
).split()
_NOUNS = (
  'Almanac Anchor Apprentice Archive Bell Bridegroom Candle Carpenter Chapel '
  'Clock Compass Cousin Daughter Door Ferry Fiddler Garden Gardener Guest '
  'Harbour Harvest Heron House Key Ladder Lamp Ledger Letter Lighthouse Mill '
  'Mirror Morning Orchard Passenger Piano Quarry Regiment River Road Room '
  'Sailor Season Shepherd Shoemaker Staircase Stranger Summer Tailor Tenant '
  'Tide Tower Traveller Umbrella Visitor Wall Well Widow Window Witness Year'
).split()
_PLACES = (
  'the Attic, Ashes, the North, the Valley, Glass, the Island, Ink, the Marsh, '
  'Midnight, the Border, Snow, the Province, the Market, Dust, the Coast'
).split(', ')


class Names:
  """Draws names that have not been drawn before."""

  def __init__(self, rng: random.Random):
    self._rng = rng
    self._taken: set[str] = set()
    self._given = [self._word(1) for _ in range(90)]

  def draw(self, kind: str) -> str:
    """A name of an entity of type `kind`."""
    while True:
      name = self._one(kind)
      # Case aside: answers are compared without it.
      if name.casefold() not in self._taken:
        self._taken.add(name.casefold())
        return name

  def _one(self, kind: str) -> str:
    choose = self._rng.choice
    if kind == 'person':
      given = choose(self._given) + choose(_GIVEN_ENDS)
      return f'{given} {self._word(1)}{choose(_LAST_ENDS)}'
    if kind == 'city':
      return self._word(1) + choose(_CITY_ENDS)
    if kind in ('book', 'play', 'painting'):
      name = f'The {choose(_ADJECTIVES)} {choose(_NOUNS)}'
      if self._rng.random() < 0.5:
        name += f' {choose(("of", "from", "in"))} {choose(_PLACES)}'
      return name
    return _PATTERNS[kind](self._word(2), choose)

  def _word(self, num_syllables: int) -> str:
    choose = self._rng.choice
    parts = [choose(_ONSETS) + choose(_VOWELS) for _ in range(num_syllables)]
    return ''.join(parts).capitalize() + choose(_CODAS)


def _ending(*endings: str) -> Callable[[str, Callable], str]:
  return lambda stem, choose: f'{stem} {choose(endings)}'


_PATTERNS: dict[str, Callable[[str, Callable], str]] = {
  'country': lambda stem, choose: stem + choose(('ia', 'land', 'mark')),
  'river': lambda stem, choose: stem,
  'ship': lambda stem, choose: stem + choose(('a', 'us', 'ine')),
  'language': lambda stem, choose: stem + choose(('ish', 'ic', 'ese')),
  'mountain': lambda stem, choose: f'{choose(("Mount", "Monte"))} {stem}',
  'lake': lambda stem, choose: f'Lake {stem}',
  'company': _ending('& Sons', 'Works', 'Brothers', 'Manufactory', 'Trading'),
  'university': _ending('University', 'College', 'Academy', 'Institute'),
  'award': _ending('Medal', 'Prize', 'Ribbon', 'Cup'),
  'museum': _ending('Museum', 'Gallery', 'Collection', 'Rooms'),
  'bridge': _ending('Bridge', 'Viaduct', 'Span'),
  'newspaper': _ending('Courier', 'Herald', 'Gazette', 'Observer', 'Post'),
  'festival': _ending('Days', 'Fair', 'Week', 'Nights'),
  'theatre': _ending('Theatre', 'Stage', 'Playhouse', 'Hall'),
  'expedition': _ending('Expedition', 'Voyage', 'Venture'),
}
