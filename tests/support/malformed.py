"""Requests that are wrong in some way, by the hundred."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

CHAT, TEXT = '/v1/chat/completions', '/v1/completions'
_TOOL = {
  'type': 'function',
  'function': {'name': 'f', 'parameters': {'type': 'object'}},
}
_VALID: dict[str, dict[str, Any]] = {
  CHAT: {
    'model': 'scripted',
    'messages': [
      {'role': 'system', 'content': 'Be brief.'},
      {'role': 'user', 'content': 'hello'},
    ],
    'max_tokens': 3,
    'tools': [_TOOL],
  },
  TEXT: {'model': 'scripted', 'prompt': 'hello', 'max_tokens': 3},
}
# Values that no field of that name takes.
_BAD: dict[str, list[Any]] = {
  'model': [None, 3, [], {}, True],
  'n': [0, -1, 129, 1.5, '2', [], 10**30],
  'stream': ['yes', 1, [], {}],
  'stream_options': [[], 'x', {'include_usage': 'no'}, {'other': 1}, {}],
  'temperature': [-1, 'hot', [], 1e308, -1e-9],
  'top_p': [0, 1.01, -1, 'x', []],
  'top_k': [-2, 1.5, '5', 2**40],
  'min_p': [-0.1, 2, 'x'],
  'seed': [1.5, 'x', []],
  'stop': ['', [''], ['a'] * 17, 5, [5], {}],
  'max_tokens': [0, -5, 1.5, '3', 10**9, []],
  'frequency_penalty': [1, -0.5, 'x'],
  'presence_penalty': [2, 'x'],
  'logit_bias': [{'1': 5}, [], 'x'],
  'user': [5, []],
  'metadata': ['x', 5],
}
_BAD_CHAT: dict[str, list[Any]] = {
  'messages': [
    None, [], {}, 'hello', 5, [None], ['hello'], [[]], [{}],
    [{'role': 'user'}], [{'content': 'x'}], [{'role': 'king', 'content': 'x'}],
    [{'role': 5, 'content': 'x'}], [{'role': 'user', 'content': 5}],
    [{'role': 'user', 'content': [{'type': 'image_url'}]}],
    [{'role': 'user', 'content': [5]}], [{'role': 'user', 'content': {}}],
    [{'role': 'assistant', 'content': 'x'}],
    [{'role': 'tool', 'content': 'x', 'tool_call_id': 'a'}],
    [{'role': 'user', 'content': ''}, {'role': 'assistant', 'tool_calls': 5}],
    [{'role': 'user', 'content': ''}, {'role': 'assistant', 'tool_calls': [5]}],
    [{'role': 'user', 'content': 'x', 'surprise': 1}],
    [
      {'role': 'user', 'content': 'x'},
      {
        'role': 'assistant',
        'tool_calls': [
          {
            'id': 'a',
            'type': 'function',
            'function': {'name': 'f', 'arguments': '{broken'},
          }
        ],
      },
      {'role': 'tool', 'content': 'x', 'tool_call_id': 'a'},
    ],
  ],
  'tools': [
    {}, 'f', [5], [{}], [{'type': 'function'}], [{'type': 'x', 'function': {}}],
    [{'type': 'function', 'function': {'name': 5}}],
    [{'type': 'function', 'function': {'name': ''}}],
    [{'type': 'function', 'function': {'name': 'f', 'parameters': []}}],
    [
      {
        'type': 'function',
        'function': {'name': 'f', 'parameters': {'type': 'nonsense'}},
      }
    ],
    [_TOOL, _TOOL],
  ],
  'tool_choice': ['required', 'x', 5, {'type': 'function'}, []],
  'parallel_tool_calls': [False, 'x'],
  'response_format': [
    'json', [], 5, {}, {'type': 'xml'}, {'type': 'json_schema'},
    {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': 5}},
    {
      'type': 'json_schema',
      'json_schema': {'name': 'a', 'schema': {'type': 'nonsense'}},
    },
  ],
  'logprobs': ['x', 3, []],
  'top_logprobs': [3, -1, 21, 'x'],
  'chat_template_kwargs': [[], {'thinking': 5}, {'x': True}],
  'thinking': [True, {}, {'type': 'on'}],
  'reasoning_effort': ['gigantic', 5],
}  # fmt: skip
_BAD_TEXT: dict[str, list[Any]] = {
  'prompt': [
    None, '', [], {}, 5, [''], [[]], [5, 'a'], [[5], 'a'], [-1], [10**6],
    [10**30], [1.5], [None], [[5, None]], [True], ['x'] * 129,
  ],
  'logprobs': [21, -1, True, 'x'],
  'best_of': [0, 5, 'x'],
  'echo': [True, 'x'],
  'suffix': ['x', 5],
}  # fmt: skip


def bodies(count: int, *, seed: int) -> Iterator[tuple[str, bytes]]:
  """So many paths and bodies, each of which has to be refused."""
  chosen = random.Random(seed)
  makers: list[Callable[[random.Random], tuple[str, bytes]]] = [
    _wrong_value,
    _wrong_value,
    _wrong_value,
    _no_json,
    _not_an_object,
    _missing,
    _unknown,
    _odd_text,
  ]
  for _ in range(count):
    yield chosen.choice(makers)(chosen)


def _valid(chosen: random.Random) -> tuple[str, dict[str, Any]]:
  path = chosen.choice((CHAT, TEXT))
  return path, copy.deepcopy(_VALID[path])


def _wrong_value(chosen: random.Random) -> tuple[str, bytes]:
  path, body = _valid(chosen)
  bad = {**_BAD, **(_BAD_CHAT if path == CHAT else _BAD_TEXT)}
  field = chosen.choice(sorted(bad))
  body[field] = chosen.choice(bad[field])
  return path, json.dumps(body).encode()


def _no_json(chosen: random.Random) -> tuple[str, bytes]:
  path, body = _valid(chosen)
  good = json.dumps(body).encode()
  depth = chosen.randrange(1000, 200_000)
  return path, chosen.choice(
    [
      b'',
      good[: chosen.randrange(1, len(good) - 1)],
      chosen.randbytes(chosen.randrange(1, 2000)),
      good + b'}',
      good.replace(b'"', b"'"),
      good.replace(b':', b'=', 1),
      b'[' * depth,
      b'{"a":' * depth,
      b'[' * depth + b']' * depth,
      b'\xff\xfe' + good,
      good.replace(b'hello', b'hel\xfflo'),
      good.decode().encode('utf-16'),
      good.replace(b'3', b'3' * 20_000, 1),
      good.replace(b'3', b'NaN', 1),
      good.replace(b'3', b'0x3', 1),
      b'--form\r\nContent-Disposition: form-data\r\n\r\n3\r\n--form--',
    ]
  )


def _not_an_object(chosen: random.Random) -> tuple[str, bytes]:
  value = chosen.choice([None, True, 5, 1.5, 'text', [], [1], [{}], {}])
  return chosen.choice((CHAT, TEXT)), json.dumps(value).encode()


def _missing(chosen: random.Random) -> tuple[str, bytes]:
  path, body = _valid(chosen)
  del body[chosen.choice(('model', 'messages' if path == CHAT else 'prompt'))]
  return path, json.dumps(body).encode()


def _unknown(chosen: random.Random) -> tuple[str, bytes]:
  path, body = _valid(chosen)
  letters = 'abcdefghijklmnopqrstuvwxyz_é\u2028"\\'
  name = ''.join(chosen.choices(letters, k=chosen.randrange(1, 40))) + '_x'
  body[name] = chosen.choice([None, 5, 'x', [], {}])
  return path, json.dumps(body).encode()


def _odd_text(chosen: random.Random) -> tuple[str, bytes]:
  """Half a surrogate pair, which is no text; also as a name."""
  path, body = _valid(chosen)
  field = 'messages' if path == CHAT else 'prompt'
  odd = 'a\\ud800b'
  whole = json.dumps(body)
  return path, chosen.choice(
    [
      whole.replace('hello', odd),
      whole.replace('scripted', odd),
      whole.replace(field, odd),
      whole.replace('"max_tokens"', f'"stop": "{odd}", "max_tokens"'),
    ]
  ).encode()
