"""The verbs of `python -m hce_jax`, one module each: PURPOSE, describe(parser), run(arguments)."""
