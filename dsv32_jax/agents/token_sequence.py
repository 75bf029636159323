"""One user turn as one list of tokens that is only ever appended to.

What the policy sampled stays as it was sampled, also where the tokenizer would
spell the same text otherwise. What follows a reply (the results of its calls
and the opener) is encoded by itself: EOS, which is a token of its own in every
vocabulary, parts the two, so nothing before it can change.
"""

from collections.abc import Sequence

from dsv32_jax import chat
from dsv32_jax.chat import Message, Mode

# Stands for what came before a reply; none of it is in what is taken.
_BEFORE = Message(role='user')


class TokenSequence:
  """The tokens of an episode, and which of them the policy sampled.

  >>> from dsv32_jax.data.tokenizer import ByteTokenizer
  >>> start = [Message(role='user', content='hi')]
  >>> sequence = TokenSequence(start, ByteTokenizer(), mode='chat')
  >>> sequence.add_reply(Message(role='assistant', content='A'), 'A')
  2
  >>> sequence.tokens[-2:], sequence.is_policy[-3:]
  ([65, 257], [False, True, True])

  Attributes:
    tokens: ids.
    is_policy: of each, whether the policy sampled it.
  """

  def __init__(
    self,
    start: Sequence[Message],
    tokenizer: chat.ChatTokenizer,
    *,
    mode: Mode,
  ):
    """Begins with the messages before the first reply.

    Raises:
      ChatError: they cannot be encoded.
    """
    self._tokenizer = tokenizer
    self._mode: Mode = mode
    self._controls = chat.ControlTokens.from_tokenizer(tokenizer)
    self.tokens = self._encode(start)
    self.is_policy = [False] * len(self.tokens)

  def add_reply(
    self, message: Message | None, text: str, sampled: Sequence[int] = ()
  ) -> int:
    """Appends a reply.

    Args:
      message: as it was parsed, or None.
      text: as it was written; it is encoded if there is no message.
      sampled: its ids, from a policy that has them.

    Returns:
      How many ids are the policy's.

    Raises:
      ChatError: a message that cannot be encoded.
    """
    if sampled:
      ids = list(map(int, sampled))
    elif message is None:
      ids = [int(token) for token in self._tokenizer.encode(text)]
    else:
      ids = self._encode_reply(message)
    self._append(ids, is_policy=True)
    # Behind calls the grammar lets the policy leave EOS out. What follows
    # stands behind one all the same.
    eos = self._controls.ids[chat.EOS]
    if message is not None and ids[-1] != eos:
      self._append([eos], is_policy=False)
    return len(ids)

  def add_results(self, reply: Message, results: Sequence[Message]) -> None:
    """Appends the results of a reply's calls, and the opener of the next reply.

    Raises:
      ChatError: results that do not go with the calls.
    """
    before = self._encode([_BEFORE, reply])
    ids = self._encode([_BEFORE, reply, *results])
    if ids[: len(before)] != before:
      raise AssertionError('the results changed the tokens of the reply')
    self._append(ids[len(before) :], is_policy=False)

  def _encode_reply(self, message: Message) -> list[int]:
    mode, ids = self._mode, []
    if mode == 'thinking' and not message.reasoning and not message.tool_calls:
      # A reply without a thought: the policy may write it, the template won't.
      mode = 'chat'
      ids = self._thoughts_end()
    before = len(self._encode([_BEFORE], mode))
    return ids + self._encode([_BEFORE, message], mode)[before:]

  def _thoughts_end(self) -> list[int]:
    if chat.THINK_END in self._controls.ids:
      return [self._controls.ids[chat.THINK_END]]
    return [int(token) for token in self._tokenizer.encode(chat.THINK_END)]

  def _encode(
    self, messages: Sequence[Message], mode: Mode | None = None
  ) -> list[int]:
    return chat.encode(
      messages,
      self._tokenizer,
      mode=mode or self._mode,
      controls=self._controls,
    )

  def _append(self, ids: Sequence[int], *, is_policy: bool) -> None:
    self.tokens += ids
    self.is_policy += [is_policy] * len(ids)
