"""Everything around completions: keys, limits, statuses, health, metrics."""

import contextlib
import dataclasses
import json
import threading

import openai
import pytest
from prometheus_client import parser

from tests.support import scripted_model, serving

USER = [{'role': 'user', 'content': 'x'}]
TICK = scripted_model.ids(scripted_model.ENDLESS)[:1]
ENDLESS = {'model': 'scripted', 'prompt': TICK, 'max_tokens': 4000}


def _error(content):
  return json.loads(content)['error']


def test_models_are_listed_and_found(server, client):
  (model,) = client.models.list().data
  assert (model.id, model.object) == ('scripted', 'model')
  assert client.models.retrieve('scripted') == model
  assert model.max_model_len == server.service.max_tokens == 4096
  with pytest.raises(openai.NotFoundError) as caught:
    client.models.retrieve('other/model')
  assert caught.value.code == 'model_not_found'


def test_request_for_another_model_is_not_found(client):
  with pytest.raises(openai.NotFoundError) as caught:
    client.chat.completions.create(model='gpt-4', messages=USER)
  assert (caught.value.code, caught.value.param) == ('model_not_found', 'model')


@pytest.mark.parametrize(
  ('method', 'path', 'status'),
  [
    ('GET', '/', 404),
    ('GET', '/v1/nothing', 404),
    ('POST', '/v1/chat/completions/', 404),
    ('GET', '/v1/chat/completions', 405),
    ('DELETE', '/v1/models', 405),
    ('POST', '/health', 405),
  ],
)
def test_paths_and_methods_that_are_not_there(server, method, path, status):
  found, headers, content = server.ask(method, path)
  assert found == status
  assert _error(content)['type'] == 'invalid_request_error'
  assert path in _error(content)['message']
  if status == 405:
    assert 'allow' in headers


def test_prompt_that_is_too_long_is_refused_with_both_lengths(client):
  long = [{'role': 'user', 'content': 'x' * 5000}]
  with pytest.raises(openai.BadRequestError, match=r'4096.*50\d\d') as caught:
    client.chat.completions.create(model='scripted', messages=long)
  assert caught.value.code == 'context_length_exceeded'
  with pytest.raises(openai.BadRequestError, match='4096') as caught:
    client.chat.completions.create(
      model='scripted', messages=USER, max_tokens=4095
    )
  assert caught.value.code == 'context_length_exceeded'
  assert caught.value.param == 'max_tokens'


def test_settings_key_body_and_queue_bound_what_is_served():
  """One server with narrow settings, and what each of them refuses."""
  loaded = scripted_model.loaded(scripted_model.CONTENT)
  config = dataclasses.replace(serving.ENGINE, max_waiting=1)
  with (
    serving.running(
      loaded, config, api_key='sesame', max_body_bytes=2000, model='own'
    ) as server,
    server.client(api_key='sesame') as client,
  ):
    _check_keys(server, client)
    _check_body(server)
    _check_queue(server, client)


def _check_keys(server, client):
  assert client.models.list().data[0].id == 'own'
  for headers in ({}, {'Authorization': 'Bearer x'}, {'Authorization': 'x'}):
    for path in ('/v1/models', '/v1/chat/completions', '/nothing'):
      status, found, content = server.ask('GET', path, **headers)
      assert status == 401
      assert _error(content)['code'] == 'invalid_api_key'
      assert found['www-authenticate'] == 'Bearer'
  # For whoever watches the server.
  assert server.ask('GET', '/health')[0] == 200
  assert server.ask('GET', '/metrics')[0] == 200


def _check_body(server):
  key = {'Authorization': 'Bearer sesame'}
  for size, status in ((1000, 404), (2000, 413), (30_000, 413)):
    body = {'model': 'other', 'prompt': 'x' * size}
    found, _, content = server.ask('POST', '/v1/completions', body, **key)
    assert found == status
    if status == 413:
      assert _error(content)['code'] == 'request_too_large'
      assert '2000' in _error(content)['message']


def _load(server):
  stats = server.stats()
  return stats.running, stats.waiting


