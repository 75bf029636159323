"""The closed set of logical axis names of parameters and activations.

`sharding.rules` maps them to mesh axes. A module may use no other name, so a
rule set that covers this list covers every parameter.
"""

BATCH = 'batch'
SEQUENCE = 'sequence'
LAYERS = 'layers'
VOCAB = 'vocab'
EMBED = 'embed'
NORM = 'norm'
Q_LATENT = 'q_latent'
KV_LATENT = 'kv_latent'
HEADS = 'heads'
HEAD_DIM = 'head_dim'
ROPE_DIM = 'rope_dim'
INDEX_HEADS = 'index_heads'
INDEX_DIM = 'index_dim'
MLP = 'mlp'
EXPERTS = 'experts'
EXPERT_MLP = 'expert_mlp'
ROUTER = 'router'
MTP_CONCAT = 'mtp_concat'

LOGICAL_AXES = (
  BATCH,
  SEQUENCE,
  LAYERS,
  VOCAB,
  EMBED,
  NORM,
  Q_LATENT,
  KV_LATENT,
  HEADS,
  HEAD_DIM,
  ROPE_DIM,
  INDEX_HEADS,
  INDEX_DIM,
  MLP,
  EXPERTS,
  EXPERT_MLP,
  ROUTER,
  MTP_CONCAT,
)
