"""Several processes as one program: who takes part, what they agree on.

`job` is who takes part, `cluster` reads it from a scheduler's environment,
`joining` starts jax's runtime and watches over it, `agreement` is what all
processes must do or know alike, `launching` and `local_processes` start them.
"""