def _check_queue(server, client):
  endless = ENDLESS | {'model': 'own'}
  places = serving.ENGINE.max_batch
  with contextlib.ExitStack() as stack:
    for number in range(places + 1):
      stream = client.completions.create(**endless, stream=True)
      stack.enter_context(contextlib.closing(stream))
      expected = (min(number + 1, places), max(number + 1 - places, 0))
      serving.wait_for(lambda e=expected: _load(server) == e)
    with pytest.raises(openai.RateLimitError) as caught:
      client.completions.create(**endless)
    assert caught.value.code == 'queue_full'
    assert caught.value.response.headers['retry-after'] == '1'
    # More than could ever wait is not worth trying again.
    with pytest.raises(openai.BadRequestError, match='as many as may wait'):
      client.completions.create(**endless | {'n': 2})
  serving.wait_for(lambda: _load(server) == (0, 0))
  assert client.completions.create(**endless | {'max_tokens': 1})


def test_metrics_count_what_was_served(server, client):
  def read():
    status, headers, content = server.ask('GET', '/metrics')
    assert status == 200
    assert headers['content-type'].startswith('text/plain')
    return {
      (sample.name, *sorted(sample.labels.values())): sample.value
      for family in parser.text_string_to_metric_families(content.decode())
      for sample in family.samples
    }

  before = read()
  client.chat.completions.create(
    model='scripted', messages=USER, temperature=0, n=2
  )
  with pytest.raises(openai.NotFoundError):
    client.chat.completions.create(model='other', messages=USER)
  server.ask('GET', '/made/up')
  after = read()

  def grown(*name):
    return after[name] - before.get(name, 0)

  chat = '/v1/chat/completions'
  assert grown('dsv32_requests_total', *sorted((chat, '200'))) == 1
  assert grown('dsv32_requests_total', *sorted((chat, '404'))) == 1
  assert grown('dsv32_requests_total', '404', 'other') == 1
  assert grown('dsv32_request_seconds_count', chat) == 2
  assert grown('dsv32_first_token_seconds_count') == 2
  assert grown('dsv32_token_seconds_count') == 2
  assert grown('dsv32_finished_total', 'stop') == 2
  assert grown('dsv32_new_tokens_total') == 8
  assert grown('dsv32_prompt_tokens_total') > 8
  assert after['dsv32_pages',] == after['dsv32_free_pages',] == 4
  assert after['dsv32_running_requests',] == after['dsv32_queue_requests',] == 0
  assert after['process_resident_memory_bytes',] > 2**20
  assert not [name for name in after if '/made/up' in name]


def test_engine_that_fails_is_said_to_clients_and_to_health(monkeypatch):
  loaded = scripted_model.loaded(scripted_model.CONTENT)
  with serving.running(loaded) as server, server.client() as client:
    stream = client.completions.create(**ENDLESS, stream=True)
    next(stream)

    def broken():
      raise MemoryError('the device is gone')

    monkeypatch.setattr(server.service.running.engine, 'step', broken)
    with pytest.raises(openai.APIError, match='the device is gone'):
      list(stream)
    with pytest.raises(openai.InternalServerError, match='the engine'):
      client.completions.create(**ENDLESS)
    status, _, content = server.ask('GET', '/health')
    assert status == 503
    assert 'the device is gone' in json.loads(content)['error']


def test_shutdown_lets_requests_end_and_takes_no_new_ones():
  loaded = scripted_model.loaded(scripted_model.CONTENT)
  with serving.running(loaded) as server, server.client() as client:
    short = ENDLESS | {'max_tokens': 400}
    stream = client.completions.create(**short, stream=True)
    next(stream)
    server.server.handle_exit(15, None)
    serving.wait_for(lambda: server.service.is_draining)
    assert server.ask('GET', '/health')[0] == 503
    with pytest.raises(openai.InternalServerError) as caught:
      client.completions.create(**short)
    assert caught.value.status_code == 503
    assert caught.value.code == 'shutting_down'
    # What had begun is served to its end.
    assert list(stream)[-1].choices[0].finish_reason == 'length'
    serving.wait_for(lambda: server.server.should_exit)


@pytest.mark.parametrize('streams', [True, False])
def test_shutdown_gives_up_what_takes_too_long(streams):
  loaded = scripted_model.loaded(scripted_model.CONTENT)
  caught = []

  def ask():
    try:
      answer = client.completions.create(**ENDLESS, stream=streams)
      caught.extend(answer if streams else [answer])
    except openai.APIError as error:
      caught.append(error)

  with (
    serving.running(loaded, shutdown_seconds=0) as server,
    server.client() as client,
  ):
    thread = threading.Thread(target=ask)
    thread.start()
    serving.wait_for(lambda: server.stats().new_tokens > 5)
    server.server.handle_exit(2, None)
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(caught[-1], openai.APIError)
    assert 'shutting down' in str(caught[-1])
    serving.wait_for(lambda: server.stats().free_pages == 4)
