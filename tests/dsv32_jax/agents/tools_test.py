from typing import Annotated, Any, Literal

import pytest

from dsv32_jax.agents.tools import FunctionTool, ToolSet, function_tool
from dsv32_jax.agents.types import ToolError
from dsv32_jax.chat import ChatError, ToolSpec


def book(
  city: Annotated[str, 'where to'],
  nights: int,
  price: float = 0.0,
  kind: Literal['hotel', 'hostel'] = 'hotel',
  guests: list[str] | None = None,
  options: dict[str, bool] | None = None,
  raw: dict | None = None,
) -> dict[str, Any]:
  """Books a room,

  and more that the model need not read.
  """
  return {'city': city, 'nights': nights, 'kind': kind, 'guests': guests}


def test_annotations_become_a_schema():
  spec = function_tool(book).spec
  assert (spec.name, spec.description) == ('book', 'Books a room,')
  assert spec.parameters == {
    'type': 'object',
    'properties': {
      'city': {'type': 'string', 'description': 'where to'},
      'nights': {'type': 'integer'},
      'price': {'type': 'number'},
      'kind': {'enum': ['hotel', 'hostel']},
      'guests': {
        'anyOf': [
          {'type': 'array', 'items': {'type': 'string'}},
          {'type': 'null'},
        ]
      },
      'options': {
        'anyOf': [
          {'type': 'object', 'additionalProperties': {'type': 'boolean'}},
          {'type': 'null'},
        ]
      },
      'raw': {'anyOf': [{'type': 'object'}, {'type': 'null'}]},
    },
    'required': ['city', 'nights'],
    'additionalProperties': False,
  }


@pytest.mark.parametrize(
  ('arguments', 'problem'),
  [
    ({'city': 'Köln'}, "'nights' is a required property"),
    ({'city': 'Köln', 'nights': '2'}, "nights: '2' is not of type 'integer'"),
    ({'city': 'Köln', 'nights': True}, 'nights: True is not of type'),
    ({'city': 'Köln', 'nights': 2, 'day': 1}, "'day' was unexpected"),
    ({'city': 'Köln', 'nights': 2, 'kind': 'tent'}, "kind: 'tent' is not one"),
  ],
)
def test_arguments_that_do_not_fit_are_told_by_name(arguments, problem):
  tools = ToolSet([function_tool(book)])
  with pytest.raises(ToolError, match='the arguments of book do not fit') as e:
    tools.call('book', arguments)
  assert problem in str(e.value)


def test_arguments_that_fit_are_run():
  text = ToolSet([function_tool(book)]).call(
    'book', {'city': 'Köln', 'nights': 2, 'guests': ['Ada']}
  )
  assert text == (
    '{"city": "Köln", "nights": 2, "kind": "hotel", "guests": ["Ada"]}'
  )


def test_unknown_tool_is_told_what_there_is():
  with pytest.raises(ToolError, match=r"no tool is called 'a\\nb'; there are:"):
    ToolSet([]).call('a\nb', {})


def test_schema_that_is_none_is_refused_when_the_tool_is_made():
  with pytest.raises(ChatError, match=r"tools\['book'\].parameters.type"):
    function_tool(book, parameters={'type': 'strnig'})


def test_two_tools_of_one_name_are_refused():
  with pytest.raises(ChatError, match="got 'book' a second time"):
    ToolSet([function_tool(book), function_tool(book)])


def test_schema_that_comes_by_hand_is_checked_too():
  with pytest.raises(ChatError, match='parameters'):
    ToolSet(
      [FunctionTool(book, ToolSpec(name='f', parameters={'required': 'all'}))]
    )


def test_function_that_has_no_schema_is_refused_by_the_argument():
  def unnamed(*values: int) -> int:
    return sum(values)

  def unknown(when: complex) -> int:
    return 0

  def bare(when) -> int:
    return 0

  for function, problem in (
    (unnamed, 'values: is a variadic positional argument'),
    (unknown, 'when: has the annotation'),
    (bare, 'when: has no annotation'),
  ):
    with pytest.raises(TypeError, match=problem):
      function_tool(function)
