"""A Census in small: the layout of the public one, with cells whose counts betray a misplaced cell or gene."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma
from scipy import sparse

#: Cell types of the small studies, with the coarser label that some studies give instead. "malignant cell" does not
#: lie below "native cell".
CELL_TYPES = (
    ("T cell", "T cell"),
    ("CD4-positive, alpha-beta T cell", "T cell"),
    ("CD8-positive, alpha-beta T cell", "T cell"),
    ("naive thymus-derived CD4-positive, alpha-beta T cell", "CD4-positive, alpha-beta T cell"),
    ("B cell", "B cell"),
    ("natural killer cell", "natural killer cell"),
    ("classical monocyte", "monocyte"),
    ("malignant cell", "unknown"),
)
TERM_IDS = {
    "T cell": "CL:0000084",
    "CD4-positive, alpha-beta T cell": "CL:0000624",
    "CD8-positive, alpha-beta T cell": "CL:0000625",
    "naive thymus-derived CD4-positive, alpha-beta T cell": "CL:0000895",
    "B cell": "CL:0000236",
    "natural killer cell": "CL:0000623",
    "monocyte": "CL:0000576",
    "classical monocyte": "CL:0000860",
    "malignant cell": "CL:0001064",
    "unknown": "unknown",
}
#: Study: first cell, assay, tissue, tissue_general, whether its labels are coarse. The order is that of the joinids.
STUDIES = {
    "blood-v3": (0, "10x 3' v3", "blood", "blood", False),
    "blood-v2": (1_000_000, "10x 3' v2", "venous blood", "blood", True),
    "blood-smart": (2_000_000, "Smart-seq2", "blood", "blood", False),
    "new-kidney": (3_000_000, "10x 5' v2", "cortex of kidney", "kidney", False),
    "lung": (4_000_000, "10x 5' v1", "lung parenchyma", "lung", False),
    "new-blood": (5_000_000, "10x 3' v3", "blood", "blood", True),
}
#: Study that shows cells of another again: their study, whether they are (wrongly) primary here too, how many a donor.
COPIES = {
    "atlas": (("blood-v3", False, 5), ("blood-v2", True, 2)),
    "new-atlas": (("blood-v3", True, 2), ("new-kidney", False, 3)),
}
#: The studies of each version; "B" has all of "A" and new ones, so that joinids differ.
VERSIONS = {
    "A": ("blood-v3", "blood-v2", "blood-smart", "atlas", "lung"),
    "B": ("new-kidney", "blood-v3", "new-atlas", "blood-v2", "blood-smart", "atlas", "lung", "new-blood"),
}

#: Rows of census_info/summary.
SUMMARY = ("census_schema_version", "census_build_date", "total_cell_count", "unique_cell_count")

#: How the public Censuses keep X: tiles of 2,048 cells by 2,048 genes, data in chunks of 65,536 counts.
_X_CONFIG = {
    "tiledb": {
        "create": {
            "capacity": 2**16,
            "dims": {
                "soma_dim_0": {"tile": 2048, "filters": [{"_type": "ZstdFilter", "level": 9}]},
                "soma_dim_1": {"tile": 2048, "filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 9}]},
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", {"_type": "ZstdFilter", "level": 9}]}},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}
_FRAME_CONFIG = {"tiledb": {"create": {"capacity": 2**16, "allows_duplicates": True}}}


def small_census_obs(version: str = "A", *, donors: int = 4, cells_per_donor: int = 16) -> pd.DataFrame:
    """Make a plausible obs: studies, donors, secondary cells, cells primary twice; ``cell`` says which cell it is.

    Rows with the same ``cell`` are the same cell, shown by two studies. Donors of different studies share names.
    """
    parts = []
    for study in VERSIONS[version]:
        if study in STUDIES:
            parts.append(_cells_of(study, donors, cells_per_donor).assign(is_primary_data=True))
            continue
        for source, primary, n_copied in COPIES[study]:
            theirs = _cells_of(source, donors, cells_per_donor).groupby("donor_id").head(n_copied)
            parts.append(theirs.assign(dataset_id=study, is_primary_data=primary))
    return pd.concat(parts, ignore_index=True)


def _cells_of(study: str, donors: int, cells_per_donor: int) -> pd.DataFrame:
    first, assay, tissue, tissue_general, coarse = STUDIES[study]
    cells = first + np.arange(donors * cells_per_donor)
    labels = [CELL_TYPES[kind][int(coarse)] for kind in type_of(cells)]
    donor = np.arange(cells.size) // cells_per_donor
    return pd.DataFrame(
        {
            "cell": cells,
            "dataset_id": study,
            "assay": assay,
            "assay_ontology_term_id": "EFO:0000000",
            "cell_type": labels,
            "cell_type_ontology_term_id": [TERM_IDS[label] for label in labels],
            "development_stage": [f"{30 + 5 * number}-year-old human stage" for number in donor],
            "disease": np.where(donor % 2, "COVID-19", "normal"),
            "donor_id": [f"D{number}" for number in donor],
            "sex": np.where(donor % 3, "female", "male"),
            "tissue": tissue,
            "tissue_general": tissue_general,
        }
    )


def type_of(cells: np.ndarray) -> np.ndarray:
    """Give the place in CELL_TYPES of what each cell really is."""
    return np.asarray(cells) * 5 % len(CELL_TYPES)


def small_census_counts(obs: pd.DataFrame, n_genes: int) -> sparse.csr_array:
    """Make counts from each row's ``cell``: a count tells its cell and gene, genes of its type are high."""
    cells, genes = obs["cell"].to_numpy()[:, None], np.arange(n_genes)[None]
    marker = genes % (2 * len(CELL_TYPES)) == type_of(cells)
    expressed = marker | ((31 * cells + 17 * genes) % 7 < 2)
    counts = np.where(expressed, 1 + (131 * cells + 37 * genes) % 89, 0) + 40 * marker
    return sparse.csr_array(counts.astype(np.float32))


