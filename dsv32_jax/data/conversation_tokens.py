"""Chat conversations to token ids, and which of them a model is to learn.

Learnt is what an assistant writes: reasoning, answer, tool calls and the EOS
that ends them. The opener (`<think>` or `</think>`) is the template's, as are
user turns and results of tools, and no loss is taken on them: a reply in
inference starts behind the opener too (docs/chat.md).

In thinking mode a new user message drops the reasoning of the turns before it
(arXiv:2512.02556, section 3.2.1), which rewrites the sequence. So each user
turn of such a conversation is a sequence of its own, with the reasoning of that
turn alone, and only its replies are learnt. A conversation in chat mode stays
one sequence of which every reply is learnt.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dsv32_jax import chat
from dsv32_jax.config.data import SourceConfig
from dsv32_jax.data import sources
from dsv32_jax.data.conversations import Conversation, parse_line
from dsv32_jax.data.corpus import TokenCorpus
from dsv32_jax.data.tokenizer import Tokenizer


def sequences(
  conversation: Conversation,
  tokenizer: Tokenizer,
  *,
  controls: chat.ControlTokens | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
  """The training sequences of a conversation.

  Args:
    conversation: what to learn.
    tokenizer: must have an id for every control string.
    controls: made from the tokenizer unless given.

  Returns:
    (ids int32 [T], is_target bool [T]) of each sequence: its tokens, and which
    of them the model is to learn to write. A turn of a thinking conversation
    before the last whose replies have no reasoning is context only.

  Raises:
    ChatError: as `chat.encode`.
    ValueError: if the tokenizer has no ids for control strings (so that
      content could pass for them).

  >>> from dsv32_jax.data.tokenizer import ByteTokenizer
  >>> messages = chat.messages_from_openai(
  ...   [
  ...     {'role': 'user', 'content': 'hi'},
  ...     {'role': 'assistant', 'content': 'yo'},
  ...   ]
  ... )
  >>> [(ids, learnt)] = sequences(
  ...   Conversation(messages=messages), ByteTokenizer()
  ... )
  >>> ids.tolist(), ids[learnt].tolist()
  ([256, 264, 104, 105, 265, 260, 121, 111, 257], [121, 111, 257])
  """
  controls = controls or chat.ControlTokens.from_tokenizer(tokenizer)
  if controls.missing:
    raise ValueError(
      f'tokenizer {tokenizer.name!r}: has no id for '
      f'{", ".join(controls.missing)}, expected one for every control string '
      '(else content could pass for them)'
    )
  messages, mode = conversation.messages, conversation.mode
  turns = (
    [(messages[:end], first) for first, end in _turns(messages)]
    if mode == 'thinking'
    else [(messages, 0)]
  )
  found = []
  for number, (part, first) in enumerate(turns):
    is_last = number == len(turns) - 1
    replies = [m for m in part[first:] if m.role == 'assistant']
    thought = all(m.reasoning or m.tool_calls for m in replies)
    if not replies or (mode == 'thinking' and not is_last and not thought):
      continue
    found.append(_sequence(part, first, mode, tokenizer, controls))
  return found


def tokenize(
  conversations: Iterable[Conversation],
  tokenizer: Tokenizer,
  *,
  names: Iterable[str] | None = None,
  label: str = 'conversations in memory',
) -> TokenCorpus:
  """A corpus whose documents are the sequences of conversations.

  Args:
    conversations: at least one.
    tokenizer: as for `sequences`.
    names: of the conversations; None numbers them.
    label: the source in words, for messages.

  Raises:
    ValueError: as `sequences`, naming the conversation; if there is none.
  """
  conversations = tuple(conversations)
  if not conversations:
    raise ValueError(f'{label}: holds no conversation, expected at least one')
  names = (
    [f'{number:08d}' for number in range(len(conversations))]
    if names is None
    else list(names)
  )
  controls = chat.ControlTokens.from_tokenizer(tokenizer)
  found, labels = [], []
  for name, conversation in zip(names, conversations, strict=True):
    try:
      made = sequences(conversation, tokenizer, controls=controls)
    except ValueError as error:
      raise ValueError(f'{label}: {name}: {error}') from None
    found += made
    labels += [f'{name}#{turn}' for turn in range(len(made))]
  offsets = np.zeros(len(found) + 1, np.int64)
  np.cumsum([len(ids) for ids, _ in found], out=offsets[1:])
  dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
  tokens = np.concatenate([ids for ids, _ in found]).astype(dtype)
  is_target = np.concatenate([learnt for _, learnt in found])
  digest = hashlib.sha256(tokenizer.fingerprint.encode())
  for part in (tokens, is_target, offsets):
    digest.update(part.tobytes())
  return TokenCorpus(
    tokens=tokens,
    offsets=offsets,
    names=tuple(labels),
    label=label,
    pad_id=tokenizer.pad_id,
    fingerprint=digest.hexdigest()[:32],
    is_target=is_target,
  )


def load_corpus(
  source: SourceConfig,
  tokenizer: Tokenizer,
  *,
  split: sources.Split,
  held_out_fraction: float,
) -> TokenCorpus:
  """One split of a source of kind 'conversations'.

  A conversation is in one split with all its turns, chosen by its content, so
  that the same one in several files is on one side.

  Raises:
    ValueError: naming the file and line of a record that is not a
      conversation; if the path does not exist or the split is empty.
  """
  texts = dict(sources.jsonl_lines(source))
  keys = {name: hashlib.sha256(t).hexdigest() for name, t in texts.items()}
  held_out = sources.held_out_names(keys.values(), held_out_fraction)
  wanted = {
    name: text
    for name, text in texts.items()
    if split == 'all' or (keys[name] in held_out) == (split == 'held_out')
  }
  label = sources.label_of(source)
  if not wanted:
    raise ValueError(
      f'{label}: the {split} split is empty ({len(texts)} conversations, '
      f'held_out_fraction {held_out_fraction}), expected more of them'
    )
  return tokenize(
    [parse_line(name, text, label) for name, text in wanted.items()],
    tokenizer,
    names=wanted,
    label=label,
  )


def _turns(messages: Sequence[chat.Message]) -> Iterator[tuple[int, int]]:
  """First message and end of each user turn."""
  starts = [
    index
    for index, message in enumerate(messages)
    if message.role in ('user', 'developer')
  ]
  return zip(starts, [*starts[1:], len(messages)], strict=True)


def _sequence(
  messages: Sequence[chat.Message],
  first: int,
  mode: chat.Mode,
  tokenizer: Tokenizer,
  controls: chat.ControlTokens,
) -> tuple[np.ndarray, np.ndarray]:
  """Ids, and which are of replies from message `first` on."""
  ids = np.array(
    chat.encode(messages, tokenizer, mode=mode, controls=controls), np.int32
  )
  _check_controls(ids, messages, mode, tokenizer, controls)
  # Only the template writes control tokens, so the k-th EOS ends the k-th
  # reply, and the last opener before it begins it.
  ends = np.flatnonzero(ids == controls.ids[chat.EOS])
  opener = chat.THINK if mode == 'thinking' else chat.THINK_END
  openers = np.flatnonzero(ids == controls.ids[opener])
  replies = [i for i, m in enumerate(messages) if m.role == 'assistant']
  is_target = np.zeros(len(ids), bool)
  for end, index in zip(ends, replies, strict=True):
    if index >= first:
      start = openers[np.searchsorted(openers, end) - 1] + 1
      is_target[start : end + 1] = True
  return ids, is_target


def _check_controls(
  ids: np.ndarray,
  messages: Sequence[chat.Message],
  mode: chat.Mode,
  tokenizer: Tokenizer,
  controls: chat.ControlTokens,
) -> None:
  """Refuses a tokenizer that makes control tokens of content."""
  known = {controls.ids[text] for text in chat.CONTROL_STRINGS}
  wanted = [
    controls.ids[piece.text]
    for piece in chat.render_pieces(messages, mode=mode)
    if piece.is_control and piece.text in chat.CONTROL_STRINGS
  ]
  if [token for token in ids.tolist() if token in known] != wanted:
    raise ValueError(
      f'tokenizer {tokenizer.name!r}: makes control tokens of content, '
      'expected plain text there'
    )
