"""A model that is talked to: text in, text or messages out."""

from collections.abc import Callable, Sequence
from typing import Any

from dsv32_jax import chat
from dsv32_jax.inference.engine import Engine
from dsv32_jax.inference.engine_config import EngineConfig
from dsv32_jax.inference.requests import Completion, Progress, Request
from dsv32_jax.inference.sampling import GREEDY, Sampling
from dsv32_jax.modules.transformer import DeepSeekV32

_CONFIG = EngineConfig(max_batch=4)


class Generator:
  """An engine with a tokenizer, for notebooks and scripts.

  For many requests at a time submit to an `Engine`; to serve others, use
  `experiments/serve.py`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from dsv32_jax import DeepSeekV32, data, inference, presets
    >>> model = DeepSeekV32(presets.tiny())
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> generator = inference.Generator(model, variables, data.ByteTokenizer())
    >>> reply = generator.chat('2+2?', max_new_tokens=4)
    >>> reply.role
    'assistant'

  Attributes:
    engine: runs the requests.
    tokenizer: of the model.
  """

  def __init__(
    self,
    model: DeepSeekV32,
    variables: dict,
    tokenizer: chat.ChatTokenizer,
    *,
    config: EngineConfig = _CONFIG,
  ):
    """Takes memory for the caches; compiles nothing yet.

    Args:
      model: the model.
      variables: its variables.
      tokenizer: any of `dsv32_jax.data`.
      config: of the engine.
    """
    self.tokenizer = tokenizer
    self.engine = Engine(model, variables, config, tokenizer=tokenizer)

  def complete(
    self,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_text: Callable[[str], Any] | None = None,
  ) -> Completion:
    """Continues plain text.

    Args:
      prompt: text; no token is put in front of it.
      max_new_tokens: at most.
      sampling: how tokens are drawn.
      seed: of the draws.
      stop: strings that end the text and are not in it.
      on_text: called with new text as it comes.
    """
    ids = tuple(int(token) for token in self.tokenizer.encode(prompt))
    return self._run(
      ids,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      seed=seed,
      stop_strings=tuple(stop),
      on_text=on_text,
    )

  def chat(
    self,
    messages: str | Sequence[chat.Message],
    *,
    tools: Sequence[chat.ToolSpec] = (),
    mode: chat.Mode = 'chat',
    max_new_tokens: int = 1024,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    recover: bool = True,
    on_text: Callable[[str], Any] | None = None,
  ) -> chat.Message:
    """The assistant's next message.

    Args:
      messages: a conversation, or what its only user says.
      tools: that the assistant may call.
      mode: 'chat' or 'thinking'.
      max_new_tokens: at most.
      sampling: how tokens are drawn.
      seed: of the draws.
      recover: take what can be read of a reply that breaks the format, as of
        one that was cut off; False raises.
      on_text: called with new text as it comes, in the format of the model.

    Raises:
      chat.ChatError: a conversation that a reply cannot follow.
      chat.ParseError: a reply that breaks the format, unless it may recover.
    """
    if isinstance(messages, str):
      messages = (chat.Message(role='user', content=messages),)
    chat.check_ready(messages, mode=mode)
    messages = chat.with_request(messages, tools=tuple(tools))
    completion = self._run(
      tuple(chat.encode(messages, self.tokenizer, mode=mode)),
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      seed=seed,
      on_text=on_text,
    )
    controls = chat.ControlTokens.from_tokenizer(self.tokenizer)
    return chat.parse(
      controls.decode(completion.tokens, self.tokenizer),
      mode=mode,
      tools=tuple(tools) or None,
      recover=recover,
    )

  def _run(
    self,
    prompt: tuple[int, ...],
    *,
    max_new_tokens: int,
    on_text: Callable[[str], Any] | None,
    **options: Any,
  ) -> Completion:
    room = self.engine.max_tokens - len(prompt)
    request = Request(
      prompt=prompt,
      # What does not fit is refused by the engine, with its reason.
      max_new_tokens=max(1, min(max_new_tokens, room)),
      stop_ids=(self.tokenizer.eos_id,),
      **options,
    )

    def report(progress: Progress) -> None:
      if on_text is not None and progress.text:
        on_text(progress.text)

    ticket = self.engine.submit(request, report)
    self.engine.run()
    completion = ticket.result(0)
    if completion.finish_reason == 'error':
      raise RuntimeError(completion.error)
    return completion
