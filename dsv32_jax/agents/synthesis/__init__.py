"""Tasks that are hard to solve and easy to check, made by programs."""
