"""A second reader of completions: one regular expression, whole texts only."""

import json
import re
from typing import Any

_D = '｜DSML｜'
_FREE = (
  f'(?:(?!<｜begin▁of▁sentence｜>|<｜end▁of▁sentence｜>|</?think>|{_D}).)*'
)
_NAME = f'(?:(?!{_D})[^"\\n])'
_PARAMETER = (
  f'<{_D}parameter name="({_NAME}*)" string="(true|false)">'
  f'((?:(?!<?/{_D}parameter).)*)</{_D}parameter>\\n'
)
_INVOKE = (
  f'<{_D}invoke name="({_NAME}+)">\\n((?:{_PARAMETER})+|\\n?)</{_D}invoke>\\n'
)
_REPLY = (
  f'({_FREE})(?:<｜end▁of▁sentence｜>'
  f'|\\n\\n<{_D}function_calls>\\n((?:{_INVOKE})*)</{_D}function_calls>'
  '(?:<｜end▁of▁sentence｜>)?)'
)
_CHAT = re.compile(_REPLY, re.S)
_THINKING = re.compile(f'({_FREE})</think>{_REPLY}', re.S)


def read(
  text: str, mode: str
) -> tuple[str, str, list[tuple[str, dict[str, Any]]]] | None:
  """Reasoning, content and calls of a completion; None if it has a mistake."""
  if mode == 'thinking':
    match = _THINKING.fullmatch(text)
    parts = match and match.groups()[:3]
  else:
    match = _CHAT.fullmatch(text)
    parts = match and ('', *match.groups()[:2])
  if not parts:
    return None
  reasoning, content, block = parts
  calls = []
  for name, body, *_ in re.findall(_INVOKE, block or '', re.S):
    arguments = {}
    for key, is_string, value in re.findall(_PARAMETER, body, re.S):
      if key in arguments:
        return None
      if is_string == 'false':
        try:
          value = json.loads(value)
          json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
          return None
      arguments[key] = value
    calls.append((name, arguments))
  return reasoning, content, calls
