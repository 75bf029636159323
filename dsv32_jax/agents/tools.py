"""Tools made of functions, and the set that an episode's calls are run by."""

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from dsv32_jax.agents.types import Tool, ToolError
from dsv32_jax.chat import ToolSpec
from dsv32_jax.chat.errors import ChatError, one_line
from dsv32_jax.chat.schema import Schema

_KINDS: dict[Any, str] = {
  str: 'string',
  int: 'integer',
  float: 'number',
  bool: 'boolean',
  type(None): 'null',
}


class FunctionTool:
  """A function as a tool.

  Attributes:
    spec: what the model is told of it.
  """

  def __init__(self, function: Callable[..., Any], spec: ToolSpec):
    """Takes a function whose keyword arguments are those of the spec."""
    self.spec = spec
    self._function = function

  def __call__(self, arguments: Mapping[str, Any]) -> str:
    """See `Tool`; what is not text is returned as JSON."""
    result = self._function(**arguments)
    if isinstance(result, str):
      return result
    return json.dumps(result, ensure_ascii=False)


def function_tool(
  function: Callable[..., Any],
  *,
  name: str | None = None,
  description: str | None = None,
  parameters: dict[str, Any] | None = None,
) -> FunctionTool:
  """Makes a tool of a function.

  Args:
    function: takes the arguments of a call by keyword, returns text or what
      JSON can hold, and raises `ToolError` for what the model should read.
    name: that of the function, unless given.
    description: the first paragraph of the docstring, unless given.
    parameters: JSON schema of the arguments; made of the annotations (see
      `schema_of`) unless given.

  Raises:
    ChatError: a name or schema that cannot be used.
    TypeError: an annotation that has no schema.

  >>> def stock_level(sku: str, limit: int = 10) -> int:
  ...   '''How many of an article are left.'''
  ...   return min(limit, 12)
  >>> tool = function_tool(stock_level)
  >>> tool.spec.parameters['required'], tool({'sku': 'A-7'})
  (['sku'], '10')
  """
  if description is None:
    doc = inspect.getdoc(function) or ''
    description = ' '.join(doc.partition('\n\n')[0].split())
  spec = ToolSpec(
    name=name or getattr(function, '__name__', ''),
    description=description,
    parameters=schema_of(function) if parameters is None else parameters,
  )
  _check(spec)
  return FunctionTool(function, spec)


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
  """The JSON schema of a function's arguments, by its annotations.

  Known are str, int, float, bool, None, `list[X]`, `dict[str, X]`, dict,
  `Literal`, unions, and `Annotated[X, 'for the model']`. What has a default may
  be left out; what is not named may not be given.

  Raises:
    TypeError: naming an argument that has another annotation, or none.
  """
  hints = typing.get_type_hints(function, include_extras=True)
  properties, required = {}, []
  for name, parameter in inspect.signature(function).parameters.items():
    if parameter.kind not in (
      parameter.POSITIONAL_OR_KEYWORD,
      parameter.KEYWORD_ONLY,
    ):
      raise TypeError(
        f'{name}: is a {parameter.kind.description} argument, expected one '
        'that can be given by name'
      )
    if name not in hints:
      raise TypeError(f'{name}: has no annotation, expected one')
    properties[name] = _schema_of_type(hints[name], name)
    if parameter.default is parameter.empty:
      required.append(name)
  return {
    'type': 'object',
    'properties': properties,
    'required': required,
    'additionalProperties': False,
  }


class ToolSet:
  """The tools of an episode by name, with their schemas.

  >>> def double(number: int) -> int:
  ...   return 2 * number
  >>> tools = ToolSet([function_tool(double)])
  >>> tools.call('double', {'number': 4})
  '8'
  """

  def __init__(self, tools: Sequence[Tool]):
    """Checks the schemas.

    Raises:
      ChatError: a schema is none, or two tools share a name.
    """
    self._tools: dict[str, Tool] = {}
    for tool in tools:
      if tool.spec.name in self._tools:
        raise ChatError('tools', f'got {tool.spec.name!r} a second time')
      _check(tool.spec)
      self._tools[tool.spec.name] = tool

  @property
  def specs(self) -> tuple[ToolSpec, ...]:
    """What the model is told."""
    return tuple(tool.spec for tool in self._tools.values())

  def __iter__(self) -> Iterator[Tool]:
    return iter(self._tools.values())

  def call(self, name: str, arguments: Mapping[str, Any]) -> str:
    """Runs a call.

    Args:
      name: as the model wrote it.
      arguments: as the model wrote them.

    Raises:
      ToolError: no such tool, arguments that do not fit its schema, or what the
        tool itself says.
    """
    tool = self._tools.get(name)
    if tool is None:
      known = ', '.join(self._tools) or 'none'
      raise ToolError(
        one_line(f'no tool is called {name!r}; there are: {known}')
      )
    schema = _check(tool.spec)
    if schema is not None and (problem := schema.problem(dict(arguments))):
      raise ToolError(f'the arguments of {name} do not fit: {problem}')
    return tool(arguments)


def _check(spec: ToolSpec) -> Schema | None:
  """The schema of a tool's arguments, or None for any.

  Raises:
    ChatError: naming what is wrong with it.
  """
  if spec.parameters is None:
    return None
  try:
    return _schema(json.dumps(spec.parameters, sort_keys=True))
  except ChatError as error:
    field = error.field.removeprefix('parameters')
    raise ChatError(
      f'tools[{spec.name!r}].parameters{field}', error.reason
    ) from None


# Checking a schema takes longer than most episodes, which share their tools.
@functools.lru_cache(maxsize=4096)
def _schema(parameters: str) -> Schema:
  return Schema(json.loads(parameters), field='parameters')


def _schema_of_type(hint: Any, name: str) -> dict[str, Any]:
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    texts = [text for text in inner[1:] if isinstance(text, str)]
    schema = _schema_of_type(inner[0], name)
    return schema | ({'description': texts[0]} if texts else {})
  if hint in _KINDS:
    return {'type': _KINDS[hint]}
  if hint is dict:
    return {'type': 'object'}
  if origin is list:
    return {'type': 'array', 'items': _schema_of_type(inner[0], name)}
  if origin is dict and inner[0] is str:
    of_value = _schema_of_type(inner[1], name)
    return {'type': 'object', 'additionalProperties': of_value}
  if origin is Literal:
    return {'enum': list(inner)}
  if origin in (typing.Union, types.UnionType):
    return {'anyOf': [_schema_of_type(one, name) for one in inner]}
  raise TypeError(
    f'{name}: has the annotation {hint!r}, expected one that JSON knows '
    '(schema_of), or give `parameters`'
  )
