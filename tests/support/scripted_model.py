"""A model that has learnt a few replies by heart.

Its layers add nothing to the embedding, and its head maps each scripted token
to the next one. So the text it generates is known, tool calls and all, while
everything from the prompt to the answer is the real thing.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from dsv32_jax import chat
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.serving.loading import Loaded
from tests.support import tiny_configs

REASONING = ('The ', 'stock ', 'is ', 'unknown.')
CONTENT = ('Hello', ' w\u00f6rld', ' now.')
_D = chat.DSML
CALLS = (
  f'\n\n<{_D}function',
  f'_calls>\n<{_D}invoke name="stock_level">\n',
  f'<{_D}parameter name="sku" string="true">A',
  f'-7</{_D}parameter>\n<{_D}parameter name="limit" string="false">',
  f'3</{_D}parameter>\n',
  f'</{_D}invoke>\n</{_D}function_calls>',
)
JSON = ('{"level"', ': 3', '}')
ENDLESS = ('tick ', 'tock ')
_WORDS = (*REASONING, *CONTENT, *CALLS, *JSON, *ENDLESS)
_FIRST = ByteTokenizer.vocab_size
_SCALE = 40.0

CFG = tiny_configs.config(
  vocab_size=_FIRST + len(_WORDS) + 5,
  hidden_size=128,
  num_hidden_layers=1,
  scan_layers=False,
  index_topk=4096,
  max_position_embeddings=4096,
)


class WordTokenizer(ByteTokenizer):
  """Bytes, and one id for each word of the scripts."""

  name = 'words'
  vocab_size = _FIRST + len(_WORDS)
  _texts: ClassVar = {
    **ByteTokenizer._texts,
    **{_FIRST + index: word for index, word in enumerate(_WORDS)},
  }


def ids(words: Sequence[str]) -> list[int]:
  return [_FIRST + _WORDS.index(word) for word in words]


def loaded(reply: Sequence[str]) -> Loaded:
  """The model whose replies are this, after REASONING in thinking mode.

  Whatever it replies with, ENDLESS words follow each other for ever.
  """
  special = ByteTokenizer.special_ids
  chains = [
    [special[chat.THINK], *ids(REASONING), special[chat.THINK_END]],
    [special[chat.THINK_END], *ids(reply), special[chat.EOS]],
    [*ids(ENDLESS), *ids(ENDLESS[:1])],
  ]
  following = {
    token: after
    for chain in chains
    for token, after in itertools.pairwise(chain)
  }
  return Loaded(DeepSeekV32(CFG), _variables(following), WordTokenizer())


def _variables(following: Mapping[int, int]) -> dict:
  variables = tiny_configs.variables(CFG)
  params = dict(variables['params'])
  generator = np.random.default_rng(0)
  embedding_VD = generator.standard_normal((CFG.vocab_size, CFG.hidden_size))
  embedding_VD /= np.linalg.norm(embedding_VD, axis=-1, keepdims=True)
  head_DV = np.zeros((CFG.hidden_size, CFG.vocab_size))
  for token, after in following.items():
    # The norm makes rows as long as the root of their width.
    head_DV[:, after] += _SCALE * embedding_VD[token] / CFG.hidden_size**0.5
  layer = dict(params['dense_layers']['layer_0'])
  mla = dict(layer['attention']['mla'])
  mla['w_o'] = jnp.zeros_like(mla['w_o'])
  layer['attention'] = {**layer['attention'], 'mla': mla}
  layer['ffn'] = {
    **layer['ffn'],
    'w_down': jnp.zeros_like(layer['ffn']['w_down']),
  }
  params['dense_layers'] = {'layer_0': layer}
  params['final_norm'] = {'scale': jnp.ones_like(params['final_norm']['scale'])}
  params['embedding'] = jnp.asarray(embedding_VD, jnp.float32)
  params['lm_head'] = jnp.asarray(head_DV, jnp.float32)
  return {**variables, 'params': params}
