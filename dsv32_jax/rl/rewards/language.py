"""How much of a text is in the language that was asked for.

V3.2 rewards "language consistency" (arXiv:2512.02556, section 3) and gives no
formula; R1's is the share of words in the target language. Here a word is in a
language if it is written in that language's script. Between languages of one
script words are told apart by a short list of the most frequent ones of each:
a word counts against the target if it is frequent in another language and not
in the target. Numbers, formulas, code and punctuation count for nothing.
"""

import re
import unicodedata

# The script of each language that can be a target.
SCRIPTS = {
  'ar': ('ARABIC',),
  'de': ('LATIN',),
  'el': ('GREEK',),
  'en': ('LATIN',),
  'es': ('LATIN',),
  'fr': ('LATIN',),
  'he': ('HEBREW',),
  'hi': ('DEVANAGARI',),
  'it': ('LATIN',),
  'ja': ('HIRAGANA', 'KATAKANA', 'CJK'),
  'ko': ('HANGUL',),
  'pt': ('LATIN',),
  'ru': ('CYRILLIC',),
  'th': ('THAI',),
  'zh': ('CJK',),
}

# Function words, of which running text is a third to a half. Left out are those
# that are ordinary words of another language here ("plus", "die", "come").
_FREQUENT = {
  'de': (
    'aber als also auch auf aus bei das dass dem der des durch ein eine einen '
    'einer eines es für haben ich ihr im ist kann mit nach nicht noch nur '
    'oder sein sich sie sind und uns von vor wenn werden wie wir wird zu zum '
    'zur über'
  ),
  'en': (
    'a about all also an and are as at be because been but by can do does each '
    'find first for from get given gives has have how i if in into is it its '
    'let more must next no not now number of on one only or other our out same '
    'she should since so than that the their them then there these they this '
    'to two up us was we what when where which who will with would you your'
  ),
  'es': (
    'al como cuando de del desde donde el ella en entre es esta este está hay '
    'la las lo los muy más nos o para pero por porque que se ser si su sus '
    'también todo un una uno y ya'
  ),
  'fr': (
    'au aux avec ce ces cette dans de donc du elle en est et il ils je la le '
    'les leur mais ne nous ou où pas que qui sa se ses si sont un une vous à '
    'être'
  ),
  'it': (
    'al alla anche che chi da dal dei del della di e essere gli ha il la le '
    'lo nel nella non o per perché più quando questa questo se si sono su tra '
    'un una uno è'
  ),
  'pt': (
    'ao aos como da das de dos e ela ele em entre essa esta este foi há isso '
    'já mais na nas nos não o os ou para pela pelo por porque quando que se '
    'sem ser seu são também um uma você é'
  ),
}
_WORDS = {name: frozenset(text.split()) for name, text in _FREQUENT.items()}

# Words of two letters or more in scripts with spaces; in the others each
# character counts as a word.
_LETTERS = re.compile(r'[^\W\d_]+')
_WITHOUT_SPACES = ('CJK', 'HIRAGANA', 'KATAKANA', 'THAI')
_CODE = re.compile(r'```.*?(?:```|$)|`[^`]*`|\$[^$]*\$|\\[A-Za-z]+', re.DOTALL)


def check_language(language: str) -> None:
  """Refuses a language that cannot be told.

  Raises:
    ValueError: naming those that can.
  """
  if language not in SCRIPTS:
    raise ValueError(
      f'language: got {language!r}, expected one of {sorted(SCRIPTS)}'
    )


def consistency(text: str, language: str) -> float:
  """The share of words in a language; 1 for a text without words.

  Args:
    text: reasoning and answer.
    language: a key of `SCRIPTS`.

  Returns:
    0 to 1.

  Raises:
    ValueError: for a language that cannot be told.

  >>> consistency('The sum is 12, so the answer is even.', 'en')
  1.0
  >>> consistency('so 答案是 twelve', 'en')
  0.4
  """
  check_language(language)
  scripts = SCRIPTS[language]
  own = _WORDS.get(language, frozenset())
  others = (
    frozenset().union(
      *(words for name, words in _WORDS.items() if name != language)
    )
    - own
  )
  right = total = 0
  for word in _LETTERS.findall(_CODE.sub(' ', text)):
    script = _script(word[0])
    if script in _WITHOUT_SPACES:
      total += len(word)
      right += sum(_script(letter) in scripts for letter in word)
    elif len(word) > 1:
      total += 1
      right += script in scripts and word.lower() not in others
  return right / total if total else 1.0


_known_scripts: dict[str, str] = {}


def _script(letter: str) -> str:
  if letter.isascii():
    return 'LATIN'
  if letter not in _known_scripts:
    _known_scripts[letter] = unicodedata.name(letter, 'UNKNOWN').split()[0]
  return _known_scripts[letter]
