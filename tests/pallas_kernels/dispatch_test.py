"""Tests of the choice of implementation."""

import warnings

import pytest

from pallas_kernels import dispatch


def _unsupported(reason):
  def run(x):
    raise NotImplementedError(reason)

  return run


def _make(**implementations):
  return implementations


SUPPORTED = _make(
  mosaic_gpu=lambda x: ('mosaic_gpu', x),
  xla=lambda x: ('xla', x),
  reference=lambda x: ('reference', x),
)
WITHOUT_GPU = SUPPORTED | {'mosaic_gpu': _unsupported('needs a Hopper GPU')}


def test_dispatch_none_picks_the_first_kernel_that_can_run():
  assert dispatch.call('op', SUPPORTED, None, 3) == ('mosaic_gpu', 3)


def test_dispatch_none_ends_at_xla_silently():
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert dispatch.call('op', WITHOUT_GPU, None, 3) == ('xla', 3)


def test_dispatch_none_never_picks_the_reference():
  implementations = {
    'reference': lambda x: ('reference', x),
    'xla': lambda x: ('xla', x),
  }
  assert dispatch.call('op', implementations, None, 3) == ('xla', 3)


@pytest.mark.parametrize('name', ['mosaic_gpu', 'xla', 'reference'])
def test_dispatch_name_runs_that_implementation(name):
  assert dispatch.call('op', SUPPORTED, name, 3) == (name, 3)


def test_dispatch_name_that_cannot_run_raises_its_reason():
  with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
    dispatch.call('op', WITHOUT_GPU, 'mosaic_gpu', 3)


def test_dispatch_known_name_the_op_lacks_raises_not_implemented():
  with pytest.raises(NotImplementedError, match="op has no 'triton'"):
    dispatch.call('op', SUPPORTED, 'triton', 3)


@pytest.mark.parametrize('implementation', ['xlaa', ('xla', 'xlaa')])
def test_dispatch_misspelt_name_raises_value_error(implementation):
  with pytest.raises(ValueError, match="implementation='xlaa' is unknown"):
    dispatch.call('op', SUPPORTED, implementation, 3)


def test_dispatch_empty_sequence_raises_value_error():
  with pytest.raises(ValueError, match='empty sequence'):
    dispatch.call('op', SUPPORTED, (), 3)


def test_dispatch_sequence_warns_at_each_fallback():
  with pytest.warns(UserWarning, match='cannot run here') as caught:
    out = dispatch.call(
      'op', WITHOUT_GPU, ('triton', 'mosaic_gpu', 'reference', 'xla'), 3
    )
  assert out == ('reference', 3)
  messages = [str(w.message) for w in caught]
  assert len(messages) == 2
  assert "'triton' cannot run" in messages[0]
  assert 'needs a Hopper GPU' in messages[1]
  assert "trying 'reference'" in messages[1]


def test_dispatch_sequence_of_which_none_can_run_raises_a_group():
  with pytest.warns(UserWarning, match='trying'):
    with pytest.raises(ExceptionGroup) as caught:
      dispatch.call('op', WITHOUT_GPU, ('mosaic_gpu', 'triton'), 3)
  reasons = [str(e) for e in caught.value.exceptions]
  assert len(reasons) == 2
  assert reasons[0] == 'needs a Hopper GPU'


def test_dispatch_error_of_an_implementation_is_not_taken_for_unsupported():
  def broken(x):
    raise TypeError('a bug')

  with pytest.raises(TypeError, match='a bug'):
    dispatch.call('op', SUPPORTED | {'mosaic_gpu': broken}, None, 3)
