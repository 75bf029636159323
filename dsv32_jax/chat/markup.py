"""The strings of V3.2's chat format (arXiv:2512.02556, 3.2.1; docs/chat.md).

The control strings have ids of their own in DeepSeek's vocabulary. The tags of
tool calls are plain text there, so are those of results; small vocabularies may
give the mark `DSML`, which all tags of calls contain, an id.
"""

BOS = '<｜begin▁of▁sentence｜>'
EOS = '<｜end▁of▁sentence｜>'
USER = '<｜User｜>'
ASSISTANT = '<｜Assistant｜>'
THINK = '<think>'
THINK_END = '</think>'
DSML = '｜DSML｜'

# What only the template may write. `DSML` is not among them: in a vocabulary
# without an id for it nothing tells the template's from a user's.
CONTROL_STRINGS = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END)

CALLS = f'<{DSML}function_calls>'
CALLS_END = f'</{DSML}function_calls>'
INVOKE = f'<{DSML}invoke'
INVOKE_END = f'</{DSML}invoke>'
PARAMETER = f'<{DSML}parameter'
PARAMETER_END = f'</{DSML}parameter>'

RESULTS = '<function_results>'
RESULTS_END = '</function_results>'
RESULT = '<result>'
RESULT_END = '</result>'

# Stands in front of a developer's message.
DEVELOPER_HEADING = "# The user's message is: "
