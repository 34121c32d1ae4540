"""Training of one model."""

from hce_jax.training import fit


def fit_one(config, **how):
    [result] = fit(config, **how)
    return result
