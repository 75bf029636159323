import json

import pytest

from dsv32_jax.agents.synthesis.roles import AuthorError, ModelAuthor
from dsv32_jax.agents.types import PolicyError, Reply
from dsv32_jax.chat import Message


class Written:
  """A policy that replies what is written, in turn, and keeps the queries."""

  def __init__(self, *contents):
    self.contents = list(contents)
    self.queries = []

  def reply(self, query):
    self.queries.append(query)
    content = self.contents.pop(0)
    if content is None:
      raise PolicyError('gone')
    return Reply(message=Message(role='assistant', content=content))


def author(policy):
  return ModelAuthor(
    policy, name='m', brief='A zoo.', examples=[{'family': 'bound'}], seed=10
  )


def test_model_author_reads_drafts_and_asks_with_all_it_needs():
  draft = [{'family': 'order'}]
  policy = Written(f'Here: {json.dumps(draft)}.', '[]', json.dumps(draft))
  made = author(policy)
  assert made.name == 'model:m'
  assert made.propose() == draft
  assert made.repair(draft, 'it is empty') == []
  assert made.harden(draft, 4) == draft
  asked = [query.messages[0].content for query in policy.queries]
  assert all('A zoo.' in one and '"bound"' in one for one in asked)
  assert 'it is empty' in asked[1]
  assert '"order"' in asked[1]
  assert 'level 4' in asked[2]
  # No two replies are drawn alike.
  assert len({query.seed for query in policy.queries}) == 3


@pytest.mark.parametrize('content', ['no list', '[1, 2]', '[{]', None])
def test_reply_without_a_draft_is_an_author_error(content):
  with pytest.raises(AuthorError):
    author(Written(content)).propose()
