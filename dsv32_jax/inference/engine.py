"""Continuous batching: requests come and go, the device always runs a batch.

The engine has a number of places. A request waits until a place and enough
pages for its prompt and all its new tokens are free, so that one that has begun
always ends; the oldest request goes first. Every round runs one piece of a
prompt (or of several, as the config says), then some decode steps of all
requests whose prompt is complete. What a request gets depends on its own
prompt, seed and settings, and not on the others beside it.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dsv32_jax.config.model import AttentionMode
from dsv32_jax.inference import cached, engine_rows, rounds
from dsv32_jax.inference.active import NOT_FINITE, Active
from dsv32_jax.inference.detokenize import Decoder
from dsv32_jax.inference.engine_config import EngineConfig, EngineStats
from dsv32_jax.inference.pages import PagePool
from dsv32_jax.inference.requests import (
  Progress,
  QueueFull,
  Request,
  RequestTooLong,
)
from dsv32_jax.inference.tickets import Ticket
from dsv32_jax.inference.unroll import unroll
from dsv32_jax.inference.weights import laid_out_as
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import axes, parallel

_DEFAULTS = EngineConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """Decode steps that were begun.

  Attributes:
    running: the requests in it, by row.
    rows: what the device was told of them.
    token_B: their newest tokens.
    wanted: what it returns.
    attention: its mode.
    reach: tokens that a request may have after it.
    result: what `rounds.decode` returns, when it has.
  """

  running: dict[int, Active]
  rows: rounds.Rows
  token_B: Any
  wanted: rounds.Wanted
  attention: AttentionMode
  reach: int
  result: Any = None

  @property
  def program(self) -> tuple:
    """What its compiled program depends on."""
    shapes = tuple(x.shape for x in jax.tree.leaves(self.rows))
    return shapes, self.attention, self.wanted


class Engine:
  """Runs requests of different lengths together.

  `submit` and `cancel` may be called from any thread; `step` and `run` from one
  only, on which also all progress is reported (`engine_thread` has a thread
  for it).

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from dsv32_jax import DeepSeekV32, inference, presets
    >>> model = DeepSeekV32(presets.tiny())
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    >>> engine = inference.Engine(model, variables)
    >>> ticket = engine.submit(
    ...   inference.Request(prompt=(5, 6, 7), max_new_tokens=3)
    ... )
    >>> engine.run()
    >>> len(ticket.result().tokens)
    3
  """

  def __init__(
    self,
    model: DeepSeekV32,
    variables: dict,
    config: EngineConfig = _DEFAULTS,
    *,
    tokenizer: Decoder | None = None,
  ):
    """Takes memory for all places; compiles nothing yet.

    Args:
      model: the model; a scanned one is unrolled (a copy of the parameters).
      variables: its variables.
      config: sizes and switches.
      tokenizer: turns tokens into text; needed for text and stop strings.

    Raises:
      ValueError: a model without an indexer, speculation without an MTP module,
        or sizes that do not fit the model or the active layout.
    """
    self.config = config
    self._layout = parallel.active()
    self._tokenizer = tokenizer
    self._given = model
    self._model, self._variables = unroll(model, variables)
    cfg = self._model.cfg
    if config.speculative and not cfg.num_nextn_predict_layers:
      raise ValueError(
        'speculative: got True for a model without an MTP module, expected '
        'num_nextn_predict_layers 1'
      )
    groups = self._groups()
    longest = min(
      config.max_tokens or cfg.max_position_embeddings,
      cfg.max_position_embeddings,
    )
    pages_of_longest = -(-longest // config.page_size)
    num_pages = config.num_pages or config.max_batch * pages_of_longest
    if num_pages % groups:
      raise ValueError(
        f'num_pages: got {num_pages}, expected a multiple of {groups}, the '
        'groups of devices that the requests are spread over'
      )
    self._pool = PagePool(
      num_pages=num_pages // groups, page_size=config.page_size, groups=groups
    )
    self.max_tokens = min(longest, num_pages // groups * config.page_size)
    self._memory: rounds.Memory | None = self._init_memory()
    self._groups_count = groups
    self._lock = threading.Lock()
    self._numbers = itertools.count()
    self._waiting: collections.deque[Ticket] = collections.deque()
    self._cancelled: set[int] = set()
    self._active: dict[int, Active] = {}  # By place.
    self._counts: collections.Counter[str] = collections.Counter()
    self._ahead: _Call | None = None
    self._programs: dict[tuple, Any] = {}
    self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    self._seconds = {'prefill': 0.0, 'decode': 0.0}
    self._finished: collections.Counter[str] = collections.Counter()

  def submit(
    self,
    request: Request,
    on_progress: Callable[[Progress], None] | None = None,
  ) -> Ticket:
    """Adds a request to those that wait.

    Args:
      request: what to continue, and how.
      on_progress: called with what is new, on the thread that runs the engine;
        the last call has a `finish_reason`. It should return at once.

    Raises:
      QueueFull: as many requests wait as `max_waiting` allows.
      RequestTooLong: it could never fit.
      ValueError: ids outside the vocabulary, or stop strings without a
        tokenizer.
    """
    self._check(request)
    with self._lock:
      if len(self._waiting) >= self.config.max_waiting:
        raise QueueFull(
          f'{len(self._waiting)} requests wait already, at most '
          f'{self.config.max_waiting} may; try again later'
        )
      ticket = Ticket(next(self._numbers), request, on_progress)
      self._waiting.append(ticket)
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Ends a request at the engine's next round; nothing if it has ended."""
    with self._lock:
      if not ticket.done:
        self._cancelled.add(ticket.id)

  def step(self) -> bool:
    """Runs one round.

    Returns:
      False if there was nothing to do.
    """
    with parallel.use(self._layout):
      self._drop_cancelled()
      self._admit()
      pieces = self._next_pieces()
      if pieces:
        with self._timed('decode'):
          self._catch_up()
      # During a call that was begun ahead they are the call's.
      if self._memory is None and self._ahead is None and self._active:
        self._memory = self._init_memory()
      if pieces:
        with self._timed('prefill'):
          self._prefill(pieces)
        if self.config.fill_first and self._must_fill():
          return True
      running = self._running()
      if running:
        with self._timed('decode'):
          self._decode(running)
    return bool(pieces or running)

  def run(self) -> None:
    """Runs rounds until every request has ended."""
    while self.step():
      pass

  def compile_ahead(self, request: Request, *, threads: int = 4) -> None:
    """Compiles decode steps of every number of rows, several at a time.

    Else each is compiled when requests have ended so far that it is needed, and
    all others wait. With a layout over several devices that is so all the same.

    Args:
      request: like those that will come: what it records, its kind of
        truncation and its number of stop ids count, its prompt and seed do not.
      threads: programs that are compiled at a time.

    Raises:
      RuntimeError: requests wait or run.
    """
    self._check_idle('compile_ahead')
    if self._layout is not None:
      return
    if self._memory is None:
      self._memory = self._init_memory()
    active = Active(Ticket(-1, request, None), self._tokenizer)
    # As one that has begun.
    active.place, active.tokens = 0, [request.prompt[-1]]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      for program in [
        pool.submit(self._compile, self._described(width, [active]))
        for width in engine_rows.counts(self.config, self._groups_count)
      ]:
        program.result()

  def update_variables(self, variables: dict) -> None:
    """Hands over new weights of the same model, for all later requests.

    They are cast to the types, and laid out over the devices, of those that the
    engine was made with. Nothing is compiled again. While the new ones are
    made, the device holds both.

    Args:
      variables: of the model that the engine was made with (scanned, if that
        was).

    Raises:
      RuntimeError: requests wait or run; their caches are of the old weights.
      ValueError: variables of another model, naming the first that differs.
    """
    self._check_idle('update_variables')
    with parallel.use(self._layout):
      _, new = unroll(self._given, variables)
    self._variables = laid_out_as(new, self._variables)

  def release(self) -> None:
    """Gives the memory of the caches back until the next request.

    For a job that samples and trains in turns on the same devices.

    Raises:
      RuntimeError: requests wait or run.
    """
    self._check_idle('release')
    self._memory = self._ahead = None

  def fail(self, error: str) -> None:
    """Ends every request with an error; for when a round has raised."""
    self._end_all('error', error)

  def close(self) -> None:
    """Cancels every request."""
    self._end_all('cancelled')

  def stats(self) -> EngineStats:
    """What has been done, and what is held now."""
    with self._lock:
      waiting = len(self._waiting)
    counts = self._counts
    return EngineStats(
      waiting=waiting,
      running=len(self._active),
      free_pages=self._pool.num_free(),
      total_pages=self._pool.num_pages * self._groups_count,
      prompt_tokens=counts['prompt_tokens'],
      new_tokens=counts['new_tokens'],
      finished=dict(self._finished),
      steps=counts['steps'],
      decode_calls=counts['decode_calls'],
      prefill_s=self._seconds['prefill'],
      decode_s=self._seconds['decode'],
      drafted=counts['drafted'],
      accepted=counts['accepted'],
    )

  # What follows is called by the thread that runs the engine.

  @contextlib.contextmanager
  def _timed(self, what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    self._seconds[what] += time.perf_counter() - began

  def _groups(self) -> int:
    """Groups of devices that a batch of requests is cut over."""
    if self._layout is None:
      return 1
    names = self._layout.fitting_axes(axes.BATCH, self.config.max_batch)
    wanted = self._layout.size(*self._layout.axes_of(axes.BATCH))
    groups = self._layout.size(*names)
    if groups != wanted:
      raise ValueError(
        f'max_batch: got {self.config.max_batch}, expected a multiple of '
        f'{wanted}, the groups of devices that the mesh cuts requests over'
      )
    return groups

  def _check_idle(self, what: str) -> None:
    with self._lock:
      count = len(self._waiting) + len(self._active)
    if count:
      raise RuntimeError(
        f'{what}: called while {count} requests wait or run, expected none: '
        'run the engine until all have ended'
      )

  def _init_memory(self) -> rounds.Memory:
    cfg, config = self._model.cfg, self.config
    num_pages = self._pool.num_pages * self._groups()
    caches = cached.init_caches(
      cfg,
      count=cfg.num_hidden_layers + config.speculative,
      areas=num_pages,
      area_size=config.page_size,
      latent_format=config.latent_format,
      index_format=config.index_format,
    )
    return rounds.init_memory(
      cfg,
      places=config.max_batch,
      caches=caches[: cfg.num_hidden_layers],
      draft_cache=caches[-1] if config.speculative else None,
    )

  def _check(self, request: Request) -> None:
    vocab_size = self._model.cfg.vocab_size
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= vocab_size:
      raise ValueError(
        f'prompt: got ids from {low} to {high}, expected 0 to {vocab_size - 1}'
      )
    total = len(request.prompt) + request.max_new_tokens
    if total > self.max_tokens:
      raise RequestTooLong(
        f'prompt: got {len(request.prompt)} tokens and max_new_tokens '
        f'{request.max_new_tokens}, together {total}, expected at most '
        f'{self.max_tokens}'
      )
    if request.stop_strings and self._tokenizer is None:
      raise ValueError(
        'stop_strings: got some, expected none for an engine without a '
        'tokenizer'
      )

  def _drop_cancelled(self) -> None:
    with self._lock:
      cancelled, self._cancelled = self._cancelled, set()
      if not cancelled:
        return
      gone = [ticket for ticket in self._waiting if ticket.id in cancelled]
      for ticket in gone:
        self._waiting.remove(ticket)
    for ticket in gone:
      self._end(Active(ticket, self._tokenizer), 'cancelled')
    for active in list(self._active.values()):
      if active.ticket.id in cancelled:
        self._end(active, 'cancelled')

  def _admit(self) -> None:
    """Gives places and pages to those that have waited longest."""
    while True:
      with self._lock:
        if not self._waiting:
          return
        ticket = self._waiting[0]
        request = ticket.request
        count = self._pool.pages_for(
          len(request.prompt) + request.max_new_tokens
        )
        found = self._place_for(count)
        if found is None:
          return
        self._waiting.popleft()
      place, group = found
      pages = self._pool.take(count, group=group)
      assert pages is not None
      active = Active(ticket, self._tokenizer)
      active.place, active.group, active.pages = place, group, pages
      self._active[place] = active

  def _place_for(self, num_pages: int) -> tuple[int, int] | None:
    """A free place in the group with most free pages, if that has enough."""
    per_group = self.config.max_batch // self._groups_count
    free = [
      (self._pool.num_free(place // per_group), -place)
      for place in range(self.config.max_batch)
      if place not in self._active
    ]
    if not free or max(free)[0] < num_pages:
      return None
    place = -max(free)[1]
    return place, place // per_group

  def _next_pieces(self) -> list[Active | None]:
    """The oldest unfinished prompts, as many rows for every group.

    Empty if there is none; else the rows of a group are a power of two or the
    most there may be, so that few programs are compiled.
    """
    oldest: list[list[Active | None]] = [[] for _ in range(self._groups_count)]
    for active in sorted(self._active.values(), key=lambda a: a.ticket.id):
      rows = oldest[active.group]
      if active.is_prefilling and len(rows) < self.config.prefill_rows:
        rows.append(active)
    most = max(map(len, oldest))
    if not most:
      return []
    width = min(1 << (most - 1).bit_length(), self.config.prefill_rows)
    return [
      active
      for rows in oldest
      for active in rows + [None] * (width - len(rows))
    ]

  def _must_fill(self) -> bool:
    """Whether the next round can begin or go on with prompts."""
    self._admit()
    return any(active.is_prefilling for active in self._active.values())

  def _running(self) -> list[Active]:
    return [
      active for active in self._active.values() if not active.is_prefilling
    ]

  def _prefill(self, pieces: Sequence[Active | None]) -> None:
    chunk = self.config.prefill_chunk
    lengths = [a.length if a else 0 for a in pieces]
    sizes = [min(chunk, len(a.prompt) - a.length) if a else 0 for a in pieces]
    width = min(cached.bucket(max(sizes)), max(chunk, 1))
    tokens_BT = np.zeros((len(pieces), width), np.int32)
    follow_B = np.zeros((len(pieces),), np.int32)
    is_last = [False] * len(pieces)
    for row, active in enumerate(pieces):
      if active is not None:
        end = lengths[row] + sizes[row]
        tokens_BT[row, : sizes[row]] = active.prompt[lengths[row] : end]
        is_last[row] = end == len(active.prompt)
        if not is_last[row]:
          follow_B[row] = active.prompt[end]
    asked = [a for a in pieces if a is not None]
    wanted = engine_rows.wanted(asked, self._model.cfg.vocab_size)
    rows = engine_rows.rows(
      pieces,
      is_last,
      num_pages=self._table_width(asked, width),
      places=self.config.max_batch,
    )
    emission, self._memory = rounds.prefill(
      self._model,
      self._variables,
      self._memory,
      rows,
      tokens_BT,
      np.array(sizes, np.int32),
      follow_B,
      attention=engine_rows.attention(
        self.config, self._model.cfg, rows, wanted, prefill=True
      ),
      wanted=wanted,
    )
    emission = jax.device_get(emission)
    for row, active in enumerate(pieces):
      if active is not None:
        self._counts['prompt_tokens'] += sizes[row]
        active.add_prompt(sizes[row], emission, row)
        if not emission.finite_B[row]:
          self._end(active, 'error', NOT_FINITE)
        elif is_last[row]:
          self._take(active, jax.tree.map(lambda x: x[None], emission), row)

  def _decode(self, running: Sequence[Active]) -> None:
    call, self._ahead = self._ahead or self._call(running), None
    emissions, following = self._wait(call)
    # As far as the host knows; a call begun ahead keeps the rows it follows.
    needed = engine_rows.count(running, self.config, self._groups_count)
    is_packed = len(call.rows.place_B) <= needed
    if self.config.run_ahead and self._reaches(call) and is_packed:
      self._ahead = self._call_after(call, following)
    self._receive(call, emissions)
    if all(active.ended for active in running):
      self._catch_up()

  def _catch_up(self) -> None:
    """Reads what was begun ahead, so that the host knows of everything."""
    if self._ahead:
      call, self._ahead = self._ahead, None
      self._receive(call, self._wait(call)[0])

  def _call(self, running: Sequence[Active]) -> _Call:
    """Begins decode steps from what the host knows."""
    width = engine_rows.count(running, self.config, self._groups_count)
    return self._begin(self._described(width, running))

  def _described(self, width: int, running: Sequence[Active]) -> _Call:
    """Decode steps of these requests in so many rows."""
    rows_of = engine_rows.arrange(
      running, width, self.config, self._groups_count
    )
    wanted = engine_rows.wanted(running, self._model.cfg.vocab_size)
    rows = engine_rows.rows(
      rows_of,
      [a is not None for a in rows_of],
      num_pages=self._table_width(running, self._most_new()),
      places=self.config.max_batch,
    )
    return _Call(
      running={row: a for row, a in enumerate(rows_of) if a is not None},
      rows=rows,
      token_B=np.array([a.newest if a else 0 for a in rows_of], np.int32),
      wanted=wanted,
      attention=engine_rows.attention(
        self.config, self._model.cfg, rows, wanted, prefill=False
      ),
      reach=max(active.length for active in running) + self._most_new(),
    )

  def _call_after(self, call: _Call, following: Any) -> _Call:
    """Begins the next decode steps before those of `call` have been read."""
    rows, token_B = following
    return self._begin(
      dataclasses.replace(
        call,
        rows=rows,
        token_B=token_B,
        reach=call.reach + self._most_new(),
      )
    )

  def _begin(self, call: _Call) -> _Call:
    memory, self._memory = self._memory, None

    def decode() -> Any:
      with parallel.use(self._layout):
        program = self._programs.get(call.program)
        if program is not None:
          return program(
            variables=self._variables,
            memory=memory,
            rows=call.rows,
            token_B=call.token_B,
          )
        return rounds.decode(**self._arguments(call, memory))

    # A loop whose end the device decides holds up the thread that began it.
    result = self._thread.submit(decode)
    return dataclasses.replace(call, result=result)

  def _arguments(self, call: _Call, memory: Any) -> dict[str, Any]:
    return {
      'model': self._model,
      'variables': self._variables,
      'memory': memory,
      'rows': call.rows,
      'token_B': call.token_B,
      'num_steps': self.config.decode_steps,
      'attention': call.attention,
      'wanted': call.wanted,
    }

  def _compile(self, call: _Call) -> None:
    """Compiles decode steps of this kind, unless they are."""
    if call.program not in self._programs:
      lowered = rounds.decode.lower(**self._arguments(call, self._memory))
      self._programs[call.program] = lowered.compile()

  def _wait(self, call: _Call) -> tuple[Any, Any]:
    """Emissions, and what a call that goes on from there begins with."""
    emissions, self._memory, following = call.result.result()
    return emissions, following

  def _receive(self, call: _Call, emissions: Any) -> None:
    emissions = jax.device_get(emissions)
    given_W = emissions.count_B.sum(axis=1)
    self._counts['decode_calls'] += int(np.count_nonzero(given_W))
    for row, active in call.running.items():
      # One of a call begun ahead may have ended before it.
      if not active.ended:
        self._counts['steps'] += self._take(active, emissions, row)

  def _most_new(self) -> int:
    """Tokens that one call may add to a request."""
    return self.config.decode_steps * (1 + self.config.speculative)

  def _reaches(self, call: _Call) -> bool:
    """Whether the table of pages has room for the call after this one."""
    num_tokens = call.rows.pages_BN.shape[1] * self.config.page_size
    needed = call.reach + self._most_new()
    return num_tokens >= min(needed, self._longest)

  @property
  def _longest(self) -> int:
    # No request is longer; a draft may be fed past its end.
    return self.max_tokens + self.config.speculative

  def _table_width(self, actives: Sequence[Active], new_tokens: int) -> int:
    """Pages of a request in a call; few widths, as each is a program."""
    most = max(active.length for active in actives) + new_tokens
    most = min(max(most, self.config.table_tokens), self._longest)
    N = self._pool.pages_for(most)
    return min(1 << (N - 1).bit_length(), self._pool.num_pages)

  def _take(self, active: Active, emissions: Any, row: int) -> int:
    """Gives a request what steps have given its row; says how many steps."""
    given = active.add_steps(emissions, row)
    self._counts['new_tokens'] += given.num_tokens
    if emissions.drafted_B is not None:
      steps = slice(given.num_steps), row
      self._counts['drafted'] += int(emissions.drafted_B[steps].sum())
      self._counts['accepted'] += int(emissions.accepted_B[steps].sum())
    if given.progress.finish_reason is None:
      active.ticket.report(given.progress)
    else:
      self._release(active, given.progress)
    return given.num_steps

  def _end(self, active: Active, reason: Any, error: str | None = None) -> None:
    self._release(active, active.finish(reason, error))

  def _release(self, active: Active, last: Progress) -> None:
    """Frees what a request held, then tells whoever waits for it."""
    if active.place is not None:
      del self._active[active.place]
      self._pool.give_back(active.pages, group=active.group)
    assert last.finish_reason is not None
    self._finished[last.finish_reason] += 1
    active.ticket.end(active.completion())
    active.ticket.report(last)

  def _end_all(self, reason: Any, error: str | None = None) -> None:
    with self._lock:
      waiting = list(self._waiting)
      self._waiting.clear()
    for active in list(self._active.values()):
      self._end(active, reason, error)
    for ticket in waiting:
      self._end(Active(ticket, self._tokenizer), reason, error)
