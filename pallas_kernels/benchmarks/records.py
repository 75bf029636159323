"""Records of measurements: figures, lines to print, lines of JSON."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.benchmarks import costs, measure


def machine(ceilings: measure.Ceilings) -> dict[str, Any]:
  """What every record says of the machine."""
  return {
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
    'matmul_tflops': round(ceilings.flops / 1e12, 3),
    'matmul': f'{ceilings.dtype} {ceilings.side}^3',
    'copy_gbps': round(ceilings.bytes / 1e9, 1),
  }


def figures(
  times: Sequence[float], cost: costs.Cost | None, ceilings: measure.Ceilings
) -> dict[str, Any]:
  """What a record says of the times, in seconds, of its rounds.

  Without a cost, of who does other work than the op, no rates.
  """
  median = statistics.median(times)
  milliseconds = {
    'ms': 1e3 * median,
    'ms_of_rounds': [round(1e3 * seconds, 5) for seconds in times],
  }
  if cost is None:
    return milliseconds
  return {
    **milliseconds,
    'tflops': cost.flops / median / 1e12,
    'gbps': cost.bytes / median / 1e9,
    'flops_per_byte': cost.flops / cost.bytes,
    'bound': ceilings.bound(cost),
    'fraction': ceilings.seconds(cost) / median,
  }


def append(path: str, record: dict) -> None:
  """Adds a record to a file of JSON lines."""
  with open(path, 'a', encoding='utf-8') as file:
    file.write(json.dumps(record) + '\n')


def describe(record: dict) -> str:
  """One line about a record."""
  name = '{op:24s} {shape:16s} {direction:9s} {implementation:11s}'
  if 'unavailable' in record:
    return (name + ' unavailable: {unavailable}').format(**record)
  text = (name + ' {ms:10.4f} ms').format(**record)
  if 'fraction' in record:
    text += (
      ' {tflops:9.3f} TFLOP/s {gbps:9.1f} GB/s {fraction:6.3f} of {bound}'
    ).format(**record)
  if record.get('error') is not None:
    text += f', error {record["error"]:.2g}'
  if 'ratio' in record:
    text += f', {record["ratio"]:.2f} of {record["rival"]}'
  return text + (f' ({record["remark"]})' if 'remark' in record else '')
