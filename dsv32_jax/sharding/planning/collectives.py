"""The collectives of one training step, with their bytes, from shapes alone.

Bytes are those of the larger side on one device, as in `hlo`: an all-gather's
result, a reduce-scatter's or all-reduce's operand, all that a device sends in
an all-to-all. Tokens travel by the dense exchange, with one round.
"""

from collections.abc import Iterator

from dsv32_jax.sharding import (
  attention_traffic,
  axes,
  expert_traffic,
)
from dsv32_jax.sharding.planning.messages import (
  Planned,
  compute_itemsize,
  has_mtp,
  runs_mtp,
)
from dsv32_jax.sharding.planning.request import Request
from dsv32_jax.sharding.planning.weight_collectives import weight_collectives
from dsv32_jax.sharding.planning.weights import Weight
from dsv32_jax.training import stages


def plan(request: Request, weights: tuple[Weight, ...]) -> list[Planned]:
  """Every collective of a step that is larger than a few vectors.

  Args:
    request: the layout.
    weights: of `weights.build`.
  """
  stage = stages.build(request.stage, request.model)
  found = [
    *weight_collectives(request, weights, stage),
    *_embedding(request, stage),
    *_experts(request, stage),
    *_attention(request, stage),
    *_shares(request, stage),
  ]
  return [one for one in found if one.axes and one.total]


def _embedding(request: Request, stage: stages.Stage) -> Iterator[Planned]:
  """Tokens go to the columns of the table, vectors come back (and again).

  See `embedding_region`: the table itself is never gathered.
  """
  cfg, parallel = request.model, request.parallel
  size = compute_itemsize(request)
  micro = request.stage.micro_batches
  width = tuple(
    name
    for name in parallel.axes_of(axes.EMBED)
    if name not in parallel.axes_of(axes.VOCAB)
  )
  members = parallel.size(*width)
  trains = int('main' in stage.trainable)
  lookups = (1 + (has_mtp(request) and runs_mtp(stage))) * micro
  vectors = request.tokens * cfg.hidden_size * size
  rows = parallel.axes_of(axes.BATCH) + parallel.axes_of(axes.SEQUENCE)
  table = cfg.vocab_size * cfg.hidden_size * size
  table //= members * parallel.shards(axes.VOCAB)
  for subject, kind, over, bytes_, count in (
    ('tokens', 'all-gather', width, 4 * members * request.tokens, lookups),
    ('vectors', 'all-to-all', width, vectors, lookups * (1 + trains)),
    (
      'vectors',
      'all-reduce',
      parallel.axes_of(axes.VOCAB),
      vectors,
      lookups * (1 + trains),
    ),
    (
      'gradients',
      'all-reduce',
      tuple(name for name in rows if name not in width),
      table,
      lookups * trains,
    ),
  ):
    yield Planned(
      subject=f'embedding: {subject}',
      kind=kind,
      axes=over,
      bytes=bytes_,
      count=count,
    )


def _experts(request: Request, stage: stages.Stage) -> Iterator[Planned]:
  """What `expert_parallel` sends, in every layer that has experts."""
  cfg, parallel = request.model, request.parallel
  if not cfg.num_moe_layers:
    return
  data, micro = request.stage.data, request.stage.micro_batches
  traffic = expert_traffic.layer_traffic(
    cfg, parallel, batch_size=data.batch_size // micro, seq_len=data.seq_len
  )
  messages = [*traffic.forward]
  if 'main' in stage.trainable:
    messages += traffic.backward
  # The warm-up ends with the MTP module's attention.
  layers = (cfg.num_moe_layers + has_mtp(request) * stage.lm_loss) * micro
  for message in messages:
    weights = message.what in ('experts', 'gradients of experts')
    yield Planned(
      subject=message.what if weights else f'experts: {message.what}',
      kind=message.kind,
      axes=message.axis_names,
      bytes=message.bytes,
      count=message.count * layers,
      # Weights and their gradients need no tokens, and wait for none.
      hides=weights,
    )
  yield from _loads(request, stage, layers)


def _loads(
  request: Request, stage: stages.Stage, layers: int
) -> Iterator[Planned]:
  """Counts of tokens by expert, and of each row for the balance loss."""
  cfg, parallel = request.model, request.parallel
  counts = 4 * cfg.n_routed_experts
  # Of a row: counts and mean scores, the counts made again.
  of_rows = 3 * request.rows * counts * stage.lm_loss
  for logical, bytes_ in (
    (axes.SEQUENCE, counts + of_rows),
    (axes.BATCH, counts),
  ):
    yield Planned(
      subject='loads of experts',
      kind='all-reduce',
      axes=parallel.axes_of(logical),
      bytes=bytes_,
      count=layers,
      hides=True,
    )


def _attention(request: Request, stage: stages.Stage) -> Iterator[Planned]:
  """What `attention_region` sends, in every layer."""
  cfg, data = request.model, request.stage.data
  micro = request.stage.micro_batches
  traffic = attention_traffic.layer_traffic(
    cfg,
    request.parallel,
    mode=stage.attention,
    batch_size=data.batch_size // micro,
    seq_len=data.seq_len,
    trains_main='main' in stage.trainable,
  )
  layers = cfg.num_hidden_layers + has_mtp(request)
  for message in (*traffic.forward, *traffic.backward):
    yield Planned(
      subject=f'attention: {message.what}',
      kind=message.kind,
      axes=message.axis_names,
      bytes=message.bytes,
      count=message.count * layers * micro,
    )


def _shares(request: Request, stage: stages.Stage) -> Iterator[Planned]:
  """Sums over shares of hidden widths and of the vocabulary.

  Those of the routed experts' width are in `_experts`, the embedding's in
  `_embedding`.
  """
  cfg, parallel = request.model, request.parallel
  micro, mtp = request.stage.micro_batches, has_mtp(request)
  trains = int('main' in stage.trainable)
  # The warm-up ends with the MTP module's attention.
  layers = cfg.num_hidden_layers + mtp * stage.lm_loss
  vectors = request.tokens * cfg.hidden_size * compute_itemsize(request)
  for subject, logical, count in (
    # Shared experts and dense layers; gate and up are summed one by one.
    ('outputs', axes.MLP, layers),
    ('gradients of inputs', axes.MLP, layers * 2 * trains),
    ('gradients of inputs', axes.VOCAB, (1 + mtp) * trains * stage.lm_loss),
  ):
    place = 'feed-forward' if logical == axes.MLP else 'output head'
    yield Planned(
      subject=f'{place}: {subject}',
      kind='all-reduce',
      axes=parallel.axes_of(logical),
      bytes=vectors,
      count=count * micro,
    )
