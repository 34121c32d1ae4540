"""evaluate.py on the new studies of a Census."""

import anndata
import numpy as np
import pandas as pd
import pytest
from absl.testing import flagsaver
from flax import nnx
from small_census import small_census_counts, small_census_obs, small_census_var, write_small_census

import evaluate
from hce_jax.checkpoint import load_model, save_model
from hce_jax.models import build_model, split_model
from hce_jax.predictor import ModelCard
from hce_jax.preprocess import normalize_log1p
from hce_jax.typing import PRECISIONS

N_GENES = 30
LABELS = ("natural killer cell", "B cell", "T cell")


@pytest.fixture
def folder(tmp_path):
    """Two Censuses, and a checkpoint of some of their types."""
    var = small_census_var(N_GENES)
    for version in "AB":
        obs = small_census_obs(version, donors=2, cells_per_donor=8)
        counts = small_census_counts(obs, N_GENES)
        write_small_census(tmp_path / version, obs=obs, var=var, counts=counts, build_date="2025-01-01")
    config = {"model_type": "linear", "precision": "float32"}
    genes = var["feature_id"], var["feature_name"]
    card = ModelCard(config, *map(tuple, genes), LABELS, None, None, "sf-log1p", {"use_hierarchical_loss": False,
                     "epsilon": 1e-6}, "nowhere", 0, 0, {"val_f1_macro": 0.5})  # fmt: skip
    model = build_model(config, N_GENES, len(LABELS), nnx.Rngs(1), precision=PRECISIONS["float32"])
    save_model(tmp_path / "model.ckpt", card, np.eye(3), *split_model(model)[1:])
    return tmp_path


def test_new_studies_are_collected_once_and_evaluated_beside_the_checkpoint(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DATA_PATH", raising=False)
    arguments = ["--split=ood", "--checkpoint=model.ckpt", "--census_version=./B", "--dataset_ids=diff_A"]
    for census in ("B", "gone"):  # the second time without it
        with flagsaver.flagsaver():
            evaluate.FLAGS(["evaluate.py", *arguments, "--output_root=."])
            evaluate.main()
        (folder / "B").rename(folder / "gone") if census == "B" else None
    chunk = anndata.read_h5ad(folder / "diff_A_B_chunks" / "chunk_0.h5ad")
    assert set(chunk.obs["dataset_id"]) == {"new-kidney", "new-atlas", "new-blood"}
    detailed = pd.read_parquet(folder / "model" / "linear_detailed_results.parquet")
    assert list(detailed["soma_joinid"]) == list(chunk.obs["soma_joinid"])
    assert list(detailed["y_true"]) == list(chunk.obs["cell_type"])
    probabilities = load_model(folder / "model.ckpt").predict_proba(normalize_log1p(chunk.X.tocsr()))
    np.testing.assert_allclose(np.stack(detailed["y_probs"]), probabilities, atol=1e-6)
    studies = pd.read_csv(folder / "model" / "linear_per_dataset_metrics.csv", index_col="dataset")
    assert studies["n_cells"].to_dict() == chunk.obs["dataset_id"].value_counts().to_dict()
    assert capsys.readouterr().out.count("of the model's 3 types, from 3 studies") == 2
