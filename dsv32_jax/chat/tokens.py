"""A conversation as token ids, control tokens being the template's alone.

Any tokenizer will do that encodes plain text and names its special ids; those
of `dsv32_jax.data` fit.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from dsv32_jax.chat import markup
from dsv32_jax.chat.results import settled
from dsv32_jax.chat.template import render_pieces
from dsv32_jax.chat.types import Message, Mode


@runtime_checkable
class ChatTokenizer(Protocol):
  """What is used of a tokenizer.

  Attributes:
    special_ids: id of each special string.
    bos_id, eos_id: stand in for the special strings of the same meaning where
      `special_ids` does not have them.
  """

  @property
  def special_ids(self) -> Mapping[str, int]: ...

  @property
  def bos_id(self) -> int: ...

  @property
  def eos_id(self) -> int: ...

  def encode(self, text: str) -> Any:
    """Returns the ids of text; special strings in it are plain text."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlTokens:
  """The ids of the control strings in one vocabulary.

  Attributes:
    ids: by string (`markup.CONTROL_STRINGS`, and `markup.DSML`).
    missing: control strings without an id. They are encoded as plain text, so
      for them, and only for them, content that reads the same is the same.
  """

  ids: Mapping[str, int]
  missing: tuple[str, ...] = ()

  @classmethod
  def from_tokenizer(cls, tokenizer: ChatTokenizer) -> 'ControlTokens':
    """Looks the strings up by name.

    BOS and EOS fall back to the tokenizer's own structural tokens. A vocabulary
    of another family has the other strings as plain text, which works, though
    without protection against content that contains them.
    """
    ids = {markup.BOS: tokenizer.bos_id, markup.EOS: tokenizer.eos_id}
    for text in (*markup.CONTROL_STRINGS, markup.DSML):
      if text in tokenizer.special_ids:
        ids[text] = tokenizer.special_ids[text]
    return cls(
      ids=ids,
      missing=tuple(text for text in markup.CONTROL_STRINGS if text not in ids),
    )

  def decode(self, ids: Iterable[int], tokenizer: ChatTokenizer) -> str:
    """The text of ids, control tokens spelt as the parser expects them."""
    texts = {token: text for text, token in self.ids.items()}
    out = []
    run: list[int] = []
    for token in map(int, ids):
      if token not in texts:
        run.append(token)
        continue
      out += [tokenizer.decode(run), texts[token]]
      run = []
    return ''.join(out) + tokenizer.decode(run)


def encode(
  messages: Sequence[Message],
  tokenizer: ChatTokenizer,
  *,
  mode: Mode = 'chat',
  keep_reasoning: bool = False,
  controls: ControlTokens | None = None,
) -> list[int]:
  """The token ids of a conversation, up to where the model goes on.

  Control strings become their ids where the template writes them. Where content
  has the same characters they are plain text: a user cannot end their turn or
  open the model's thoughts.

  Within a turn the list only grows: adding results, or replies and results, to
  the conversation adds ids behind those that it had. To keep that true, a last
  block of results that still lacks some gives no ids until it is whole; the
  tokens at its open end depend on what follows.

  Args:
    messages: the conversation.
    tokenizer: encodes the text between control tokens.
    mode: as for `render`.
    keep_reasoning: as for `render`.
    controls: made by `ControlTokens.from_tokenizer` unless given.

  Raises:
    ChatError: as `render`.

  >>> from dsv32_jax.data.tokenizer import ByteTokenizer
  >>> encode([Message(role='user', content='hi')], ByteTokenizer())
  [256, 264, 104, 105, 265, 260]
  """
  controls = controls or ControlTokens.from_tokenizer(tokenizer)
  ids: list[int] = []
  run: list[str] = []

  def end_run():
    if run:
      ids.extend(int(token) for token in tokenizer.encode(''.join(run)))
      run.clear()

  for text, is_control in render_pieces(
    settled(messages), mode=mode, keep_reasoning=keep_reasoning
  ):
    # Text runs on over a mark without an id, as it does in DeepSeek's encoder,
    # but never over the place of a control token.
    if not is_control or (text == markup.DSML and text not in controls.ids):
      run.append(text)
      continue
    end_run()
    if text in controls.ids:
      ids.append(controls.ids[text])
    else:
      run.append(text)
      end_run()
  end_run()
  return ids
