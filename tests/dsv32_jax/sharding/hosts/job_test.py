import pytest

from dsv32_jax.sharding.hosts.job import HostOptions


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'distributed': 'yes'}, "distributed: got 'yes', expected one of"),
    ({'coordinator_address': 'node1'}, "coordinator_address: got 'node1'"),
    ({'coordinator_address': 'node1:0'}, 'expected HOST:PORT'),
    ({'coordinator_address': 'node1:70000'}, 'expected HOST:PORT'),
    ({'num_processes': 0}, 'num_processes: got 0, expected at least 1'),
    ({'process_id': -1}, 'process_id: got -1, expected 0 or more'),
    (
      {'process_id': 2, 'num_processes': 2},
      'process_id: got 2, expected 0 or more and less than num_processes 2',
    ),
    ({'local_device_ids': (0, 0)}, r'local_device_ids: got \(0, 0\)'),
    ({'local_device_ids': (-1,)}, 'expected different numbers from 0'),
    ({'initialization_timeout_s': 0}, 'initialization_timeout_s: got 0'),
    (
      {'distributed': 'off', 'num_processes': 2},
      "num_processes: got 2 with distributed 'off', expected none",
    ),
  ],
)
def test_host_options_impossible_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    HostOptions(**options)


@pytest.mark.parametrize('address', ['node1:80', '10.0.0.1:1234', '[::1]:99'])
def test_host_options_addresses_are_taken(address):
  assert HostOptions(coordinator_address=address).coordinator_address == address
