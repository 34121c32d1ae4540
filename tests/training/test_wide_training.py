"""Training from rows that go on with zeros, as on an accelerator, against rows of the genes alone."""

import jax
import numpy as np
import pytest
from stores import N_GENES, write_tiny_store

from configs import linear_hce
from hce_jax.input import dense_batch
from hce_jax.store import open_store
from hce_jax.training.config import member_configs
from hce_jax.training.steps import state_arrays
from hce_jax.training.trainer import Trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = write_tiny_store(tmp_path_factory.mktemp("wide") / "store")
    np.save(path / "augmentations.npy", np.random.default_rng(0).normal(0, 0.5, (7, N_GENES)).astype(np.float32))
    return open_store(path)


def trained(store, width):
    """Train for an epoch and validate; give all that comes of it."""
    config = linear_hce.get_config()
    config.update(data_path=str(store.side.path), batch_size=30, learning_rate=0.05, precision="float32")
    config.update(augment_training_data=True)
    trainer = Trainer(member_configs(config), store)
    batches = list(trainer.training_batches(epoch=0))
    assert len(batches) == 3
    assert {dense_batch(batch, trainer._batch_sharding).x.shape for batch in batches} == {(30, width)}
    steps = [trainer.step(batch) for batch in batches]
    result = {"val": np.array(trainer.validate(lambda _: None)), **state_arrays(trainer.state)}
    return {**jax.tree.map(lambda *values: np.stack(values), *steps)._asdict(), **result}


def test_a_run_from_wide_rows_is_the_same_and_so_are_the_shapes_of_what_it_saves(store, monkeypatch):
    expected = trained(store, N_GENES)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = trained(store, 128)
    assert np.ptp(expected["loss"]) > 0.01
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.shape(found[name]) == np.shape(expected[name])
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
