"""The fields of a request, checked.

Unknown fields are refused: a misspelt option that is silently left out is worse
than an error. Options of the OpenAI API that would change the answer, and that
are not there, are refused unless they have the value that changes nothing.
"""

import random
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from dsv32_jax.inference.requests import MAX_TOP_LOGPROBS
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.serving import errors

MAX_CHOICES = 128
MAX_STOPS = 16

_Text = Annotated[str, Field(min_length=1)]
_Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Nothing = Annotated[float, Field(ge=0, le=0)]


class _Model(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid', strict=True, frozen=True)


class StreamOptions(_Model):
  """How to stream.

  Attributes:
    include_usage: send the numbers of tokens in a chunk at the end.
    include_obfuscation: of no effect.
  """

  include_usage: bool = False
  include_obfuscation: bool | None = None


class GenerationRequest(_Model):
  """What both kinds of request have; see docs/serving.md for each field."""

  model: str
  n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  temperature: (
    Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None
  ) = None
  top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
  top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
  min_p: _Probability | None = None
  seed: int | None = None
  stop: _Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)] | None = (
    None
  )
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  # Accepted where they ask for nothing.
  frequency_penalty: _Nothing | None = None
  presence_penalty: _Nothing | None = None
  logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
  # They say nothing to the model.
  user: str | None = None
  metadata: dict[str, Any] | None = None
  store: bool | None = None
  service_tier: str | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None

  @property
  def num_choices(self) -> int:
    return self.n or 1

  @property
  def stops(self) -> tuple[str, ...]:
    if isinstance(self.stop, str):
      return (self.stop,)
    return tuple(self.stop or ())

  @property
  def include_usage(self) -> bool:
    return bool(self.stream_options and self.stream_options.include_usage)

  def sampling(self) -> Sampling:
    """How to draw; temperature 1 and no truncation unless asked."""
    return Sampling(
      temperature=1.0 if self.temperature is None else self.temperature,
      top_k=self.top_k if self.top_k and self.top_k > 0 else None,
      top_p=1.0 if self.top_p is None else self.top_p,
      min_p=self.min_p or 0.0,
    )

  def seeds(self) -> list[int]:
    """One seed a choice; drawn unless the request has one."""
    first = random.getrandbits(32) if self.seed is None else self.seed
    return [(first + index) % 2**32 for index in range(self.num_choices)]


class CompletionRequest(GenerationRequest):
  """POST /v1/completions."""

  prompt: (
    _Text
    | Annotated[list[_Text], Field(min_length=1, max_length=MAX_CHOICES)]
    | Annotated[list[int], Field(min_length=1)]
    | Annotated[
      list[Annotated[list[int], Field(min_length=1)]],
      Field(min_length=1, max_length=MAX_CHOICES),
    ]
  )
  logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
  best_of: Annotated[int, Field(ge=1)] | None = None
  echo: Literal[False] | None = None
  suffix: Literal[''] | None = None

  def prompts(self) -> list[str] | list[list[int]]:
    """Every prompt, as text or as token ids."""
    prompt: Any = self.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
      return [prompt]
    return prompt


class _TemplateOptions(_Model):
  thinking: bool | None = None


class _Thinking(_Model):
  type: Literal['enabled', 'disabled']


