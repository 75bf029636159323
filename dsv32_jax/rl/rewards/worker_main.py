"""The program of a scoring process: calls in, marks out, one line each.

It is run as a file, by an interpreter that is told nothing of this project
(`python -I`), so that it starts without jax. A line in is JSON of [module,
function, arguments]; a line out is JSON of [value, error, missing package].
"""

import importlib.util
import json
import os
import resource
import sys

_MODULE_NAME = 'scored_by_'


def main(argv: list[str]) -> None:
  """Serves until its input ends.

  Args:
    argv: the most bytes of address space (0: no limit), then the modules that
      may be called, as name=path.
  """
  most_bytes, *modules = argv
  if int(most_bytes):
    resource.setrlimit(resource.RLIMIT_AS, (int(most_bytes), int(most_bytes)))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  # What a library prints must not get between the answers.
  answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
  sink = os.open(os.devnull, os.O_WRONLY)
  os.dup2(sink, 1)
  calls = os.fdopen(os.dup(0), encoding='utf-8')
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  loaded = {}
  for text in modules:
    name, path = text.split('=', 1)
    spec = importlib.util.spec_from_file_location(_MODULE_NAME + name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded[name] = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded[name]
    spec.loader.exec_module(loaded[name])
  print('ready', file=answers, flush=True)
  for line in calls:
    module, function, arguments = json.loads(line)
    try:
      value = getattr(loaded[module], function)(*arguments)
      reply = json.dumps([value, None, None])
    except MemoryError:
      reply = json.dumps([None, 'out of memory', None])
    except ModuleNotFoundError as error:
      reply = json.dumps([None, str(error), error.name])
    except Exception as error:
      reason = f'{type(error).__name__}: {error}'[:300]
      reply = json.dumps([None, reason, None])
    print(reply, file=answers, flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