def small_census_var(n_genes: int) -> pd.DataFrame:
    """Make var: every fifth gene is no protein coding one."""
    return pd.DataFrame(
        {
            "feature_id": [f"ENSG{1000 + gene:011d}" for gene in range(n_genes)],
            "feature_name": [f"GENE{gene}" for gene in range(n_genes)],
            "feature_type": np.where(np.arange(n_genes) % 5 == 4, "lncRNA", "protein_coding"),
            "feature_length": 500 + np.arange(n_genes),
        }
    )


def write_small_census(
    path: Path,
    *,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    counts: sparse.csr_array | Iterable[sparse.csr_array],
    build_date: str,
    layout: str = "2023",
    datasets: Sequence[str] | None = None,
) -> Path:
    """Write a Census of human cells.

    Parameters
    ----------
    path
        A folder that does not exist.
    obs, var
        Cells and genes; their soma_joinid is their place. ``cell`` is left out, and ``feature_type`` where the layout
        has none.
    counts
        The counts (cells, genes), or pieces of them, each of some cells, in order.
    build_date
        As in census_info/summary.
    layout
        "2023" is that of 2023-05-15, with plain text columns and without feature_type; "2025" that of newer ones.
    datasets
        The dataset_id of census_info/datasets; by default those of obs.
    """
    obs, var = obs.drop(columns="cell", errors="ignore").reset_index(drop=True), var.reset_index(drop=True)
    if layout == "2025":
        obs = obs.assign(
            observation_joinid=[f"id{n}" for n in range(len(obs))], tissue_type="tissue", raw_sum=1.0, nnz=1
        )
    else:
        var = var.drop(columns="feature_type", errors="ignore")
    told = ("1.0.0", build_date, str(len(obs)), str(int(obs["is_primary_data"].sum())))
    names = list(dict.fromkeys(obs["dataset_id"])) if datasets is None else list(datasets)
    with tiledbsoma.Collection.create(str(path)) as census:
        info = census.add_new_collection("census_info")
        _write_frame(info, "summary", pd.DataFrame(zip(SUMMARY, told, strict=False), columns=["label", "value"]))
        _write_frame(info, "datasets", pd.DataFrame({"dataset_id": names, "dataset_title": names}))
        data = census.add_new_collection("census_data")
        human = data.add_new_collection("homo_sapiens", tiledbsoma.Experiment)
        _write_frame(human, "obs", obs, dictionaries=layout == "2025")
        rna = human.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        _write_frame(rna, "var", var)
        _write_x(rna.add_new_collection("X"), counts, (len(obs), len(var)))
    return path


def _write_frame(parent: Any, name: str, frame: pd.DataFrame, dictionaries: bool = False) -> None:
    frame = frame.assign(soma_joinid=np.arange(len(frame)))
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    text = pa.dictionary(pa.int16(), pa.large_string()) if dictionaries else pa.large_string()
    fields = [
        field.with_type(pa.large_string() if field.name == "observation_joinid" else text)
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
        else field
        for field in table.schema
    ]
    table = table.cast(pa.schema(fields))
    domain = [(0, max(len(frame) - 1, 0))]
    uri = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=domain, platform_config=_FRAME_CONFIG
    ).uri
    # Opened anew: tiledbsoma 2.3 loses the dictionaries of what is written through the collection that just made it.
    # The second half first, to betray a reader that trusts the order in which rows come.
    for half in (table[len(frame) // 2 :], table[: len(frame) // 2]):
        with tiledbsoma.DataFrame.open(uri, "w") as written:
            written.write(half)


def _write_x(parent: Any, counts: sparse.csr_array | Iterable[sparse.csr_array], shape: tuple[int, int]) -> None:
    layer = parent.add_new_sparse_ndarray("raw", type=pa.float32(), shape=shape, platform_config=_X_CONFIG)
    pieces = [counts[at : at + 8192] for at in range(0, shape[0], 8192)] if sparse.issparse(counts) else counts
    first = 0
    for piece in pieces:
        coo = piece.tocoo()
        layer.write(
            pa.table(
                {
                    "soma_dim_0": coo.row.astype(np.int64) + first,
                    "soma_dim_1": coo.col.astype(np.int64),
                    "soma_data": coo.data.astype(np.float32),
                }
            )
        )
        first += piece.shape[0]
