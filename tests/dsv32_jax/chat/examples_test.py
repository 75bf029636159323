"""The examples in docstrings and in docs/chat.md print what they say."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

from dsv32_jax import chat

_PAGE = pathlib.Path(__file__).parents[3] / 'docs' / 'chat.md'
_MODULES = sorted(module.name for module in pkgutil.iter_modules(chat.__path__))


@pytest.mark.parametrize('name', _MODULES)
def test_examples_in_docstrings_print_what_they_say(name):
  module = importlib.import_module(f'dsv32_jax.chat.{name}')
  finder = doctest.DocTestFinder(exclude_empty=True)
  for test in finder.find(module):
    result = doctest.DocTestRunner(verbose=False).run(test)
    assert result.failed == 0, test.name


def test_public_functions_have_examples():
  without = [
    name
    for name in chat.__all__
    if callable(getattr(chat, name))
    and name[0].islower()
    and '>>>' not in (getattr(chat, name).__doc__ or '')
  ]
  assert without == []


def test_page_prints_what_it_says():
  text = _PAGE.read_text(encoding='utf-8')
  sessions = re.findall(r'^```python\n(>>>.*?)^```', text, re.M | re.S)
  assert sessions
  test = doctest.DocTestParser().get_doctest(
    '\n'.join(sessions), {}, 'docs/chat.md', str(_PAGE), 0
  )
  assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