class ChatRequest(GenerationRequest):
  """POST /v1/chat/completions.

  Messages, tools and formats are checked by `chat`, which knows their grammar.
  """

  messages: list[dict[str, Any]]
  tools: list[dict[str, Any]] | None = None
  tool_choice: str | dict[str, Any] | None = None
  parallel_tool_calls: Literal[True] | None = None
  response_format: dict[str, Any] | None = None
  max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
  chat_template_kwargs: _TemplateOptions | None = None
  thinking: _Thinking | None = None
  reasoning_effort: (
    Literal['none', 'minimal', 'low', 'medium', 'high', 'xhigh', 'max'] | None
  ) = None

  def is_thinking(self) -> bool:
    """Whether the model reasons first; not unless it is asked to.

    Raises:
      ApiError: fields that contradict each other.
    """
    asked = {}
    if self.chat_template_kwargs and (
      self.chat_template_kwargs.thinking is not None
    ):
      asked['chat_template_kwargs'] = self.chat_template_kwargs.thinking
    if self.thinking is not None:
      asked['thinking'] = self.thinking.type == 'enabled'
    if self.reasoning_effort is not None:
      asked['reasoning_effort'] = self.reasoning_effort != 'none'
    if len(set(asked.values())) > 1:
      raise errors.invalid(
        next(iter(asked)),
        f'{", ".join(asked)}: got thinking on and off, expected one of them',
      )
    return any(asked.values())

  def uses_tools(self) -> bool:
    """Whether the model may call the tools of the request.

    Raises:
      ApiError: a choice that cannot be kept, as nothing forces the model.
    """
    choice = self.tool_choice
    if choice is None or choice == 'auto':
      return True
    if choice == 'none':
      return False
    raise errors.invalid(
      'tool_choice',
      f"tool_choice: got {choice!r}, expected 'auto' or 'none': a call cannot "
      'be forced',
    )


_Request = TypeVar('_Request', bound=GenerationRequest)


def parse(kind: type[_Request], body: bytes) -> _Request:
  """Reads a body.

  Raises:
    ApiError: 400, naming the field.
  """
  try:
    request = kind.model_validate_json(body)
  except pydantic.ValidationError as error:
    raise _first(error) from None
  if isinstance(request, ChatRequest):
    if request.top_logprobs is not None and not request.logprobs:
      raise errors.invalid(
        'top_logprobs', 'top_logprobs: expected logprobs to be true with it'
      )
    limits = (request.max_tokens, request.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
      raise errors.invalid(
        'max_tokens',
        f'max_tokens: got {limits[0]} and max_completion_tokens {limits[1]}, '
        'expected one of them',
      )
  if isinstance(request, CompletionRequest):
    count = len(request.prompts()) * request.num_choices
    if count > MAX_CHOICES:
      raise errors.invalid(
        'n',
        f'n: got {count} choices for all prompts together, expected at most '
        f'{MAX_CHOICES}',
      )
    if request.best_of not in (None, request.num_choices):
      raise errors.invalid(
        'best_of',
        f'best_of: got {request.best_of}, expected n ({request.num_choices}): '
        'choices are not ranked',
      )
  if request.stream_options is not None and not request.stream:
    raise errors.invalid(
      'stream_options', 'stream_options: expected stream to be true with it'
    )
  return request


def _first(error: pydantic.ValidationError) -> errors.ApiError:
  """The first complaint, as one line that names the field."""
  details = error.errors(
    include_url=False, include_context=False, include_input=True
  )
  first = details[0]
  if first['type'] == 'json_invalid':
    return errors.invalid(
      None, f'the body is not JSON: {first["msg"]}', code='invalid_json'
    )
  # Of the ways that a field may be written, the first is named; what follows
  # the field's name would name the way instead.
  place = first['loc']
  field = str(place[0]) if place else None
  if field is None:
    return errors.invalid(None, 'the body: expected a JSON object')
  if first['type'] == 'extra_forbidden' and len(place) == 1:
    return errors.invalid(
      field,
      f'{field}: not a field of this request',
      code='unknown_parameter',
    )
  if first['type'] == 'missing' and len(place) == 1:
    return errors.invalid(field, f'{field}: expected, and not given')
  reasons = dict.fromkeys(
    detail['msg'] for detail in details if detail['loc'][:1] == place[:1]
  )
  shown = repr(first['input'])
  if len(shown) > 60:
    shown = f'{shown[:57]}...'
  return errors.invalid(
    field, f'{field}: got {shown}; {"; or: ".join(list(reasons)[:4])}'
  )
