"""Choosing the implementation of an op.

Every op folder holds several implementations of one function: `reference`
(the definition), `xla` (chunked, any backend) and, where there is one, kernels
for a device. `api.py` lists them best first and calls `dispatch.call`; callers
of the op see only `implementation=`:

  * `None`: the best one that can run here. `'xla'` is the last resort and the
    definition is never picked, so the choice is silent.
  * a name: that one, or NotImplementedError saying why it can't run.
  * a sequence of names: the first that can run, with a warning for each one
    passed over; ExceptionGroup when none can.

An implementation says "not here" by raising NotImplementedError with the
reason while it is traced. Any other exception is a bug or bad input, and
reaches the caller unchanged.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Every name that an op may have, now or later. A name outside this set is a
# spelling mistake; one inside that the op lacks is merely not available.
KNOWN = ('mosaic_gpu', 'triton', 'xla', 'reference')

Implementation = str | Sequence[str] | None


def call(
  op: str,
  implementations: Mapping[str, Callable[..., Any]],
  implementation: Implementation,
  /,
  *args: Any,
  **kwargs: Any,
) -> Any:
  """Calls the implementation of `op` that `implementation` asks for.

  Args:
    op: name of the op, for messages.
    implementations: name to function, best first; must hold 'xla'.
    implementation: None, a name, or names to try in order (see the module).
    *args: passed to the implementation.
    **kwargs: passed to the implementation.

  Returns:
    What the implementation returns.

  Raises:
    ValueError: a name is unknown, or the sequence is empty.
    NotImplementedError: the one implementation named can't run here.
    ExceptionGroup: none of a sequence (or, for None, not even 'xla') can run;
      it holds one NotImplementedError for each one tried.
  """
  if isinstance(implementation, str):
    _check_name(op, implementation, implementations)
    return _function(op, implementations, implementation)(*args, **kwargs)

  if implementation is None:
    order = automatic_order(implementations)
  else:
    order = tuple(implementation)
    if not order:
      raise ValueError(
        f'{op}: implementation is an empty sequence; expected None, a name '
        f'or at least one name of {tuple(implementations)}'
      )
    for name in order:
      _check_name(op, name, implementations)

  errors = []
  for i, name in enumerate(order):
    try:
      return _function(op, implementations, name)(*args, **kwargs)
    except NotImplementedError as error:
      errors.append(error)
      if implementation is not None and i + 1 < len(order):
        warnings.warn(
          f'{op}: implementation {name!r} cannot run here ({error}); '
          f'trying {order[i + 1]!r}',
          stacklevel=3,
        )
  raise ExceptionGroup(f'{op}: none of {order} can run here', errors)


def automatic_order(
  implementations: Mapping[str, Callable[..., Any]],
) -> tuple[str, ...]:
  """Names tried for `implementation=None`: device kernels, then 'xla'."""
  kernels = [n for n in implementations if n not in ('reference', 'xla')]
  return (*kernels, 'xla')


def _check_name(
  op: str, name: str, implementations: Mapping[str, Callable[..., Any]]
) -> None:
  if name not in KNOWN and name not in implementations:
    raise ValueError(
      f'{op}: implementation={name!r} is unknown; expected one of '
      f'{tuple(implementations)}'
    )


def _function(
  op: str, implementations: Mapping[str, Callable[..., Any]], name: str
) -> Callable[..., Any]:
  if name not in implementations:
    raise NotImplementedError(
      f'{op} has no {name!r} implementation; it has {tuple(implementations)}'
    )
  return implementations[name]
