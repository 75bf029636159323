"""Search tasks over closed libraries, made by a procedure and no model.

A world is an invented entity graph (`schema`, `world`), written out as
documents (`documents`) in one SQLite FTS5 file (`corpus`) that three tools read
(`tools`). A task asks for the one entity at the end of a path: a start that
`breadth` constraints single out together, then `depth` hops (`plans`,
`questions`, `wording`). It is kept if going through the whole graph finds one
answer (`plans.answers`), a solver that has only the tools finds the same
(`reading`, `solver`), and every weak answerer is wrong (`answerers`).
"""

from dsv32_jax.agents.synthesis.search.environment import SearchEnvironment
from dsv32_jax.agents.synthesis.search.family import SearchFamily
from dsv32_jax.agents.synthesis.search.reference import reference
from dsv32_jax.agents.synthesis.search.tasks import (
  Attempted,
  Library,
  SearchTask,
  Settings,
  library_name,
  make_task,
  make_tasks,
)

__all__ = [
  'Attempted',
  'Library',
  'SearchEnvironment',
  'SearchFamily',
  'SearchTask',
  'Settings',
  'library_name',
  'make_task',
  'make_tasks',
  'reference',
]
