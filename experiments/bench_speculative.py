r"""What drafting with the MTP module saves on a trained model's own text.

  python experiments/continued_training.py --workdir=runs/mtp \
    --config=experiments/configs/continued_training.py:cpu \
    --config.model.num_nextn_predict_layers=1
  python experiments/bench_speculative.py --workdir=runs/mtp

Prompts are held-out documents, cut off; every one is continued with and without
drafting, greedily and at temperature 1. Printed for each: the share of drafts
that stand, steps of the main model a new token, and seconds. Greedy tokens must
be the same with and without; the script ends with status 1 if they are not.
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import flags

from dsv32_jax import checkpoints, data, inference
from dsv32_jax.config import convert
from dsv32_jax.config.training import RunConfig
from dsv32_jax.training import flags as run_flags

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Work directory of a run with an MTP module.', required=True
)
_STAGE = flags.DEFINE_string('stage', 'sparse_training', 'Which of its stages.')
_PROMPTS = flags.DEFINE_integer('prompts', 16, 'Held-out documents.')
_PROMPT_TOKENS = flags.DEFINE_integer('prompt_tokens', 256, 'Tokens of each.')
_NEW_TOKENS = flags.DEFINE_integer('new_tokens', 128, 'To continue by.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Requests that run together.')
_JSONL = flags.DEFINE_string('jsonl', None, 'Also append the figures here.')


def _prompts(config: RunConfig, workdir: pathlib.Path) -> list[tuple[int, ...]]:
  stage = config.stages[_STAGE.value]
  tokenizer = data.load_tokenizer(str(workdir / 'tokenizer'))
  (batch,) = data.held_out_batches(
    stage.data,
    data.load_corpora(stage.data, tokenizer),
    seq_len=_PROMPT_TOKENS.value,
    batch_size=_PROMPTS.value,
    num_batches=1,
  )
  return [tuple(row.tolist()) for row in batch['tokens']]


def main(argv: list[str]) -> None:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  saved = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  config = convert.from_dict(RunConfig, saved['config'])
  prompts = _prompts(config, workdir)
  loaded = checkpoints.load_stage(workdir / 'stages' / _STAGE.value)
  model, variables = inference.unroll(*loaded)
  greedy_tokens = {}
  for name, sampling in (
    ('greedy', inference.GREEDY),
    ('temperature 1', inference.Sampling(temperature=1.0)),
  ):
    for speculative in (False, True):
      engine = inference.Engine(
        model,
        variables,
        inference.EngineConfig(
          max_batch=_BATCH.value,
          max_tokens=_PROMPT_TOKENS.value + _NEW_TOKENS.value,
          speculative=speculative,
        ),
      )

      def run(number_of_tokens, engine=engine, sampling=sampling):
        tickets = [
          engine.submit(
            inference.Request(
              prompt=prompt,
              max_new_tokens=number_of_tokens,
              sampling=sampling,
              seed=seed,
            )
          )
          for seed, prompt in enumerate(prompts)
        ]
        engine.run()
        return [ticket.result().tokens for ticket in tickets]

      run(2)  # Compiles.
      before = engine.stats()
      begin = time.perf_counter()
      tokens = run(_NEW_TOKENS.value)
      seconds = time.perf_counter() - begin
      after = engine.stats()
      if sampling is inference.GREEDY:
        greedy_tokens[speculative] = tokens
      figures = {
        'sampling': name,
        'speculative': speculative,
        'steps_per_token': (after.steps - before.steps)
        / (after.new_tokens - before.new_tokens - len(prompts)),
        'drafted': after.drafted - before.drafted,
        'accepted': after.accepted - before.accepted,
        'seconds': seconds,
        **dataclasses.asdict(after),
      }
      share = figures['accepted'] / max(figures['drafted'], 1)
      print(
        f'{name:14s} drafting {speculative!s:5s} accepted {share:6.1%}, '
        f'{figures["steps_per_token"]:.3f} steps of the main model a token, '
        f'{seconds:.1f} s'
      )
      if _JSONL.value:
        with open(_JSONL.value, 'a', encoding='utf-8') as file:
          file.write(json.dumps(figures) + '\n')
  if greedy_tokens[False] != greedy_tokens[True]:
    print('greedy tokens differ with drafting', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  run_flags.run(main)
