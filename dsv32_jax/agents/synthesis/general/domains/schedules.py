"""Domains that put things into rooms and hours."""

from dsv32_jax.agents.synthesis.general.constraints import Distinct, Listed
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

_SUBJECTS = ('algebra', 'biology', 'history', 'music')
_SPECIALTIES = ('cardiology', 'dermatology', 'neurology', 'paediatrics')
_SURNAMES = (
  'Adeyemi',
  'Bianchi',
  'Castro',
  'Dubois',
  'Eriksen',
  'Fischer',
  'Gupta',
  'Horvat',
  'Ito',
  'Jansen',
  'Kowalski',
  'Lindqvist',
  'Moreau',
  'Novak',
)
_FIRST = (
  'Ada',
  'Boris',
  'Chloe',
  'Diego',
  'Elif',
  'Farid',
  'Greta',
  'Hana',
  'Ivan',
  'Jun',
  'Kofi',
  'Lena',
  'Marta',
  'Noor',
)
PEOPLE = (_FIRST, _SURNAMES)

COURSE_TIMETABLE = Domain(
  name='course_timetable',
  tables=(
    Table(
      name='course',
      plural='courses',
      columns=(
        number('students', 'students', 10, 60),
        choice('subject', *_SUBJECTS),
      ),
      count=(8, 12),
      names=(
        ('Introductory', 'Advanced', 'Applied', 'Practical', 'Comparative'),
        ('Seminar', 'Workshop', 'Lecture', 'Laboratory', 'Studio'),
      ),
    ),
    Table(
      name='building',
      plural='buildings',
      columns=(number('walk', 'minutes of walk', 1, 15),),
      count=(3, 4),
      names=(
        ('North', 'South', 'East', 'West', 'Old'),
        ('Hall', 'Wing', 'House'),
      ),
    ),
    Table(
      name='room',
      plural='rooms',
      parent='building',
      columns=(
        number('seats', 'seats', 45, 120, 5),
        amount('fee', 'fee', 20, 90),
        choice('equipment', 'projector', 'piano', 'benches', 'screens'),
      ),
      count=(4, 5),
      names=(
        ('Room', 'Theatre', 'Space'),
        tuple(str(n) for n in range(101, 130)),
      ),
    ),
    Table(
      name='period',
      plural='periods',
      columns=(
        number('hour', 'hour', 8, 18),
        number('minutes', 'minutes', 40, 120),
      ),
      count=(8, 10),
      names=(
        tuple(
          f'{day} {half}'
          for day in ('Mon', 'Tue', 'Wed', 'Thu', 'Fri')
          for half in ('early', 'late')
        ),
        (),
      ),
    ),
    Table(
      name='teacher',
      plural='teachers',
      columns=(
        choice('subject', *_SUBJECTS),
        amount('pay', 'fee', 50, 160),
        number('years', 'years of service', 1, 30),
      ),
      count=(16, 20),
      names=PEOPLE,
    ),
  ),
  relations=(
    Relation(
      name='teacher_availability',
      first='teacher',
      second='period',
      columns=(
        choice('state', 'free', 'on request', 'busy'),
        number('load', 'load', 0, 9),
      ),
      says='availability',
    ),
  ),
  given=Field(name='course', table='course', says='courses'),
  fields=(
    Field(name='building', table='building', says='building'),
    Field(name='room', table='room', says='room'),
    Field(name='teacher', table='teacher', says='teacher'),
    Field(name='period', table='period', says='period'),
  ),
  rows=(3, 4),
  base=(
    within('room', 'building'),
    least('room', 'seats', 'course', 'students'),
    same('teacher', 'course', 'subject'),
    Distinct(fields=('room', 'period'), together=True),
    Distinct(fields=('teacher',)),
    Listed(
      relation='teacher_availability',
      first='teacher',
      second='period',
      column='state',
      op='!=',
      value='busy',
    ),
  ),
  openings=(
    'Find rooms, teachers and periods for {rows} courses.',
    'The timetable lacks {rows} courses; complete it.',
    'Place {rows} courses of the coming term.',
  ),
  branch=('room', 'seats'),
)

