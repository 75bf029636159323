"""Test-time context management (arXiv:2512.02556, 4.4; docs/context.md).

A search may outgrow the window. When a conversation passes 80 % of it, a
strategy makes a shorter one that says the same question:

  Summary       the question and a summary of the work so far
  Discard-75%   without the first three quarters of the calls
  Discard-all   without any call

What is kept or dropped as one is a group: the message that makes calls, its
reasoning, and the results. System, user and developer messages and answers
without calls always stay. A strategy is a pure function on messages; how long
they are, a callable says.
"""

from dsv32_jax.agents.context.parallel import Choice, fewest_steps
from dsv32_jax.agents.context.room import Manager, Room, make_room
from dsv32_jax.agents.context.strategies import (
  DISCARD_75,
  DISCARD_ALL,
  SUMMARY_BEGIN,
  SUMMARY_END,
  Budget,
  Count,
  Discard,
  Strategy,
  Summarise,
  Summary,
)
from dsv32_jax.agents.context.summaries import summarise_with

__all__ = [
  'DISCARD_75',
  'DISCARD_ALL',
  'SUMMARY_BEGIN',
  'SUMMARY_END',
  'Budget',
  'Choice',
  'Count',
  'Discard',
  'Manager',
  'Room',
  'Strategy',
  'Summarise',
  'Summary',
  'fewest_steps',
  'make_room',
  'summarise_with',
]
