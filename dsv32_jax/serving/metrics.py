"""What Prometheus reads at /metrics."""

from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import (
  CounterMetricFamily,
  GaugeMetricFamily,
  Metric,
)

from dsv32_jax.inference.engine_config import EngineStats

# fmt: off
_SECONDS = (
  0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250
)
_TOKEN_SECONDS = (
  0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5
)
# fmt: on

# EngineStats field -> name and help; counters end in _total.
_GAUGES = {
  'waiting': ('queue_requests', 'Requests without a place in the batch.'),
  'running': ('running_requests', 'Requests in the batch.'),
  'free_pages': ('free_pages', 'Cache pages that no request holds.'),
  'total_pages': ('pages', 'Cache pages in all.'),
}
_COUNTERS = {
  'prompt_tokens': ('prompt_tokens', 'Prompt tokens run through the model.'),
  'new_tokens': ('new_tokens', 'Tokens generated.'),
  'steps': ('decode_rows', 'Decode steps, of rows of the batch.'),
  'drafted': ('drafted_tokens', 'Tokens drafted by the MTP module.'),
  'accepted': ('accepted_tokens', 'Drafted tokens that stood.'),
}


class Metrics:
  """The metrics of one service, in a registry of their own.

  Attributes:
    registry: what /metrics shows.
    requests: by path and HTTP status; 499 is a client that left.
    request_seconds: from the request's first byte to the answer's last one, by
      path.
    first_token_seconds: from the request to its first token.
    token_seconds: between tokens, averaged over each choice.
  """

  def __init__(self, stats: Callable[[], EngineStats]):
    self.registry = prometheus_client.CollectorRegistry()
    self.requests = prometheus_client.Counter(
      'dsv32_requests',
      'Answered requests, by path and HTTP status.',
      ('path', 'status'),
      registry=self.registry,
    )
    self.request_seconds = prometheus_client.Histogram(
      'dsv32_request_seconds',
      'From the request to the end of the answer.',
      ('path',),
      buckets=_SECONDS,
      registry=self.registry,
    )
    self.first_token_seconds = prometheus_client.Histogram(
      'dsv32_first_token_seconds',
      'From the request to its first token.',
      buckets=_SECONDS,
      registry=self.registry,
    )
    self.token_seconds = prometheus_client.Histogram(
      'dsv32_token_seconds',
      'Between tokens, averaged over a choice.',
      buckets=_TOKEN_SECONDS,
      registry=self.registry,
    )
    self.registry.register(_EngineCollector(stats))
    # Resident memory and CPU time, on Linux.
    prometheus_client.ProcessCollector(registry=self.registry)

  def render(self) -> bytes:
    return prometheus_client.generate_latest(self.registry)


class _EngineCollector:
  """Reads the engine's own counts when they are asked for."""

  def __init__(self, stats: Callable[[], EngineStats]):
    self._stats = stats

  def describe(self) -> list[Metric]:
    # Nothing: the registry would collect once to find the names.
    return []

  def collect(self) -> Iterator[Metric]:
    stats = self._stats()
    for field, (name, text) in _GAUGES.items():
      yield GaugeMetricFamily(f'dsv32_{name}', text, getattr(stats, field))
    for field, (name, text) in _COUNTERS.items():
      yield CounterMetricFamily(f'dsv32_{name}', text, getattr(stats, field))
    finished = CounterMetricFamily(
      'dsv32_finished', 'Choices that ended, by reason.', labels=['reason']
    )
    for reason, count in stats.finished.items():
      finished.add_metric([reason], count)
    yield finished
