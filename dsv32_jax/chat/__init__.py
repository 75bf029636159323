"""DeepSeek-V3.2's chat format: messages to tokens, completions to messages."""

from dsv32_jax.chat.errors import ChatError, ParseError, ParseErrorCode
from dsv32_jax.chat.events import (
  ArgumentsDelta,
  CallFinished,
  CallStarted,
  ContentDelta,
  Ended,
  Event,
  Failed,
  ReasoningDelta,
)
from dsv32_jax.chat.markup import (
  ASSISTANT,
  BOS,
  CONTROL_STRINGS,
  DSML,
  EOS,
  THINK,
  THINK_END,
  USER,
)
from dsv32_jax.chat.openai_format import (
  call_to_openai,
  message_to_openai,
  messages_from_openai,
  tool_to_openai,
  tools_from_openai,
)
from dsv32_jax.chat.parse import parse
from dsv32_jax.chat.schema import check_response_format
from dsv32_jax.chat.sections import Piece
from dsv32_jax.chat.stream import CompletionParser
from dsv32_jax.chat.template import (
  check_ready,
  render,
  render_pieces,
  with_request,
)
from dsv32_jax.chat.tokens import ChatTokenizer, ControlTokens, encode
from dsv32_jax.chat.types import Message, Mode, Role, ToolCall, ToolSpec

__all__ = [
  'ASSISTANT',
  'BOS',
  'CONTROL_STRINGS',
  'DSML',
  'EOS',
  'THINK',
  'THINK_END',
  'USER',
  'ArgumentsDelta',
  'CallFinished',
  'CallStarted',
  'ChatError',
  'ChatTokenizer',
  'CompletionParser',
  'ContentDelta',
  'ControlTokens',
  'Ended',
  'Event',
  'Failed',
  'Message',
  'Mode',
  'ParseError',
  'ParseErrorCode',
  'Piece',
  'ReasoningDelta',
  'Role',
  'ToolCall',
  'ToolSpec',
  'call_to_openai',
  'check_ready',
  'check_response_format',
  'encode',
  'message_to_openai',
  'messages_from_openai',
  'parse',
  'render',
  'render_pieces',
  'tool_to_openai',
  'tools_from_openai',
  'with_request',
]
