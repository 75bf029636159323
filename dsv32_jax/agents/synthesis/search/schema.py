"""What can be said in a search world: types of entities and their relations.

A relation gives an entity of its subject type at most one value. `says` are
predicates with {} for the value; documents and questions share them, each with
draws of its own. `roles` name the value from the subject: 'the ROLE of X'.
"""

import dataclasses
from typing import Literal

Kind = Literal['entity', 'year', 'number', 'word']


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntityType:
  """A type of entity.

  Attributes:
    key: in plans.
    nouns: what one is called; the first is that of documents.
    share: how many of a thousand entities.
    who: the relative pronoun.
  """

  key: str
  nouns: tuple[str, ...]
  share: int
  who: str = 'that'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
  """What may be said of an entity.

  Attributes:
    key: 'subject.name'.
    subject: type of the entity.
    kind: of the value.
    object: type of the value, if it is an entity.
    says: predicates with {} for the value.
    roles: what the value is to the subject; only of entities.
    low: the least number or year.
    high: the greatest.
    maker: for a year, the relation of the subject to a person of whose adult
      life it is a part.
    words: that a word is drawn from.
  """

  key: str
  subject: str
  kind: Kind
  says: tuple[str, ...]
  object: str = ''
  roles: tuple[str, ...] = ()
  low: int = 0
  high: int = 0
  maker: str = ''
  words: tuple[str, ...] = ()


def _type(key: str, share: int, *nouns: str, who: str = 'that') -> EntityType:
  return EntityType(key=key, nouns=nouns or (key,), share=share, who=who)


TYPES = {
  kind.key: kind
  for kind in (
    _type('person', 250, 'person', 'individual', who='who'),
    _type('city', 85, 'city', 'town'),
    _type('country', 14, 'country', 'state'),
    _type('river', 40, 'river', 'waterway'),
    _type('mountain', 40, 'mountain', 'peak'),
    _type('lake', 30, 'lake', 'body of water'),
    _type('company', 70, 'company', 'firm', 'business'),
    _type('university', 35, 'university', 'school of higher learning'),
    _type('book', 80, 'book', 'volume'),
    _type('play', 50, 'play', 'stage work'),
    _type('award', 30, 'award', 'prize'),
    _type('museum', 40, 'museum', 'public collection'),
    _type('bridge', 35, 'bridge', 'crossing'),
    _type('ship', 45, 'ship', 'vessel'),
    _type('newspaper', 30, 'newspaper', 'paper'),
    _type('festival', 30, 'festival', 'yearly celebration'),
    _type('theatre', 35, 'theatre', 'playhouse'),
    _type('expedition', 35, 'expedition', 'voyage of discovery'),
    _type('painting', 50, 'painting', 'canvas'),
    _type('language', 22, 'language', 'tongue'),
  )
}


def _to(key: str, object_: str, says: tuple[str, ...], *roles: str) -> Relation:
  return Relation(
    key=key,
    subject=key.split('.')[0],
    kind='entity',
    object=object_,
    says=says,
    roles=roles,
  )


def _year(
  key: str, low: int, high: int, *says: str, maker: str = ''
) -> Relation:
  return Relation(
    key=key,
    subject=key.split('.')[0],
    kind='year',
    low=low,
    high=high,
    says=says,
    maker=maker,
  )


def _number(key: str, low: int, high: int, *says: str) -> Relation:
  return Relation(
    key=key,
    subject=key.split('.')[0],
    kind='number',
    low=low,
    high=high,
    says=says,
  )


def _word(key: str, words: str, *says: str) -> Relation:
  return Relation(
    key=key,
    subject=key.split('.')[0],
    kind='word',
    words=tuple(words.split(', ')),
    says=says,
  )


