"""Servers that the tests of this folder share.

jax is imported inside: tests/conftest.py has to set it up first.
"""

import pytest


@pytest.fixture(scope='session')
def server():
  """Says hello."""
  from tests.support import scripted_model, serving

  with serving.running(scripted_model.loaded(scripted_model.CONTENT)) as found:
    yield found


@pytest.fixture(scope='session')
def caller():
  """Says hello and calls a tool."""
  from tests.support import scripted_model, serving

  reply = (*scripted_model.CONTENT, *scripted_model.CALLS)
  with serving.running(scripted_model.loaded(reply)) as found:
    yield found


@pytest.fixture(scope='session')
def client(server):
  with server.client() as found:
    yield found


@pytest.fixture(scope='session')
def calling_client(caller):
  with caller.client() as found:
    yield found
