"""Checks that conversations come back from their text as they were.

As a program it runs without the checks of types that slow the tests down:
`python -m tests.support.chat_round_trip 10000 1`.
"""

import dataclasses
import random
import sys

from dsv32_jax.chat import markup
from dsv32_jax.chat.parse import parse
from dsv32_jax.chat.template import render, render_pieces
from tests.support import chat_conversations


def completions(messages, mode):
  """Each reply with the text that the model would have written for it."""
  for index, message in enumerate(messages):
    if message.role == 'assistant':
      prompt = render(messages[:index], mode=mode)
      whole = render(messages[: index + 1], mode=mode)
      assert whole.startswith(prompt)
      yield message, whole[len(prompt) :]


def rendered_replies(messages, mode):
  """Each reply as it stands in the text of a whole conversation.

  Returns:
    Pairs of whether it was asked to think, and its text.
  """
  found = []
  text, is_reply, thinks = '', False, False
  for piece in render_pieces(messages, mode=mode):
    opens = piece.is_control and piece.text in (markup.THINK, markup.THINK_END)
    if piece.is_control and piece.text in (markup.USER, markup.ASSISTANT):
      is_reply = False  # Sections on tools show an opener, too.
    elif not is_reply and opens:
      text, is_reply, thinks = '', True, piece.text == markup.THINK
    elif is_reply:
      text += piece.text
      if piece.is_control and piece.text == markup.EOS:
        found.append((thinks, text))
        is_reply = False
  return found


def check_round_trip(messages, mode):
  for message, completion in completions(messages, mode):
    assert parse(completion, mode=mode) == message
  # And in the whole, where the reasoning of earlier turns is gone.
  replies = [message for message in messages if message.role == 'assistant']
  last_user = max(
    i for i, m in enumerate(messages) if m.role in ('user', 'developer')
  )
  num_earlier = sum(m.role == 'assistant' for m in messages[:last_user])
  found = rendered_replies(messages, mode)
  for index, (message, (thinks, text)) in enumerate(
    zip(replies, found, strict=True)
  ):
    assert thinks == (mode == 'thinking' and index >= num_earlier)
    if not thinks:
      message = dataclasses.replace(message, reasoning='')
    assert parse(text, mode='thinking' if thinks else 'chat') == message


def run(number: int, *, seed: int) -> int:
  """Checks so many conversations and returns how many replies they have."""
  rng = random.Random(seed)
  replies = 0
  for _ in range(number):
    messages, mode = chat_conversations.conversation(rng)
    check_round_trip(messages, mode)
    replies += sum(message.role == 'assistant' for message in messages)
  return replies


if __name__ == '__main__':
  num_replies = run(int(sys.argv[1]), seed=int(sys.argv[2]))
  print(f'{sys.argv[1]} conversations, {num_replies} replies: all came back')
