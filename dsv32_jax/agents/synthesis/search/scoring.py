"""Whether an answer is the right name."""

import re
import unicodedata

_MARK = re.compile(r'answer\s*:', re.IGNORECASE)


def given_answer(text: str) -> str:
  r"""What a reply gives as its answer: the line behind the last 'Answer:'.

  Without the mark, the whole text.

  >>> given_answer('It was sold.\n**Answer:** the Zorl Herald.')
  '** the Zorl Herald.'
  """
  marks = list(_MARK.finditer(text))
  if not marks:
    return text.strip()
  return text[marks[-1].end() :].strip().partition('\n')[0].strip()


def normal(text: str) -> str:
  """A name without case, accents' spelling, punctuation and a first article.

  >>> normal('** the  Zorl & Sons.')
  'zorl sons'
  """
  text = unicodedata.normalize('NFKC', text).casefold()
  words = re.findall(r'\w+', text)
  if len(words) > 1 and words[0] in ('the', 'a', 'an'):
    words = words[1:]
  return ' '.join(words)


def is_right(answer: str, want: str) -> bool:
  """Whether both are the same name."""
  return normal(answer) == normal(want)
