import time

import pytest

from dsv32_jax.rl.rewards import consistency

TEXTS = {
  'en': (
    'First we add the two numbers, then we divide the sum by three. The result '
    'is a whole number because the sum is even and three divides it.'
  ),
  'de': (
    'Zuerst addieren wir die beiden Zahlen, dann teilen wir die Summe durch '
    'drei. Das Ergebnis ist eine ganze Zahl, weil es nicht ungerade ist.'
  ),
  'fr': (
    'Nous ajoutons les deux nombres, puis nous divisons la somme par trois. Le '
    'résultat est un nombre entier, et il est pair dans ce cas.'
  ),
  'es': (
    'Primero se suman los dos números y luego se divide la suma entre tres. El '
    'resultado es un número entero porque la suma es par.'
  ),
  'ru': 'Сначала сложим два числа, затем разделим сумму на три.',
  'zh': '首先把两个数相加,然后把和除以三。结果是整数。',
  'ja': 'まず二つの数を足し、次にその和を三で割ります。',
  'ko': '먼저 두 수를 더하고 그 합을 삼으로 나눕니다.',
  'ar': 'نجمع العددين أولا ثم نقسم المجموع على ثلاثة.',
}


@pytest.mark.parametrize('language', TEXTS)
def test_text_in_the_language_is_nearly_all_in_it(language):
  assert consistency(TEXTS[language], language) > 0.9


@pytest.mark.parametrize('language', TEXTS)
def test_text_of_another_language_is_told_apart(language):
  for other, text in TEXTS.items():
    if {language, other} == {'ja', 'zh'}:
      continue  # They share characters.
    if other != language:
      assert consistency(text, language) < 0.86, (other, language)
      assert consistency(text, language) < consistency(text, other)


def test_switching_language_half_way_costs_the_share_of_the_other_words():
  text = 'so the answer is 十二 because'
  assert consistency(text, 'en') == pytest.approx(5 / 7)


@pytest.mark.parametrize(
  'text', ['', '12 + 7 = 19', 'x*2', '```python\nfür x in y\n```', '$\\alpha$']
)
def test_text_without_words_is_consistent(text):
  assert consistency(text, 'en') == 1.0
  assert consistency(text, 'zh') == 1.0


def test_words_of_mathematics_in_english_are_english():
  text = 'plus minus die of a cube, son of war; come no more, sin x'
  assert consistency(text, 'en') == 1.0


def test_unknown_language_is_refused():
  with pytest.raises(ValueError, match=r"language: got 'xx', expected one of"):
    consistency('a', 'xx')


def test_long_hostile_text_takes_no_long_time():
  started = time.monotonic()
  for text in ('`' * 20_000, '$' * 20_000, 'a' * 50_000, '\\' * 20_000):
    consistency(text, 'en')
  assert time.monotonic() - started < 2
