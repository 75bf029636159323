"""Asking an OpenAI-compatible endpoint, with the standard library."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from dsv32_jax.chat.errors import one_line

# What a later try may mend: too many requests, and faults of the server.
_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})
_MOST_BYTES = 64 << 20


class EndpointError(RuntimeError):
  """An endpoint that gave no answer; the text says why, in one line.

  Attributes:
    is_late: the time that the caller had left was the reason.
  """

  def __init__(self, reason: str, *, is_late: bool = False):
    super().__init__(one_line(reason))
    self.is_late = is_late


class ChatEndpoint:
  """`<base_url>/chat/completions`. May be asked from several threads."""

  def __init__(
    self,
    base_url: str,
    *,
    api_key: str | None = None,
    attempts: int = 4,
    timeout_s: int | float = 600.0,
    pause_s: int | float = 1.0,
  ):
    """Connects to nothing yet.

    Args:
      base_url: such as http://localhost:8000/v1.
      api_key: sent as a bearer token.
      attempts: if the server is busy, breaks off or answers what is no JSON.
      timeout_s: of one attempt.
      pause_s: before the second attempt; twice as long before each further one.

    Raises:
      ValueError: an address that is none, or numbers out of range.
    """
    if not base_url.startswith(('http://', 'https://')):
      raise ValueError(f'base_url: got {base_url!r}, expected http(s)://...')
    if attempts < 1:
      raise ValueError(f'attempts: got {attempts}, expected at least 1')
    if not timeout_s > 0:
      raise ValueError(f'timeout_s: got {timeout_s}, expected more than 0')
    self._url = base_url.rstrip('/') + '/chat/completions'
    self._headers = {'Content-Type': 'application/json'}
    if api_key:
      self._headers['Authorization'] = f'Bearer {api_key}'
    self._attempts, self._timeout_s = attempts, timeout_s
    self._pause_s = pause_s

  def ask(
    self, body: Mapping[str, Any], *, within_s: int | float | None = None
  ) -> dict[str, Any]:
    """The message of the first choice, and what stands around it.

    Args:
      body: of the request.
      within_s: for all attempts together; None for any.

    Returns:
      'message', a dict; 'finish_reason'; and 'usage', a dict.

    Raises:
      EndpointError: no attempt gave an answer.
    """
    data = json.dumps(dict(body)).encode()
    until = None if within_s is None else time.monotonic() + within_s
    reason = ''
    for attempt in range(self._attempts):
      if attempt and not _pause(self._pause_s * 2 ** (attempt - 1), until):
        raise EndpointError(f'no time is left; {reason}', is_late=True)
      timeout_s = self._timeout_s
      if until is not None:
        timeout_s = min(timeout_s, max(until - time.monotonic(), 0.001))
      try:
        return _choice(self._post(data, timeout_s))
      except urllib.error.HTTPError as error:
        reason = f'the endpoint answered {error.code} {error.reason}'
        reason += _detail(error)
        if error.code not in _AGAIN:
          break
      except (OSError, http.client.HTTPException) as error:
        reason = f'the endpoint failed: {type(error).__name__}: {error}'
      except (ValueError, RecursionError) as error:
        reason = f'the endpoint answered no chat completion: {error}'
      if until is not None and time.monotonic() >= until:
        raise EndpointError(f'no time is left; {reason}', is_late=True)
    raise EndpointError(f'{self._url}: {reason}')

  def _post(self, data: bytes, timeout_s: float) -> Any:
    request = urllib.request.Request(
      self._url, data, self._headers, method='POST'
    )
    until = time.monotonic() + timeout_s
    parts, size = [], 0
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
      # The socket's timeout is for each piece; a slow drip would take forever.
      while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
          raise TimeoutError(f'the answer is not whole after {timeout_s:.1f} s')
        if size > _MOST_BYTES:
          raise ValueError(f'got more than {_MOST_BYTES} bytes')
    return json.loads(b''.join(parts))


def _choice(answer: Any) -> dict[str, Any]:
  """Takes the parts out of an answer.

  Raises:
    ValueError: naming what is missing.
  """
  choices = answer.get('choices') if isinstance(answer, dict) else None
  if not isinstance(choices, list) or not choices:
    raise ValueError('it has no choices')
  choice = choices[0]
  message = choice.get('message') if isinstance(choice, dict) else None
  if not isinstance(message, dict):
    raise ValueError('its first choice has no message')
  usage = answer.get('usage')
  return {
    'message': message,
    'finish_reason': choice.get('finish_reason'),
    'usage': usage if isinstance(usage, dict) else {},
  }


def _pause(seconds: float, until: float | None) -> bool:
  """Waits; False if there is not so much time."""
  if until is not None and time.monotonic() + seconds >= until:
    return False
  time.sleep(seconds)
  return True


def _detail(error: urllib.error.HTTPError) -> str:
  """What the server says of it."""
  try:
    with error:
      text = error.read(2000).decode(errors='replace').strip()
  except (OSError, http.client.HTTPException):
    return ''
  return f': {text}' if text else ''
