import jaxtyping
import pytest


@pytest.fixture
def without_type_hook():
  """Values of a wrong type reach the configs, as they do outside of tests.

  The tests' import hook would refuse them first, with a message of its own.
  """
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)
