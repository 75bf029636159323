"""JSON schemas of arguments and answers: the one file that knows `jsonschema`.

A schema comes from whoever sends a request. Its references are looked up inside
itself only: nothing is fetched.
"""

from collections.abc import Sequence
from typing import Any

import jsonschema
import referencing
from jsonschema import exceptions, validators

from dsv32_jax.chat.errors import ChatError, one_line
from dsv32_jax.chat.types import ToolSpec, check_json


class Schema:
  """A JSON schema, ready to judge values (draft 2020-12 unless it says).

  >>> schema = Schema(
  ...   {'type': 'object', 'required': ['sku']}, field='parameters'
  ... )
  >>> schema.problem({'sku': 'A-7'})
  >>> schema.problem({})
  "'sku' is a required property"
  """

  def __init__(self, schema: dict[str, Any], *, field: str):
    """Checks the schema itself.

    Args:
      schema: as parsed from JSON.
      field: what to call it in an error.

    Raises:
      ChatError: if it is not a JSON schema.
    """
    check_json(field, schema)
    if not isinstance(schema.get('$schema', ''), str):
      raise ChatError(f'{field}.$schema', 'expected text')
    kind = validators.validator_for(
      schema, default=jsonschema.Draft202012Validator
    )
    try:
      kind.check_schema(schema)
    except exceptions.SchemaError as error:
      raise ChatError(
        f'{field}{error.json_path[1:]}',
        one_line(f'is not a JSON schema: {error.message}'),
      ) from None
    except RecursionError:
      raise ChatError(field, 'is nested too deeply') from None
    self._validator = kind(schema, registry=referencing.Registry())

  def problem(self, value: Any) -> str | None:
    """What is wrong with a value in one line, or None."""
    try:
      error = exceptions.best_match(self._validator.iter_errors(value))
    # A schema may be sound by the letter and still impossible to apply: a
    # reference to nowhere or to itself, a pattern that Python cannot read.
    except Exception as error:
      return one_line(
        f'the schema cannot be applied ({type(error).__name__}: {error})'
      )
    if error is None:
      return None
    where = error.json_path[1:].lstrip('.')
    return one_line(f'{where}: {error.message}' if where else error.message)


def tool_schemas(tools: Sequence[ToolSpec]) -> dict[str, Schema | None]:
  """The schema of each tool's arguments by its name; None for any arguments.

  Raises:
    ChatError: if a schema is none, or two tools share a name.
  """
  schemas: dict[str, Schema | None] = {}
  for index, tool in enumerate(tools):
    if tool.name in schemas:
      raise ChatError(
        f'tools[{index}].name', f'got {tool.name!r} a second time'
      )
    schemas[tool.name] = (
      None
      if tool.parameters is None
      else Schema(tool.parameters, field=f'tools[{index}].parameters')
    )
  return schemas


def response_schema(
  response_format: dict[str, Any] | None,
) -> dict[str, Any] | None:
  """The JSON schema that an answer has to meet, or None for free text.

  Args:
    response_format: None, one of the OpenAI API's forms ('text', 'json_object',
      'json_schema'), or a JSON schema itself.

  Raises:
    ChatError: if the form is incomplete.

  >>> response_schema({'type': 'json_object'})
  {'type': 'object'}
  """
  if response_format is None or response_format.get('type') == 'text':
    return None
  if response_format.get('type') == 'json_object':
    return {'type': 'object'}
  if response_format.get('type') != 'json_schema':
    return response_format
  inner = response_format.get('json_schema')
  schema = inner.get('schema') if isinstance(inner, dict) else None
  if not isinstance(schema, dict):
    raise ChatError(
      'response_format.json_schema.schema',
      f'got {type(schema).__name__}, expected a JSON schema (an object)',
    )
  return schema


def check_response_format(response_format: object) -> None:
  """Refuses a response format that cannot be asked for or checked.

  Raises:
    ChatError: naming what is wrong with it.

  >>> check_response_format({'type': 'text'})
  """
  if response_format is None:
    return
  if not isinstance(response_format, dict):
    raise ChatError(
      'response_format',
      f'got {type(response_format).__name__}, expected an object',
    )
  schema = response_schema(response_format)
  if schema is not None:
    Schema(schema, field='response_format')
