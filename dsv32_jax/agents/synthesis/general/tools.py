"""The typed tools of a general environment; the only way to its database.

Made from a domain's tables and relations; for trips they come out as the
paper's (arXiv:2512.02556, section 3.2): get_all_hotels_by_city,
get_infos_by_hotel, get_inter_city_transport, submit_result and so on.
"""

import json
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any

from dsv32_jax.agents.synthesis.general.schema import (
  KEY,
  Domain,
  Relation,
  Table,
)
from dsv32_jax.agents.types import ToolError
from dsv32_jax.chat import ToolSpec


class FunctionTool:
  """A tool that a Python function answers, its result as JSON."""

  def __init__(
    self,
    *,
    name: str,
    description: str,
    properties: dict[str, Any],
    function: Callable[..., Any],
  ):
    self._function = function
    self._spec = ToolSpec(
      name=name,
      description=description,
      parameters={
        'type': 'object',
        'properties': properties,
        'required': list(properties),
        'additionalProperties': False,
      },
    )

  @property
  def spec(self) -> ToolSpec:
    return self._spec

  def __call__(self, arguments: Mapping[str, Any]) -> str:
    expected = (self._spec.parameters or {})['required']
    if set(arguments) != set(expected):
      raise ToolError(
        f'{self._spec.name}: got arguments {sorted(arguments)}, '
        f'expected {sorted(expected)}'
      )
    return json.dumps(self._function(**arguments), ensure_ascii=False)


def make(
  domain: Domain,
  database: sqlite3.Connection,
  submit: Callable[[str], str],
) -> list[FunctionTool]:
  """All tools of an environment.

  Args:
    domain: of the environment.
    database: a connection that is only read.
    submit: takes the text of an answer.
  """
  tools: list[FunctionTool] = []
  for table in domain.tables:
    tools += _of_table(table, database)
  tools += [_of_relation(relation, database) for relation in domain.relations]
  tools.append(
    FunctionTool(
      name='submit_result',
      description='Hands in the answer and ends the task.',
      properties={
        'answer_text': {'type': 'string', 'description': 'The answer, as JSON.'}
      },
      function=lambda answer_text: submit(answer_text),
    )
  )
  return tools


def list_tool(table: Table) -> str:
  """Name of the tool that lists a table."""
  if table.parent:
    return f'get_all_{table.plural}_by_{table.parent}'
  return f'get_all_{table.plural}'


def _of_table(table: Table, database: sqlite3.Connection) -> list[FunctionTool]:
  text = {'type': 'string'}
  columns = [column.name for column in table.columns]

  def listed(**arguments: str) -> list[str]:
    query = f'SELECT {KEY} FROM "{table.name}"'
    if arguments:
      query += f' WHERE "{table.parent}" = ?'
    found = database.execute(f'{query} ORDER BY {KEY}', (*arguments.values(),))
    names = [name for (name,) in found]
    if not names:
      raise ToolError(f'no {table.parent} {arguments[table.parent]!r}')
    return names

  def one(name: str, wanted: list[str]) -> tuple:
    shown = ', '.join(f'"{column}"' for column in wanted)
    row = database.execute(
      f'SELECT {shown} FROM "{table.name}" WHERE {KEY} = ?', (name,)
    ).fetchone()
    if row is None:
      raise ToolError(f'no {table.name} {name!r}')
    return row

  def infos(**arguments: Any) -> dict[str, Any]:
    wanted = arguments['info_keywords']
    unknown = [word for word in wanted if word not in columns]
    if unknown or not wanted:
      raise ToolError(
        f'info_keywords: got {wanted!r}, expected some of {columns}'
      )
    row = one(arguments[table.name], wanted)
    return dict(zip(wanted, row, strict=True))

  tools = [
    FunctionTool(
      name=list_tool(table),
      description=f'Names of all {table.plural}'
      + (f' of a {table.parent}.' if table.parent else '.'),
      properties={table.parent: text} if table.parent else {},
      function=listed,
    )
  ]
  if columns:
    tools.append(
      FunctionTool(
        name=f'get_infos_by_{table.name}',
        description=f'Chosen facts about a {table.name}.',
        properties={
          'info_keywords': {
            'type': 'array',
            'items': {'type': 'string', 'enum': columns},
          },
          table.name: text,
        },
        function=infos,
      )
    )
  if table.parent:
    tools.append(
      FunctionTool(
        name=f'get_{table.parent}_by_{table.name}',
        description=f'The {table.parent} that a {table.name} belongs to.',
        properties={table.name: text},
        function=lambda **arguments: one(arguments[table.name], [table.parent])[
          0
        ],
      )
    )
  return tools


def pair_parameters(relation: Relation) -> tuple[str, str]:
  """Names of the two parameters of a relation's tool."""
  if relation.first == relation.second:
    return f'{relation.first}_a', f'{relation.first}_b'
  return relation.first, relation.second


def _of_relation(
  relation: Relation, database: sqlite3.Connection
) -> FunctionTool:
  first, second = pair_parameters(relation)
  columns = [column.name for column in relation.columns]
  shown = ', '.join(f'"{column}"' for column in columns)

  def fact(**arguments: str) -> dict[str, Any]:
    row = database.execute(
      f'SELECT {shown} FROM "{relation.name}" WHERE first = ? AND second = ?',
      (arguments[first], arguments[second]),
    ).fetchone()
    if row is None:
      raise ToolError(
        f'nothing known of {arguments[first]!r} and {arguments[second]!r}'
      )
    return dict(zip(columns, row, strict=True))

  return FunctionTool(
    name=f'get_{relation.name}',
    description=f'{relation.says.capitalize()}: {", ".join(columns)}.',
    properties={first: {'type': 'string'}, second: {'type': 'string'}},
    function=fact,
  )
