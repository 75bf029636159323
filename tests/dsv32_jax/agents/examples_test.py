"""The examples in docstrings and in docs/agents.md print what they say."""

import doctest
import importlib
import pathlib
import re

import pytest

_PAGE = pathlib.Path(__file__).parents[3] / 'docs' / 'agents.md'


@pytest.mark.parametrize(
  'name', ['token_sequence', 'tools', 'policies.scripted']
)
def test_examples_in_docstrings_print_what_they_say(name):
  module = importlib.import_module(f'dsv32_jax.agents.{name}')
  finder = doctest.DocTestFinder(exclude_empty=True)
  tests = [test for test in finder.find(module) if test.examples]
  assert tests
  for test in tests:
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0, test.name


def test_page_prints_what_it_says():
  text = _PAGE.read_text(encoding='utf-8')
  sessions = re.findall(r'^```python\n(>>>.*?)^```', text, re.M | re.S)
  assert len(sessions) == 2
  test = doctest.DocTestParser().get_doctest(
    '\n'.join(sessions), {}, 'docs/agents.md', str(_PAGE), 0
  )
  assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
