"""Seeded random conversations, and completions with mistakes in them."""

import random
from typing import Any

from dsv32_jax.chat import markup
from dsv32_jax.chat.types import Message, Mode, ToolCall, ToolSpec

# What free text may not hold: the parser reads it as the end or as a mistake.
FORBIDDEN = (
  markup.BOS,
  markup.EOS,
  markup.THINK,
  markup.THINK_END,
  markup.DSML,
)
_FRAGMENTS = (
  'plain words',
  ' ',
  '\n',
  '\n\n',
  '\t',
  '\r\n',
  '<',
  '>',
  '</',
  '<b>bold</b>',
  'a<b && c>d',
  '"quoted"',
  "it's",
  '\\n \\u0041 \\',
  '{"a": [1, 2]}',
  'ÄÖß',
  '漢字かな交じり文',
  '한국어',
  'שלום عليكم',
  'e\u0301 \u200d \ufeff \u00a0 \u2028 \x00 \x7f',
  '👩\u200d👩\u200d👧 🇩🇪',
  '\U00010348',
  '12345.6789',
  'def f(x):\n    return x\n',
  '<|User|> <function_results>',
  '</result>\n<result>',
  '</functions>',
  # Nearly markup, and markup that is no end of free text.
  '<thin',
  '</thin k>',
  '<｜',
  '｜DSML',
  '<｜DSM',
  '\n\n<｜',
  '<｜User｜>',
  '<｜Assistant｜>',
)
_MARKUP = (
  *FORBIDDEN,
  markup.CALLS,
  markup.CALLS_END,
  markup.INVOKE_END,
  markup.PARAMETER_END,
  markup.PARAMETER_END[:-1],
  '\n\n' + markup.CALLS + '\n',
  '" string="true">',
)


def text(rng: random.Random, *, with_markup: bool = False) -> str:
  """A text of a few fragments, sometimes none.

  Args:
    rng: draws.
    with_markup: let control strings and tags stand in it too.
  """
  fragments = _FRAGMENTS + _MARKUP if with_markup else _FRAGMENTS
  while True:
    out = ''.join(rng.choices(fragments, k=rng.choice((0, 1, 2, 3, 6))))
    if with_markup or not any(mark in out for mark in FORBIDDEN):
      return out


def json_value(rng: random.Random, depth: int = 0) -> Any:
  """A JSON value, strings with markup in them included."""
  kind = rng.choice('snnnbNaoo' if depth < 3 else 'snnbN')
  if kind == 's':
    return text(rng, with_markup=True)
  if kind == 'n':
    return rng.choice(
      (0, -1, 3, 2**70, 0.5, -1e-300, 1e22, rng.random(), rng.getrandbits(40))
    )
  if kind == 'b':
    return rng.random() < 0.5
  if kind == 'a':
    return [json_value(rng, depth + 1) for _ in range(rng.randrange(4))]
  if kind == 'o':
    return {
      text(rng, with_markup=True): json_value(rng, depth + 1)
      for _ in range(rng.randrange(4))
    }
  return None


def call(rng: random.Random) -> ToolCall:
  """A call of up to four arguments, often of none."""
  name = rng.choice(('stock_level', 'search', 'f', 'a.b-c', '検索', 'x<y>'))
  keys = ('sku', 'limit', 'q', 'a b', 'größe', '<k>', "it's", '', '\\')
  return ToolCall(
    name=name,
    arguments={
      key: json_value(rng) if rng.random() < 0.6 else text(rng)
      for key in rng.sample(keys, rng.choice((0, 0, 1, 2, 4)))
    },
  )


def tools(rng: random.Random) -> tuple[ToolSpec, ...]:
  """Up to two tools."""
  return tuple(
    ToolSpec(
      name=name,
      description=text(rng),
      parameters={'type': 'object', 'properties': {'q': {'type': 'string'}}},
    )
    for name in rng.sample(('search', 'stock_level', 'now'), rng.randrange(3))
  )


def assistant(rng: random.Random, mode: Mode, *, calls: bool) -> Message:
  """A reply; in thinking mode with reasoning, or now and then calls alone."""
  reasoning = ''
  if mode == 'thinking':
    while not reasoning and not (calls and rng.random() < 0.2):
      reasoning = text(rng)
  return Message(
    role='assistant',
    content='' if calls and rng.random() < 0.5 else text(rng),
    reasoning=reasoning,
    tool_calls=(
      tuple(call(rng) for _ in range(rng.choice((1, 1, 2, 4)))) if calls else ()
    ),
  )


def turn(rng: random.Random, mode: Mode) -> list[Message]:
  """A user's or developer's message and everything up to the answer."""
  role = 'developer' if rng.random() < 0.25 else 'user'
  asks = role == 'developer'
  messages = [
    Message(
      role=role,
      content=text(rng, with_markup=True),
      tools=tools(rng) if asks else (),
      response_format={'type': 'json_object'}
      if asks and rng.random() < 0.3
      else None,
    )
  ]
  for _ in range(rng.choice((0, 0, 1, 2))):
    reply = assistant(rng, mode, calls=True)
    messages.append(reply)
    messages += [
      Message(role='tool', content=text(rng, with_markup=True))
      for _ in reply.tool_calls
    ]
  messages.append(assistant(rng, mode, calls=False))
  return messages


def conversation(rng: random.Random) -> tuple[tuple[Message, ...], Mode]:
  """Messages and the mode that they go with."""
  mode: Mode = rng.choice(('chat', 'thinking'))
  messages = []
  if rng.random() < 0.5:
    messages.append(
      Message(
        role='system', content=text(rng, with_markup=True), tools=tools(rng)
      )
    )
  for _ in range(rng.choice((1, 1, 2, 3))):
    messages += turn(rng, mode)
  return tuple(messages), mode


def damaged(rng: random.Random, completion: str) -> str:
  """A completion with one mistake, or none if nothing came of it."""
  at = rng.randrange(len(completion) + 1)
  end = min(len(completion), at + rng.choice((1, 1, 2, 5, 20)))
  if rng.random() < 0.3:
    return completion[:at] + completion[end:]
  if rng.random() < 0.3:
    return completion[:at]
  if rng.random() < 0.3:
    return completion[:end] + completion[at:]
  inserted = rng.choice((*_MARKUP, '\n', 'x', '"', '>', ' '))
  return completion[:at] + inserted + completion[at:]
