"""The reference solution of a task, as a conversation."""

from dsv32_jax.agents.synthesis.search.environment import SearchEnvironment
from dsv32_jax.agents.synthesis.search.reading import Reader
from dsv32_jax.agents.synthesis.search.solver import solve
from dsv32_jax.agents.synthesis.search.tasks import SearchTask
from dsv32_jax.chat import Message, ToolCall


def reference(
  task: SearchTask, environment: SearchEnvironment
) -> tuple[Message, ...]:
  """What the solver did, a call a message, and its answer.

  Args:
    task: to solve.
    environment: of the task; its tools are all that is used.

  Raises:
    ValueError: if the solver does not come to one answer.
  """
  solution = solve(task.plan, Reader(environment.tools))
  if len(solution.answers) != 1:
    raise ValueError(
      f'{task.id}: the solver found {list(solution.answers)}, expected one name'
    )
  tools = {tool.spec.name: tool for tool in environment.tools}
  messages = list(environment.start())
  for call in solution.calls:
    arguments = dict(call.arguments)
    messages += [
      Message(
        role='assistant',
        tool_calls=(ToolCall(name=call.tool, arguments=arguments),),
      ),
      Message(role='tool', content=tools[call.tool](arguments)),
    ]
  (answer,) = solution.answers
  messages.append(Message(role='assistant', content=f'Answer: {answer}'))
  return tuple(messages)