_RELATIONS = (
  _to(
    'person.born_in',
    'city',
    ('was born in {}', 'came into the world in {}', 'is a native of {}'),
    'birthplace',
    'native town',
  ),
  _year(
    'person.birth_year',
    1780,
    1950,
    'was born {}',
    'saw the light of day {}',
    'came into life {}',
  ),
  _to(
    'person.studied_at',
    'university',
    ('studied at {}', 'took a degree at {}', 'received an education at {}'),
    'alma mater',
    'place of study',
  ),
  _to(
    'person.taught_by',
    'person',
    ('was taught by {}', 'learned the trade from {}', 'was a pupil of {}'),
    'teacher',
    'mentor',
  ),
  _to(
    'person.died_in',
    'city',
    ('passed away in {}', 'died in {}', 'spent the last days in {}'),
    'place of death',
    'last home',
  ),
  _to(
    'person.award',
    'award',
    ('won {}', 'was honoured with {}', 'is a laureate of {}'),
    'honour',
    'most noted distinction',
  ),
  _to(
    'person.employer',
    'company',
    ('was employed by {}', 'worked for {}', 'drew a salary from {}'),
    'employer',
    'workplace',
  ),
  _word(
    'person.profession',
    'botanist, surveyor, clockmaker, poet, engraver, chemist, astronomer, '
    'printer, glassblower, geologist, translator, engineer, historian, '
    'physician, cartographer, linguist',
    'was a {} by profession',
    'earned a living as a {}',
    'was known to neighbours as a {}',
  ),
  _to(
    'city.country',
    'country',
    ('belongs to {}', 'is part of {}', 'lies within the borders of {}'),
    'home country',
    'state',
  ),
  _to(
    'city.river',
    'river',
    ('lies on {}', 'stands on the banks of {}', 'grew up along {}'),
    'river',
    'waterway',
  ),
  _to(
    'city.twin',
    'city',
    ('is twinned with {}', 'keeps a partnership with {}', 'is paired with {}'),
    'twin town',
    'partner city',
  ),
  _to(
    'city.planner',
    'person',
    (
      'was laid out by {}',
      'owes its street plan to {}',
      'was drawn up by {}',
    ),
    'planner',
    'author of the street plan',
  ),
  _number(
    'city.population',
    2_000,
    900_000,
    'has {} inhabitants',
    'is home to {} people',
    'counts {} residents',
  ),
  _year(
    'city.charter',
    1100,
    1850,
    'received its charter {}',
    'became a town {}',
    'got its market rights {}',
  ),
  _to(
    'country.head',
    'person',
    ('was first governed by {}', 'was led into being by {}'),
    'first head of state',
    'founding statesman',
  ),
  _year(
    'country.independent',
    1810,
    1990,
    'became independent {}',
    'declared itself a republic {}',
  ),
  _number(
    'country.area',
    900,
    800_000,
    'has an area of {} square kilometres',
    'extends over {} square kilometres',
  ),
  _to(
    'river.source',
    'mountain',
    ('rises on {}', 'has its source on {}', 'springs from the slopes of {}'),
    'source',
    'place of origin',
  ),
  _to(
    'river.mouth',
    'lake',
    ('flows into {}', 'ends in {}', 'empties into {}'),
    'mouth',
    'final destination',
  ),
  _number(
    'river.length',
    20,
    2_400,
    'runs for {} kilometres',
    'is {} kilometres long',
    'measures {} kilometres from end to end',
  ),
  _to(
    'river.mapped_by',
    'person',
    ('was first mapped by {}', 'was charted by {}', 'was surveyed by {}'),
    'first surveyor',
    'cartographer',
  ),
  _to(
    'mountain.country',
    'country',
    ('stands in {}', 'rises in {}', 'is found in {}'),
    'country',
    'state',
  ),
  _number(
    'mountain.height',
    600,
    7_900,
    'is {} metres high',
    'reaches {} metres',
    'rises to {} metres above the sea',
  ),
  _to(
    'mountain.climber',
    'person',
    ('was first climbed by {}', 'was conquered by {}', 'fell first to {}'),
    'first climber',
    'conqueror',
  ),
  _word(
    'mountain.rock',
    'granite, basalt, limestone, gneiss, slate, sandstone, dolomite, marble',
    'is made of {}',
    'consists mostly of {}',
    'is a mass of {}',
  ),
  _number(
    'lake.area',
    2,
    3_000,
    'covers {} square kilometres',
    'spreads over {} square kilometres',
    'has a surface of {} square kilometres',
  ),
  _number(
    'lake.depth',
    5,
    900,
    'is {} metres deep',
    'goes down to {} metres',
    'has a greatest depth of {} metres',
  ),
  _to(
    'lake.country',
    'country',
    ('is located in {}', 'lies in {}', 'is counted among the waters of {}'),
    'country',
    'state',
  ),
  _to(
    'lake.named_after',
    'person',
    ('is named after {}', 'bears the name of {}', 'was called so for {}'),
    'namesake',
    'eponym',
  ),
  _to(
    'company.founder',
    'person',
    ('was founded by {}', 'was set up by {}', 'goes back to {}'),
    'founder',
    'first owner',
  ),
  _year(
    'company.founded',
    1800,
    2010,
    'was founded {}',
    'began trading {}',
    'opened its doors {}',
    maker='company.founder',
  ),
  _to(
    'company.seat',
    'city',
    ('is based in {}', 'has its head office in {}', 'is run from {}'),
    'seat',
    'headquarters',
  ),
  _word(
    'company.product',
    'lenses, clocks, paper, bells, rope, porcelain, locomotives, dyes, pianos, '
    'scales, lamps, carpets, pumps, typewriters, tiles, barometers',
    'makes {}',
    'is a maker of {}',
    'earns its money with {}',
  ),
  _to(
    'university.city',
    'city',
    ('is located in {}', 'has its campus in {}', 'teaches in {}'),
    'home city',
    'seat',
  ),
  _to(
    'university.founder',
    'person',
    ('was endowed by {}', 'was founded by {}', 'owes its existence to {}'),
    'founder',
    'first benefactor',
  ),
  _year(
    'university.founded',
    1800,
    2010,
    'was founded {}',
    'took its first students {}',
    'was chartered {}',
    maker='university.founder',
  ),
  _number(
    'university.students',
    400,
    48_000,
    'has {} students',
    'teaches {} students',
    'enrols {} students',
  ),
  _to(
    'book.author',
    'person',
    ('was written by {}', 'is the work of {}', 'came from the pen of {}'),
    'author',
    'writer',
  ),
  _year(
    'book.published',
    1800,
    2015,
    'was published {}',
    'first appeared {}',
    'came out {}',
    maker='book.author',
  ),
  _to(
    'book.publisher',
    'company',
    ('was published by {}', 'was brought out by {}', 'was printed by {}'),
    'publisher',
    'printing house',
  ),
  _to(
    'book.setting',
    'city',
    ('is set in {}', 'takes place in {}', 'plays out in {}'),
    'setting',
    'scene',
  ),
  _number(
    'book.pages',
    60,
    1_400,
    'has {} pages',
    'runs to {} pages',
    'fills {} pages',
  ),
  _to(
    'play.writer',
    'person',
    ('was penned by {}', 'was written by {}', 'is a drama by {}'),
    'playwright',
    'dramatist',
  ),
  _to(
    'play.theatre',
    'theatre',
    ('was first staged at {}', 'premiered at {}', 'had its first night at {}'),
    'place of the premiere',
    'first stage',
  ),
  _year(
    'play.staged',
    1800,
    2015,
    'was first performed {}',
    'reached the stage {}',
    'had its opening night {}',
    maker='play.writer',
  ),
  _number(
    'play.minutes',
    20,
    160,
    'takes {} minutes to perform',
    'lasts {} minutes',
    'keeps the audience for {} minutes',
  ),
  _to(
    'award.giver',
    'university',
    ('is given by {}', 'is handed out by {}', 'is administered by {}'),
    'giver',
    'awarding body',
  ),
  _to(
    'award.named_after',
    'person',
    ('is named after {}', 'keeps alive the memory of {}', 'honours {}'),
    'namesake',
    'eponym',
  ),
  _year(
    'award.first',
    1850,
    2012,
    'was first given {}',
    'was handed out for the first time {}',
    'was created {}',
  ),
  _number(
    'award.purse',
    500,
    200_000,
    'comes with a purse of {} crowns',
    'pays {} crowns',
    'is worth {} crowns',
  ),
  _to(
    'museum.city',
    'city',
    ('is located in {}', 'can be visited in {}', 'welcomes visitors in {}'),
    'home city',
    'location',
  ),
  _to(
    'museum.architect',
    'person',
    ('was designed by {}', 'was built to plans of {}', 'was drawn by {}'),
    'architect',
    'designer',
  ),
  _year(
    'museum.opened',
    1820,
    2012,
    'opened {}',
    'received its first visitors {}',
    'was inaugurated {}',
    maker='museum.architect',
  ),
  _number(
    'museum.objects',
    300,
    250_000,
    'holds {} objects',
    'keeps {} objects',
    'shows and stores {} objects',
  ),
  _to(
    'bridge.river',
    'river',
    ('crosses {}', 'spans {}', 'leads over {}'),
    'river',
    'crossed waterway',
  ),
  _to(
    'bridge.engineer',
    'person',
    ('was engineered by {}', 'was calculated by {}', 'was constructed by {}'),
    'engineer',
    'constructor',
  ),
  _year(
    'bridge.opened',
    1820,
    2012,
    'was opened to traffic {}',
    'was completed {}',
    'carried its first carts {}',
    maker='bridge.engineer',
  ),
  _number(
    'bridge.length',
    30,
    3_200,
    'is {} metres long',
    'measures {} metres',
    'stretches over {} metres',
  ),
  _to(
    'ship.builder',
    'company',
    ('was built by {}', 'was laid down by {}', 'came off the slips of {}'),
    'builder',
    'shipyard',
  ),
  _year(
    'ship.launched',
    1830,
    2015,
    'was launched {}',
    'first touched water {}',
    'was commissioned {}',
  ),
  _to(
    'ship.port',
    'city',
    ('has its home port in {}', 'sails out of {}', 'is registered in {}'),
    'home port',
    'port of registry',
  ),
  _number(
    'ship.tons',
    80,
    60_000,
    'displaces {} tons',
    'weighs {} tons',
    'was rated at {} tons',
  ),
  _to(
    'newspaper.city',
    'city',
    ('appears in {}', 'is printed in {}', 'reports from {}'),
    'home city',
    'place of publication',
  ),
  _to(
    'newspaper.editor',
    'person',
    ('was first edited by {}', 'was started by {}', 'was led at first by {}'),
    'first editor',
    'founding editor',
  ),
  _year(
    'newspaper.first',
    1810,
    2005,
    'first came out {}',
    'was launched {}',
    'printed its first issue {}',
    maker='newspaper.editor',
  ),
  _number(
    'newspaper.copies',
    1_000,
    400_000,
    'sells {} copies a day',
    'prints {} copies a day',
    'has a daily run of {} copies',
  ),
  _to(
    'festival.city',
    'city',
    ('takes place in {}', 'is held in {}', 'fills the streets of {}'),
    'home city',
    'venue',
  ),
  _to(
    'festival.honours',
    'person',
    ('celebrates {}', 'was created to honour {}', 'is dedicated to {}'),
    'patron',
    'celebrated figure',
  ),
  _year(
    'festival.first',
    1850,
    2012,
    'was first held {}',
    'began {}',
    'was started {}',
  ),
  _word(
    'festival.theme',
    'kites, lanterns, chess, puppets, honey, masks, drums, rowing, cheese, '
    'poetry, fireworks, marionettes',
    'is all about {}',
    'is known for its {}',
    'revolves around {}',
  ),
  _to(
    'theatre.city',
    'city',
    ('is located in {}', 'stands in {}', 'plays in {}'),
    'home city',
    'location',
  ),
  _to(
    'theatre.architect',
    'person',
    ('was designed by {}', 'was planned by {}', 'is a building by {}'),
    'architect',
    'designer',
  ),
  _number(
    'theatre.seats',
    120,
    4_000,
    'seats {} people',
    'has {} seats',
    'holds {} spectators',
  ),
  _to(
    'expedition.leader',
    'person',
    ('was led by {}', 'was commanded by {}', 'set out under {}'),
    'leader',
    'commander',
  ),
  _to(
    'expedition.ship',
    'ship',
    ('travelled on {}', 'sailed aboard {}', 'used {}'),
    'ship',
    'flagship',
  ),
  _to(
    'expedition.goal',
    'lake',
    ('was sent to {}', 'was to explore {}', 'set its sights on {}'),
    'goal',
    'target',
  ),
  _to(
    'expedition.payer',
    'newspaper',
    ('was paid for by {}', 'was financed by {}', 'was sponsored by {}'),
    'sponsor',
    'backer',
  ),
  _year(
    'expedition.left',
    1810,
    2000,
    'set out {}',
    'departed {}',
    'left port {}',
    maker='expedition.leader',
  ),
  _to(
    'painting.painter',
    'person',
    ('was painted by {}', 'is by the hand of {}', 'was created by {}'),
    'painter',
    'artist',
  ),
  _to(
    'painting.museum',
    'museum',
    ('hangs in {}', 'is kept at {}', 'is on display at {}'),
    'museum',
    'present home',
  ),
  _to(
    'painting.shows',
    'bridge',
    ('shows {}', 'depicts {}', 'is a view of {}'),
    'subject',
    'motif',
  ),
  _year(
    'painting.painted',
    1800,
    2015,
    'was painted {}',
    'was finished {}',
    'dates from work done {}',
    maker='painting.painter',
  ),
  _to(
    'language.country',
    'country',
    ('is spoken in {}', 'is heard in {}', 'is at home in {}'),
    'country',
    'state',
  ),
  _to(
    'language.described_by',
    'person',
    (
      'was first described by {}',
      'got its first grammar from {}',
      'was recorded by {}',
    ),
    'grammarian',
    'first describer',
  ),
  _number(
    'language.speakers',
    300,
    3_000_000,
    'has {} speakers',
    'is the mother tongue of {} people',
    'is used daily by {} people',
  ),
)

RELATIONS = {relation.key: relation for relation in _RELATIONS}
RELATIONS_OF = {
  key: tuple(r for r in _RELATIONS if r.subject == key) for key in TYPES
}
"""The relations of each type, in their order."""

INTO = {key: tuple(r for r in _RELATIONS if r.object == key) for key in TYPES}
"""The relations whose values are of each type."""
