"""Hands weights over to whoever has compiled programs for others."""

import jax


def laid_out_as(new: dict, old: dict) -> dict:
  """Casts and places every leaf as the old one of its name is."""
  flat, tree = jax.tree_util.tree_flatten_with_path(new)
  held, held_tree = jax.tree_util.tree_flatten_with_path(old)
  if tree != held_tree:
    names, held_names = (
      {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in x}
      for x in (flat, held)
    )
    odd = sorted(names ^ held_names) or ['their structure']
    raise ValueError(
      f'update_variables: got variables of another model, differing in {odd[0]}'
    )
  placed = []
  for (path, leaf), (_, like) in zip(flat, held, strict=True):
    if leaf.shape != like.shape:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
        f'update_variables: got {name} of shape {leaf.shape}, expected '
        f'{like.shape}'
      )
    # A copy in any case: whoever trains the given ones may donate them.
    own = jax.numpy.array(leaf, like.dtype, copy=True)
    placed.append(jax.device_put(own, like.sharding))
  return jax.tree_util.tree_unflatten(tree, placed)
