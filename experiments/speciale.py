r"""Runs a Speciale protocol over held-out derivation tasks, and reports.

    python experiments/speciale.py --protocol=refine --workdir=runs/refine \
      --checkpoint=runs/speciale --source='{"kinds": ["compute"]}'
    python experiments/speciale.py --protocol=search --workdir=runs/search \
      --base_url=http://localhost:8000/v1 --model=deepseek-v3.2

'refine' lets the model mend its own proofs by its own analyses, 'search'
refines a pool of verified proofs, 'contest' samples many and hands in few, and
'label' labels derivations by many analyses. The model is a checkpoint of ours
(the directory of a stage or of an RL run) or an OpenAI-compatible endpoint,
which is told the rules in every prompt. Sizes: --config.search.proofs=64 and so
on (docs/speciale.md). A run that was ended goes on with the same command; rows
and table are written to WORKDIR.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from dsv32_jax.rl.speciale import protocols, report, session, sources
from dsv32_jax.training import flags as run_flags

_SIZES = config_flags.DEFINE_config_dict(
  'config',
  config_dict.ConfigDict(
    dataclasses.asdict(protocols.ProtocolConfig(protocol='refine'))
  ),
  'Sizes of the protocols.',
)
_PROTOCOL = flags.DEFINE_enum(
  'protocol', 'refine', protocols.PROTOCOLS, 'What to run.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where rows and table go; of one run.', required=True
)
_SOURCE = flags.DEFINE_string(
  'source', '{}', 'Options of the tasks, JSON; those that were trained on.'
)
_MODE = flags.DEFINE_enum(
  'mode', 'thinking', ['thinking', 'chat'], 'Of replies.'
)
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'A model of ours.')
_BASE_URL = flags.DEFINE_string('base_url', None, 'An endpoint instead.')
_MODEL = flags.DEFINE_string('model', '', "The model's name at the endpoint.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', 128, 'Of a reply; what is longer is cut off.'
)
_MAX_BATCH = flags.DEFINE_integer('max_batch', 64, 'Replies at a time.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'Of the draws.')
_TOP_P = flags.DEFINE_float('top_p', 0.95, 'Nucleus of the draws.')


def main(argv: list[str]) -> None:
  del argv
  values = _SIZES.value.to_dict() | {'protocol': _PROTOCOL.value}
  config = session.protocol_config(values)
  role = 'speciale/review' if config.protocol == 'label' else 'speciale/proof'
  options: dict = {
    'mode': _MODE.value,
    'explains': _BASE_URL.value is not None,
    **json.loads(_SOURCE.value),
  }
  mode: Any = _MODE.value
  policy = session.make_policy(
    checkpoint=_CHECKPOINT.value,
    base_url=_BASE_URL.value,
    model=_MODEL.value,
    api_key=os.environ.get('DSV32_API_KEY'),
    mode=mode,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    parallel=_MAX_BATCH.value,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
  )
  workdir = pathlib.Path(_WORKDIR.value)
  path = workdir / f'{config.protocol}.jsonl'
  rows = protocols.run(policy, sources.make(role, options), config, path)
  text = report.table(config.protocol, rows)
  (workdir / f'{config.protocol}.md').write_text(text, encoding='utf-8')
  print(text)


if __name__ == '__main__':
  run_flags.run(main)
