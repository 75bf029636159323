import dataclasses

import pytest

from dsv32_jax.rl.speciale import session
from dsv32_jax.rl.speciale.endpoint import EndpointPolicy
from dsv32_jax.rl.speciale.protocols import ProtocolConfig

ARGUMENTS = {
  'checkpoint': None,
  'base_url': None,
  'model': 'm',
  'mode': 'chat',
  'max_new_tokens': 8,
  'parallel': 2,
  'temperature': 1.0,
  'top_p': 1.0,
}


def test_protocol_config_reads_back_from_dicts():
  config = ProtocolConfig(protocol='search', tasks=3)
  assert session.protocol_config(dataclasses.asdict(config)) == config
  wrong = dataclasses.asdict(config) | {'tasks': 0}
  with pytest.raises(ValueError, match='tasks: got 0'):
    session.protocol_config(wrong)
  wrong = dataclasses.asdict(config)
  wrong['search'] = wrong['search'] | {'rounds': 0}
  with pytest.raises(ValueError, match='rounds: got 0'):
    session.protocol_config(wrong)


def test_policy_is_a_checkpoint_or_an_endpoint_and_not_both(tmp_path):
  endpoint = session.make_policy(**ARGUMENTS | {'base_url': 'http://x/v1'})
  assert isinstance(endpoint, EndpointPolicy)
  for both in ({}, {'checkpoint': 'a', 'base_url': 'http://x'}):
    with pytest.raises(ValueError, match='checkpoint: got'):
      session.make_policy(**ARGUMENTS | both)
  with pytest.raises(ValueError, match='found no tokenizer/'):
    session.make_policy(**ARGUMENTS | {'checkpoint': str(tmp_path / 'run')})
