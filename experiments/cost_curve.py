r"""Cost of a token against its position, sparse and dense: the paper's figure.

Measures one layer of the model on one GPU: its attention block (projections
and caches included) over caches of several lengths, and its experts' share.
Multiplied by the number of layers and the price of a GPU-hour that is the cost
of a token, laid beside the curves of arXiv:2512.02556 in a plot.

  python experiments/cost_curve.py                      # one H100, four minutes
  python experiments/cost_curve.py --phases=decode --jsonl=decode.jsonl
  python experiments/cost_curve.py --plot_only          # from what is saved
  python experiments/cost_curve.py --preset=tiny --positions=64,256 --batch=2 \
    --chunk=64 --prefill_gpus=1 --decode_gpus=1 --directory=/tmp/curve

Measured: the attention block of one request's prompt, a chunk at a time
(prefill), or of one token of each of --batch requests (decode), at each
position, sparse and dense in turns; the matrix products of one GPU's experts
(evenly loaded) and of the shared expert. Dense prefill runs in MHA mode and
expands the cached latents once a chunk; dense decoding in MQA mode.
Extrapolated: every layer costs the same (the first three, without experts,
too); every GPU has the same load. Left out: traffic between GPUs, the router,
norms beside the attention's, embedding and output head, sampling, idle GPUs.
Weights and latents are bfloat16, cached indexer keys fp8 (the paper's service:
H800, fp8 weights, its own mix of batches), so compare shapes before prices.

Experts are shared out over --prefill_gpus and --decode_gpus, by default the
deployment of DeepSeek-V3 (arXiv:2412.19437, section 3.4: 32 GPUs for prefill;
for decoding one expert a GPU). Weights and --batch decide the price of short
contexts, caches that of long ones.

Printed and saved: dollars per million tokens, the position from which sparse
is cheaper, dense over sparse at the last position; both for the paper's curves
too (read off its figure by eye, +-5%).
"""

import dataclasses
import json
import pathlib

import jax
from absl import app, flags

from dsv32_jax import presets
from dsv32_jax.evaluation import cost_curve, serving_cost

_PRESET = flags.DEFINE_string('preset', 'deepseek_v32_671b', 'The model.')
_PHASES = flags.DEFINE_list('phases', ['prefill', 'decode'], 'What to measure.')
_POSITIONS = flags.DEFINE_list(
  'positions', ['0', '2048', '8192', '32768', '131072'], 'Cached tokens.'
)
_BATCH = flags.DEFINE_integer('batch', 64, 'Requests decoded together.')
_CHUNK = flags.DEFINE_integer('chunk', 8192, 'Tokens of a chunk of prefill.')
_PREFILL_GPUS = flags.DEFINE_integer(
  'prefill_gpus', 32, 'GPUs that share the experts in prefill.'
)
_DECODE_GPUS = flags.DEFINE_integer(
  'decode_gpus', 256, 'GPUs that share the experts in decoding.'
)
_QUERY_CHUNK = flags.DEFINE_integer('query_chunk', 4096, 'In a chunk, sparse.')
_PRICE = flags.DEFINE_float('price', 2.0, 'Dollars of a GPU-hour.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Rounds; the median counts.')
_CALLS = flags.DEFINE_integer('calls', 10, 'Calls of decoding in a round.')
_DIRECTORY = flags.DEFINE_string(
  'directory', 'experiments/results/cost_curve', 'For figures and the plot.'
)
_JSONL = flags.DEFINE_string(
  'jsonl', None, 'Measurements are added here; None for the directory.'
)
_PLOT_ONLY = flags.DEFINE_bool('plot_only', False, 'Measure nothing.')
_PLOT = flags.DEFINE_bool('plot', True, 'Draw the plot (needs matplotlib).')


def _measure(cfg, phase, path):
  decodes = phase == 'decode'
  gpus = (_DECODE_GPUS if decodes else _PREFILL_GPUS).value
  batch = _BATCH.value if decodes else 1
  new = 1 if decodes else _CHUNK.value
  experts = serving_cost.experts_seconds(
    cfg, tokens=batch * new, experts=max(1, cfg.n_routed_experts // gpus)
  )
  print(f'{phase}: experts {1e6 * experts / (batch * new):.3f} us a token')
  for cached in sorted(int(x) for x in _POSITIONS.value):
    if decodes and cached == 0:
      continue
    work = serving_cost.Workload(
      cfg=cfg,
      layers=1,
      batch=batch,
      # Decoding: the new token included.
      cached=cached - 1 if decodes else cached,
      new=new,
    )
    operands = serving_cost.make(work)
    timings, operands = serving_cost.alternate(
      {
        mode: serving_cost.Program.build(work, mode, operands)
        for mode in serving_cost.MODES
      },
      operands,
      rounds=_ROUNDS.value,
      calls=_CALLS.value if decodes else 1,
    )
    del operands
    for mode, timing in timings.items():
      record = {
        'phase': phase,
        'mode': mode,
        'preset': _PRESET.value,
        'cached': cached,
        # A chunk's tokens are at all of its positions: the middle counts.
        'position': cached + (0 if decodes else new / 2),
        'tokens': batch * new,
        'gpus': gpus,
        'attention_us': 1e6 * timing.seconds / (batch * new),
        'experts_us': 1e6 * experts / (batch * new),
        'finite': timing.finite,
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
      }
      with path.open('a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')
      print(
        f'  {cached:7d} cached, {mode:6s}: attention block '
        f'{record["attention_us"]:9.3f} us a token',
        flush=True,
      )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  unknown = sorted(set(_PHASES.value) - set(cost_curve.PHASES))
  if unknown:
    raise app.UsageError(
      f'--phases: got {unknown}, expected {cost_curve.PHASES}'
    )
  cfg = presets.get(_PRESET.value)
  longest = max(int(x) for x in _POSITIONS.value) + _CHUNK.value
  cfg = dataclasses.replace(
    cfg,
    query_chunk=_QUERY_CHUNK.value,
    max_position_embeddings=max(longest, cfg.max_position_embeddings),
  )
  directory = pathlib.Path(_DIRECTORY.value)
  directory.mkdir(parents=True, exist_ok=True)
  path = pathlib.Path(_JSONL.value or directory / 'cost_curve.jsonl')
  if not _PLOT_ONLY.value:
    for phase in _PHASES.value:
      _measure(cfg, phase, path)
  records = cost_curve.read(path)
  curves = cost_curve.curves(
    records, layers=cfg.num_hidden_layers, price=_PRICE.value
  )
  summary = cost_curve.summarise(curves)
  for line in cost_curve.lines(summary):
    print(line)
  text = json.dumps({'curves': curves, 'summary': summary}, indent=1)
  (directory / 'cost_curve.json').write_text(text, encoding='utf-8')
  if _PLOT.value:
    cost_curve.draw(curves, directory / 'cost_curve.png', records[-1]['device'])
    print(f'{directory / "cost_curve.png"} written')


if __name__ == '__main__':
  app.run(main)