CLINIC_APPOINTMENTS = Domain(
  name='clinic_appointments',
  tables=(
    Table(
      name='patient',
      plural='patients',
      columns=(
        choice('need', *_SPECIALTIES),
        number('age', 'age', 4, 90),
        number('urgency', 'urgency', 1, 5),
      ),
      count=(8, 12),
      names=PEOPLE,
    ),
    Table(
      name='doctor',
      plural='doctors',
      columns=(
        choice('specialty', *_SPECIALTIES),
        choice('language', 'Arabic', 'English', 'French', 'Turkish'),
        amount('charge', 'charge', 40, 190),
        number('experience', 'years of experience', 1, 35),
      ),
      count=(18, 22),
      names=(('Dr', 'Prof'), _SURNAMES),
    ),
    Table(
      name='slot',
      plural='slots',
      columns=(
        number('minutes', 'minutes', 15, 75),
        amount('surcharge', 'charge', 0, 60),
      ),
      count=(8, 12),
      names=(
        tuple(f'{hour:02d}:{m}' for hour in range(8, 15) for m in ('00', '30')),
        (),
      ),
    ),
    Table(
      name='clinic_room',
      plural='clinic_rooms',
      columns=(
        number('level', 'level', 0, 6),
        amount('cost', 'charge', 10, 70),
        choice('device', 'ECG', 'ultrasound', 'lamp', 'none'),
      ),
      count=(8, 10),
      names=(('Room', 'Bay', 'Suite'), tuple('ABCDEFGHK')),
    ),
  ),
  relations=(
    Relation(
      name='doctor_hours',
      first='doctor',
      second='slot',
      columns=(choice('state', 'open', 'reserved', 'on call'),),
      says='hours',
    ),
  ),
  given=Field(name='patient', table='patient', says='patients'),
  fields=(
    Field(name='doctor', table='doctor', says='doctor'),
    Field(name='clinic_room', table='clinic_room', says='room'),
    Field(name='slot', table='slot', says='slot'),
  ),
  rows=(4, 5),
  base=(
    same('doctor', 'patient', 'specialty', 'need'),
    Distinct(fields=('slot',)),
    Distinct(fields=('clinic_room',)),
    Listed(
      relation='doctor_hours',
      first='doctor',
      second='slot',
      column='state',
      op='!=',
      value='reserved',
    ),
  ),
  openings=(
    'Book {rows} patients in at the clinic.',
    'Each of {rows} patients needs a doctor, a room and a slot.',
    'Draw up the list of {rows} appointments.',
  ),
  branch=('doctor', 'charge'),
)

CONFERENCE_ROOMS = Domain(
  name='conference_rooms',
  tables=(
    Table(
      name='talk',
      plural='talks',
      columns=(
        number('audience', 'audience', 20, 200, 10),
        choice('track', 'systems', 'theory', 'design', 'ethics'),
      ),
      count=(9, 12),
      names=(
        ('Fast', 'Honest', 'Sparse', 'Quiet', 'Robust', 'Small'),
        ('Compilers', 'Proofs', 'Interfaces', 'Networks', 'Storage', 'Maps'),
      ),
    ),
    Table(
      name='venue',
      plural='venues',
      columns=(
        number('seats', 'seats', 80, 400, 20),
        amount('rent', 'cost', 100, 900, 10),
        choice('setting', 'theatre', 'classroom', 'boardroom'),
      ),
      count=(9, 12),
      names=(
        ('Birch', 'Cedar', 'Elm', 'Hazel', 'Rowan'),
        ('Room', 'Hall', 'Forum'),
      ),
    ),
    Table(
      name='chair',
      plural='chairs',
      columns=(
        choice('track', 'systems', 'theory', 'design', 'ethics'),
        amount('travel', 'cost', 60, 600, 10),
        number('seniority', 'seniority', 1, 20),
      ),
      count=(16, 20),
      names=PEOPLE,
    ),
    Table(
      name='crew',
      plural='crews',
      columns=(
        amount('wage', 'cost', 50, 300, 10),
        number('size', 'size', 1, 8),
        choice('skill', 'sound', 'video', 'translation'),
      ),
      count=(7, 9),
      names=(('Amber', 'Cobalt', 'Crimson', 'Jade', 'Ivory'), ('Crew', 'Team')),
    ),
  ),
  relations=(
    Relation(
      name='setup',
      first='venue',
      second='crew',
      columns=(number('minutes', 'minutes', 10, 90, 5),),
      says='setup',
    ),
  ),
  given=Field(name='talk', table='talk', says='talks'),
  fields=(
    Field(name='venue', table='venue', says='venue'),
    Field(name='chair', table='chair', says='chair'),
    Field(name='crew', table='crew', says='crew'),
  ),
  rows=(4, 5),
  base=(
    least('venue', 'seats', 'talk', 'audience'),
    same('chair', 'talk', 'track'),
    Distinct(fields=('venue',)),
    Distinct(fields=('chair',)),
  ),
  openings=(
    'Give {rows} talks of the conference a venue, a chair and a crew.',
    'The programme has {rows} talks without a place.',
    'Staff and house {rows} talks.',
  ),
  branch=('venue', 'rent'),
)
