import socket

import pytest

from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.schema import (
  Schema,
  check_response_format,
  response_schema,
)

_OBJECT = {
  'type': 'object',
  'properties': {'limit': {'type': 'integer', 'minimum': 0}},
  'required': ['limit'],
  'additionalProperties': False,
}


@pytest.mark.parametrize(
  ('value', 'problem'),
  [
    ({'limit': 3}, None),
    ({'limit': 3.0}, None),
    ({'limit': '3'}, "limit: '3' is not of type 'integer'"),
    ({'limit': -1}, 'limit: -1 is less than the minimum of 0'),
    ({}, "'limit' is a required property"),
    ([], "[] is not of type 'object'"),
  ],
)
def test_schema_problem_names_what_does_not_fit(value, problem):
  assert Schema(_OBJECT, field='parameters').problem(value) == problem


def test_schema_of_an_older_draft_is_read_as_such():
  # A list of `items` is a tuple up to draft 2019-09 and an error later.
  schema = {'items': [{'type': 'string'}]}
  old = 'http://json-schema.org/draft-07/schema#'
  assert Schema({'$schema': old, **schema}, field='f').problem(['a', 1]) is None
  with pytest.raises(ChatError, match=r'^f\.items: is not a JSON schema'):
    Schema(schema, field='f')


@pytest.mark.parametrize(
  'schema',
  [
    {'$ref': '#/$defs/nowhere'},
    {'$ref': '#'},
    {'$ref': 'file:///etc/passwd'},
  ],
)
def test_schema_that_cannot_be_applied_is_a_problem_of_one_line(schema):
  problem = Schema(schema, field='f').problem({'a': 1})
  assert problem is not None
  assert problem.startswith('the schema cannot be applied')
  assert '\n' not in problem


def test_schema_with_a_remote_reference_opens_no_connection():
  with socket.create_server(('127.0.0.1', 0)) as server:
    server.settimeout(0.2)
    port = server.getsockname()[1]
    remote = {'$ref': f'http://127.0.0.1:{port}/schema.json'}
    assert 'cannot be applied' in (Schema(remote, field='f').problem(1) or '')
    with pytest.raises(TimeoutError):
      server.accept()


def test_long_problem_is_cut():
  problem = Schema({'type': 'integer'}, field='f').problem('line\n' * 1000)
  assert problem is not None
  assert len(problem) < 400
  assert '\n' not in problem


def test_response_schema_knows_the_forms_of_the_api():
  assert response_schema(None) is None
  assert response_schema({'type': 'text'}) is None
  assert response_schema({'type': 'json_object'}) == {'type': 'object'}
  named = {'type': 'json_schema', 'json_schema': {'schema': _OBJECT}}
  assert response_schema(named) == _OBJECT
  assert response_schema(_OBJECT) == _OBJECT


@pytest.mark.parametrize(
  'response_format',
  [
    'json',
    {'type': 'json_schema'},
    {'type': 'json_schema', 'json_schema': {'schema': 'object'}},
    {'type': 'grammar'},
    {'$schema': 3},
  ],
)
def test_bad_response_format_is_refused(response_format):
  with pytest.raises(ChatError, match=r'^response_format'):
    check_response_format(response_format)
