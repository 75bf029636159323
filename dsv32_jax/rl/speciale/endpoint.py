"""An OpenAI-compatible endpoint as a policy."""

import concurrent.futures
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from dsv32_jax import chat
from dsv32_jax.rl.speciale.policy import Prompt, Reply

# What a later try may mend: too many requests, and faults of the server.
_AGAIN = frozenset({408, 409, 429, 500, 502, 503, 504})


class EndpointPolicy:
  """Asks `<base_url>/chat/completions`, some prompts at a time.

  A prompt that fails for good costs its own reply (`Reply.error`), not the run.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key: str | None = None,
    max_new_tokens: int = 4096,
    temperature: float = 1.0,
    top_p: float = 0.95,
    parallel: int = 8,
    attempts: int = 4,
    timeout_s: float = 600.0,
    pause_s: float = 1.0,
  ):
    """Connects to nothing yet.

    Args:
      base_url: such as http://localhost:8000/v1.
      model: its name there.
      api_key: sent as a bearer token.
      max_new_tokens: of a reply, thoughts included.
      temperature: of the draws.
      top_p: of the draws.
      parallel: requests at a time.
      attempts: of a prompt, if the server is busy, or breaks off.
      timeout_s: of one attempt.
      pause_s: before the second attempt; twice as long before each further one.

    Raises:
      ValueError: an address that is none, or counts below 1.
    """
    if not base_url.startswith(('http://', 'https://')):
      raise ValueError(f'base_url: got {base_url!r}, expected http(s)://...')
    for name, value in (('parallel', parallel), ('attempts', attempts)):
      if value < 1:
        raise ValueError(f'{name}: got {value}, expected at least 1')
    self._url = base_url.rstrip('/') + '/chat/completions'
    self._body = {
      'model': model,
      'max_tokens': max_new_tokens,
      'temperature': temperature,
      'top_p': top_p,
    }
    self._headers = {'Content-Type': 'application/json'}
    if api_key:
      self._headers['Authorization'] = f'Bearer {api_key}'
    self._parallel, self._attempts = parallel, attempts
    self._timeout_s, self._pause_s = timeout_s, pause_s

  def __call__(self, prompts: Sequence[Prompt]) -> list[Reply]:
    with concurrent.futures.ThreadPoolExecutor(self._parallel) as pool:
      return list(pool.map(self._answer, prompts))

  def _answer(self, prompt: Prompt) -> Reply:
    messages = [chat.message_to_openai(m) for m in prompt.messages]
    body = self._body | {'messages': messages, 'seed': prompt.seed}
    request = urllib.request.Request(
      self._url, json.dumps(body).encode(), self._headers
    )
    error = ''
    for attempt in range(self._attempts):
      if attempt:
        time.sleep(self._pause_s * 2 ** (attempt - 1))
      try:
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
          return read_reply(json.load(answer))
      except urllib.error.HTTPError as failure:
        error = f'{failure.code} {failure.reason}'
        if failure.code not in _AGAIN:
          break
      except (OSError, http.client.HTTPException) as failure:
        error = f'{type(failure).__name__}: {failure}'
      except (ValueError, LookupError, TypeError, AttributeError) as failure:
        error = f'not an answer: {type(failure).__name__}: {failure}'
    return Reply(content='', is_finished=False, error=error[:300])


def read_reply(answer: Any) -> Reply:
  """Reads a chat completion.

  Raises:
    ValueError, LookupError, TypeError, AttributeError: it is none.
  """
  choice = answer['choices'][0]
  message = choice['message']
  usage = answer.get('usage') or {}
  details = usage.get('completion_tokens_details') or {}
  reasoning = message.get('reasoning_content') or ''
  content = message.get('content') or ''
  total = int(usage.get('completion_tokens') or 0)
  # Where the server does not say how long the thoughts were: by characters.
  share = len(reasoning) / max(1, len(reasoning) + len(content))
  thought = details.get('reasoning_tokens')
  return Reply(
    content=content,
    reasoning=reasoning,
    num_tokens=total,
    num_reasoning_tokens=round(total * share)
    if thought is None
    else int(thought),
    is_finished=choice.get('finish_reason') == 'stop',
  )
