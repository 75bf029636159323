"""Plans as questions in English."""

import random
from collections.abc import Sequence

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.plans import Constraint, Hop, Plan

_ASKS = (
  'What is the name of {x}?',
  'What is {x} called?',
  'Name {x}.',
  'Find out the name of {x}.',
  'Give the name of {x}.',
  'I am looking for {x}. What is the name?',
  'Please work out the name of {x}.',
  'What do people call {x}?',
)
_CALLS = (
  'Suppose that {label} is {x}.',
  'Let {label} be {x}.',
  'We write {label} for {x}.',
  '{label} stands for {x}.',
)
_LABELS = (
  ('A', 'B', 'C', 'D', 'E', 'F', 'G', 'H'),
  ('P', 'Q', 'R', 'S', 'T', 'U', 'V', 'W'),
  ('X1', 'X2', 'X3', 'X4', 'X5', 'X6', 'X7', 'X8'),
  ('K', 'L', 'M', 'N', 'O', 'P', 'Q', 'R'),
)


def question(plan: Plan, rng: random.Random) -> str:
  """Asks for the answer of a plan, in one sentence or step by step."""
  text = _described(plan.start, list(plan.constraints), rng)
  if not plan.hops or rng.random() < 0.5:
    for hop in plan.hops:
      text = _step(hop, text, rng)
    return rng.choice(_ASKS).format(x=text)
  sentences, labels = [], rng.choice(_LABELS)
  call = rng.choice(_CALLS)
  # Now and then two hops stand in one sentence.
  for number, hop in enumerate(plan.hops):
    if not number or rng.random() < 0.75:
      label = labels[len(sentences) % len(labels)]
      sentences.append(call.format(x=text, label=label))
      text = label
    text = _step(hop, text, rng)
  return ' '.join([*sentences, rng.choice(_ASKS).format(x=text)])


def _step(hop: Hop, text: str, rng: random.Random) -> str:
  relation = schema.RELATIONS[hop.relation]
  if hop.is_inverse:
    said = rng.choice(relation.says).format(text)
    # What came before would swallow what stood behind it.
    others = [_said(c, rng) for c in hop.constraints]
    return _that(relation.subject, [*others, said], rng)
  text = f'the {rng.choice(relation.roles)} of {text}'
  if hop.constraints:
    raise ValueError(f'constraints: got some on {hop.relation} forward')
  return text


def _described(
  kind: str, constraints: Sequence[Constraint], rng: random.Random
) -> str:
  *first, last = rng.sample(constraints, len(constraints))
  said = [*(_said(c, rng) for c in first), _said(last, rng, is_last=True)]
  return _that(kind, said, rng)


def _that(kind: str, said: Sequence[str], rng: random.Random) -> str:
  entity = schema.TYPES[kind]
  noun, *said = rng.choice(entity.nouns), *said
  again = f' {entity.who}' if rng.random() < 0.5 else ''
  text = f'the {noun} {entity.who} {said[0]}'
  for number, one in enumerate(said[1:], 2):
    text += (' and' if number == len(said) else ',') + f'{again} {one}'
  return text


def _said(
  constraint: Constraint, rng: random.Random, *, is_last: bool = False
) -> str:
  relation = schema.RELATIONS[constraint.relation]
  says = rng.choice(relation.says)
  if constraint.via is not None:
    entity = schema.TYPES[relation.object]
    noun = rng.choice(entity.nouns)
    article = 'an' if noun[0] in 'aeio' else 'a'
    inner = f'{entity.who} {_said(constraint.via, rng)}'
    # In brackets, so that nothing behind it is said of the wrong entity.
    inner = inner if is_last else f'({inner})'
    return says.format(f'{article} {noun} {inner}')
  if relation.kind == 'year':
    return says.format(_year(constraint))
  if relation.kind == 'number':
    return says.format(_number(constraint))
  return says.format(constraint.value)


def _year(constraint: Constraint) -> str:
  value = constraint.value
  return {
    'is': f'in {value}',
    'below': f'before {value}',
    'above': f'after {value}',
    'between': f'between {value} and {constraint.high}',
  }[constraint.test]


def _number(constraint: Constraint) -> str:
  value = constraint.value
  return {
    'is': f'{value:,}',
    'below': f'fewer than {value:,}',
    'above': f'more than {value:,}',
    'between': f'between {value:,} and {constraint.high:,}',
  }[constraint.test]
