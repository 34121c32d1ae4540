"""A small simulated atlas, so that everything can be tried without data. Nothing in it was measured on a cell.

It has the traits for which the hierarchical cross-entropy was made: real Cell Ontology terms, studies with their own
batch effect, and studies that name the same cells more or less finely, each in its own way. Four further studies, with
new batch effects and other habits of naming, are kept apart for out-of-distribution evaluation.

How a cell comes about: a study draws its finest type (a leaf of the hierarchy); type, study and donor give the
relative expression of every gene; a library size and negative-binomial noise give its counts; the study's habits decide
whether the cell goes by its finest type or by an ancestor. Every study has random numbers of its own, from the seed and
its number alone.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from hce_jax.hierarchy.reachability import reachability_from_edges
from hce_jax.preprocess.normalize import normalize_log1p
from hce_jax.store.merlin_write import complete_or_absent, write_side_files, write_split
from hce_jax.store.schema import CATEGORICAL_COLUMNS, SPLITS, STORE_FILE

CELL_TYPES_FILE = Path(__file__).with_name("simulated_cell_types.csv")

#: Goes up whenever the content changes: results are comparable within one version only.
SIMULATION_VERSION = 1
SEED = 20260101

# --- size -------------------------------------------------------------------------------------------------------------
N_GENES = 2_000  # a tenth of the published gene list, and as informative: a linear model trains in seconds on a laptop
N_STUDIES = 12
N_NEW_STUDIES = 4
CELLS_PER_DONOR = 334  # 12 studies x 6 training donors x 334 = 24,048 training cells
DONORS = {"train": 6, "val": 1, "test": 1}  # of each study; a donor lies in one split only
NEW_STUDY_DONORS = 4
ROWS_PER_PART = 8_192  # several parts even here, so that their order matters
ROWS_PER_GROUP = 1_024  # as published

# --- expression; all effects are on the scale of ln(expression) -------------------------------------------------------
GENE_SPREAD = 2.0  # sd over genes: a few genes take most of a cell's RNA; with ASSAYS it gives about 10 % non-zeros
MARKERS_PER_TYPE = 100  # genes in which a type differs from its parents: 5 %; siblings share all the rest
MARKER_STRENGTH = 1.0  # sd of those changes: e-fold, where studies list markers from about 1.3-fold upwards
STUDY_EFFECT = 0.4  # sd per gene between studies: laboratory, chemistry and alignment shift a gene by about 1.5-fold
DONOR_EFFECT = 0.15  # sd per gene between donors of a study: people differ less than laboratories do
OVERDISPERSION = 0.3  # phi in variance = mean + phi mean^2, as commonly fitted to UMI counts
LIBRARY_SPREAD = 0.4  # sd of ln(counts per cell) within a study
#: Assay and its median counts per cell over these genes: a tenth of what the assays give over 20,000 genes.
ASSAYS = (("10x 3' v2", 350.0), ("10x 3' v3", 600.0), ("10x 5' v1", 400.0))

# --- who is there and what it is called -------------------------------------------------------------------------------
ABUNDANCE_SPREAD = 0.8  # sd of ln(share of cells) over types: rare types have a twentieth of the cells of common ones
STUDY_ABUNDANCE_SPREAD = 0.7  # sd of its change from study to study: tissue, sorting
PRESENCE = 0.75  # probability that a study contains a type at all
#: Range over studies of the probability that a study uses an ancestor's name at all; less for the broadest names.
GRANULARITY = (0.05, 0.5)
NEW_GRANULARITY = (0.0, 0.05, 0.25, 0.5)  # of the four new studies: two name finely, two coarsely
#: Where a study uses an ancestor's name it does so for this share of the cells below, less for the broadest names;
#: drawn uniformly, and more than 1 is 1: often the whole branch goes by the ancestor's name.
STOP_SHARE = (0.5, 3.0)

TISSUES = (
    ("blood", "blood"),
    ("bone marrow", "bone marrow"),
    ("spleen", "spleen"),
    ("lower lobe of left lung", "lung"),
    ("mesenteric lymph node", "lymph node"),
    ("ileum", "small intestine"),
)
DISEASES = ("normal", "normal", "COVID-19", "systemic lupus erythematosus", "chronic obstructive pulmonary disease")
AGES = (24, 80)  # years; one of them per donor

# --- augmentation vectors, as published: differences between donors or studies within a type --------------------------
MIN_CELLS_PER_MEAN = 10  # a mean over fewer cells is mostly noise
N_AUGMENTATIONS = 512
AUGMENTATION_THRESHOLD = 0.25  # smaller differences are set to zero
AUGMENTATION_LIMIT = 1.5

NOTE = (
    "SIMULATED cells, made by hce_jax.store.simulate. No cell, gene, donor or study in this store is real; only the "
    "names and the hierarchy of the cell types are, from the Cell Ontology (CC BY 4.0). Results on it say nothing "
    "about any data set or published model."
)


@dataclass(frozen=True)
class CellTypes:
    """The types of the atlas, in the order of their codes (labels sorted)."""

    release: str
    """Cell Ontology release."""
    cl_ids: list[str]
    labels: list[str]
    parents: list[list[int]]
    """For each type the codes of its nearest ancestors."""
    reach_cc: np.ndarray
    """Reachability matrix: [i, j] is 1 when j is i or a descendant of i."""


@dataclass(frozen=True)
class World:
    """What all studies share: the types, their expression programmes, and how common they are."""

    types: CellTypes
    log_expression_cg: np.ndarray
    abundance_c: np.ndarray
    """Share of the cells, up to a factor; 0 for a type that has descendants, for cells are born as leaves."""


@dataclass(frozen=True)
class Study:
    """One study: where it was made, which cells it has, how it shifts expression, and how it names types."""

    dataset_id: str
    assay: str
    median_counts: float
    tissue: str
    tissue_general: str
    disease: str
    proportions_c: np.ndarray
    effect_g: np.ndarray
    stop_share_c: np.ndarray
    """Share of the cells below a type that go by that type's name."""


def simulate_atlas(destination: Path, scale: float = 1.0) -> None:
    """Write the simulated atlas as a merlin store, with the new studies as ``ood/<dataset_id>.h5ad``.

    The same content every time (as far as numpy gives the same random numbers). At scale 1: 24,048 training cells,
    4,008 each in val and test, 5,344 in the new studies, 2,000 genes, 59 types; about 10 s, well under 2 GiB.

    Parameters
    ----------
    destination
        The store's folder; must not exist. It appears when it is complete.
    scale
        Factor on the cells per donor. Another scale is another atlas, not a sample of this one.

    Raises
    ------
    StoreError
        If ``destination`` exists.
    ValueError
        If ``scale`` is so small that a type has no training cell.

    Notes
    -----
    Splits are by donor. Counts are negative binomial (Gamma-Poisson). Class weights are N / (C n_i) over the training
    cells, augmentation vectors differences of mean expression between tech_samples within a type, as in scTab
    (Fischer et al., Nat Commun 2024).

    Examples
    --------
    >>> import tempfile
    >>> destination = Path(tempfile.mkdtemp()) / "atlas"
    >>> simulate_atlas(destination, scale=0.1)
    >>> json.loads((destination / "store.json").read_text())["splits"]["train"]["cells"]
    2376
    """
    types = read_cell_types()
    cells_per_donor = round(CELLS_PER_DONOR * scale)
    genes = pd.DataFrame(
        {
            "feature_id": [f"SIMG{gene:011d}" for gene in range(1, N_GENES + 1)],
            "feature_name": [f"SIM{gene}" for gene in range(1, N_GENES + 1)],
        }
    )
    with complete_or_absent(Path(destination)) as folder:
        world = draw_world(types)
        donor_splits = [split for split in SPLITS for _ in range(DONORS[split])]
        studies = [simulate_study(number, world, donor_splits, cells_per_donor) for number in range(N_STUDIES)]
        counts = sparse.vstack([counts for counts, _ in studies], format="csr")
        obs = pd.concat([obs for _, obs in studies], ignore_index=True)
        obs["soma_joinid"] = np.arange(len(obs))
        n_new_cells = _write_new_studies(folder / "ood", world, genes, cells_per_donor, first_joinid=len(obs))
        n_cells = _write_splits(folder, types, genes, counts, obs)
        store = {
            "format": "merlin",
            "simulated": True,
            "simulation_version": SIMULATION_VERSION,
            "note": NOTE,
            "ontology_release": types.release,
            "seed": SEED,
            "scale": scale,
            "splits": {split: {"cells": n} for split, n in n_cells.items()},
            "ood": {dataset_id: {"cells": n} for dataset_id, n in n_new_cells.items()},
        }
        (folder / STORE_FILE).write_text(json.dumps(store, indent=2) + "\n", encoding="utf-8")


def read_cell_types() -> CellTypes:
    """Read the table of the atlas's types that lies beside this file.

    Examples
    --------
    >>> types = read_cell_types()
    >>> child = types.cl_ids.index("CL:0000904")
    >>> types.labels[child], [types.labels[parent] for parent in types.parents[child]]
    ('central memory CD4-positive, alpha-beta T cell', ['CD4-positive, alpha-beta memory T cell'])
    """
    comment, *table = CELL_TYPES_FILE.read_text(encoding="utf-8").splitlines()
    release = comment.removeprefix("# Cell Ontology ").split(",")[0]
    rows = list(csv.DictReader(table))
    code = {row["cl_id"]: number for number, row in enumerate(rows)}
    parents = [[code[cl_id] for cl_id in row["parents"].split(";") if cl_id] for row in rows]
    edges = [(parent, child) for child, above in enumerate(parents) for parent in above]
    reach_cc = reachability_from_edges(len(rows), edges)
    return CellTypes(release, list(code), [row["label"] for row in rows], parents, reach_cc)


def draw_world(types: CellTypes) -> World:
    """Draw the expression programmes down the hierarchy, and how common each type is.

    A type's programme, ln(relative expression), is the mean of its parents' plus changes in its own markers. A root
    starts from what all cells have in common.

    Parameters
    ----------
    types
        The types and their hierarchy.

    Examples
    --------
    >>> draw_world(read_cell_types()).log_expression_cg.shape
    (59, 2000)
    """
    rng = np.random.default_rng([SEED, 0])
    log_expression_cg = np.empty((len(types.labels), N_GENES))
    root_g = rng.normal(0.0, GENE_SPREAD, N_GENES)
    for child in _broad_to_fine(types.reach_cc):
        above = types.parents[child]
        inherited_g = log_expression_cg[above].mean(axis=0) if above else root_g
        markers = rng.choice(N_GENES, MARKERS_PER_TYPE, replace=False)
        log_expression_cg[child] = inherited_g
        log_expression_cg[child, markers] += rng.normal(0.0, MARKER_STRENGTH, MARKERS_PER_TYPE)
    is_leaf_c = types.reach_cc.sum(axis=1) == 1
    abundance_c = np.where(is_leaf_c, np.exp(rng.normal(0.0, ABUNDANCE_SPREAD, len(is_leaf_c))), 0.0)
    return World(types, log_expression_cg, abundance_c)


def _broad_to_fine(reach_cc: np.ndarray) -> np.ndarray:
    """Order the types so that ancestors come before their descendants: an ancestor has more descendants."""
    return np.argsort(-reach_cc.sum(axis=1), kind="stable")


def _draw_study(number: int, world: World, rng: np.random.Generator) -> Study:
    n_types = len(world.types.labels)
    is_new = number >= N_STUDIES
    name = f"simulated-new-study-{number - N_STUDIES + 1}" if is_new else f"simulated-study-{number + 1:02d}"
    assay, median_counts = ASSAYS[number % len(ASSAYS)]
    tissue, tissue_general = TISSUES[number % len(TISSUES)]
    present_c = rng.random(n_types) < PRESENCE
    share_c = world.abundance_c * present_c * np.exp(rng.normal(0.0, STUDY_ABUNDANCE_SPREAD, n_types))
    granularity = NEW_GRANULARITY[number - N_STUDIES] if is_new else rng.uniform(*GRANULARITY)
    aptness_c = (
        1.0 - world.types.reach_cc.mean(axis=1)
    ) ** 2  # "lymphocyte", above most types, is rare; "B cell" is not
    stops_c = rng.random(n_types) < granularity * aptness_c
    if not is_new:  # some study must use each name, else no cell would teach it: the types take turns
        stops_c |= np.arange(n_types) % N_STUDIES == number
    return Study(
        dataset_id=name,
        assay=assay,
        median_counts=median_counts,
        tissue=tissue,
        tissue_general=tissue_general,
        disease=str(rng.choice(DISEASES)),
        proportions_c=share_c / share_c.sum(),
        effect_g=rng.normal(0.0, STUDY_EFFECT, N_GENES),
        stop_share_c=np.where(stops_c, np.minimum(rng.uniform(*STOP_SHARE, n_types) * aptness_c, 1.0), 0.0),
    )


def simulate_study(
    number: int, world: World, donor_splits: list[str], cells_per_donor: int
) -> tuple[sparse.csr_array, pd.DataFrame]:
    """Simulate one study, each donor with ``cells_per_donor`` cells.

    Parameters
    ----------
    number
        Which study; its random numbers depend on this and the seed alone.
    world
        What all studies share.
    donor_splits
        The split of each donor.
    cells_per_donor
        Cells of each donor.

    Returns
    -------
    counts
        Integer counts, (cells, genes), float32.
    obs
        The categorical columns as text, ``is_primary_data``, ``split``, and the codes ``label`` (as the study names
        the cell) and ``leaf`` (its finest type; no store holds it).

    Examples
    --------
    >>> world = draw_world(read_cell_types())
    >>> counts, obs = simulate_study(0, world, ["train", "test"], cells_per_donor=5)
    >>> counts.shape, obs["donor_id"].nunique()
    ((10, 2000), 2)
    """
    rng = np.random.default_rng([SEED, 1 + number])
    study = _draw_study(number, world, rng)
    counts, obs = [], []
    for donor, split in enumerate(donor_splits):
        leaf_n = rng.choice(len(study.proportions_c), cells_per_donor, p=study.proportions_c)
        log_donor_cg = world.log_expression_cg + study.effect_g + rng.normal(0.0, DONOR_EFFECT, N_GENES)
        counts.append(_draw_counts(log_donor_cg, leaf_n, study.median_counts, rng))
        label_n = _name_cells(leaf_n, study.stop_share_c, world.types.reach_cc, rng)
        donor_id = f"{study.dataset_id}-donor-{donor + 1}"
        constants = {
            "dataset_id": study.dataset_id,
            "donor_id": donor_id,
            "assay": study.assay,
            "development_stage": f"{rng.integers(*AGES)}-year-old stage",
            "disease": study.disease,
            "tissue": study.tissue,
            "tissue_general": study.tissue_general,
            "tech_sample": f"{study.dataset_id}_{donor_id}",
            "is_primary_data": True,
            "split": split,
        }
        named = np.array(world.types.labels)[label_n]
        obs.append(pd.DataFrame({"cell_type": named, "label": label_n, "leaf": leaf_n, **constants}))
    return sparse.vstack(counts, format="csr"), pd.concat(obs, ignore_index=True)


def _draw_counts(
    log_expression_cg: np.ndarray, type_n: np.ndarray, median_counts: float, rng: np.random.Generator
) -> sparse.csr_array:
    """Draw negative-binomial counts: Poisson counts whose rate varies by a Gamma factor of mean 1 and variance phi."""
    relative_cg = np.exp(log_expression_cg)
    relative_cg /= relative_cg.sum(axis=1, keepdims=True)
    library_n = median_counts * np.exp(rng.normal(0.0, LIBRARY_SPREAD, len(type_n)))
    factor_ng = rng.standard_gamma(1.0 / OVERDISPERSION, (len(type_n), N_GENES)) * OVERDISPERSION
    counts_ng = rng.poisson(library_n[:, None] * relative_cg[type_n] * factor_ng)
    return sparse.csr_array(counts_ng.astype(np.float32))


def _name_cells(
    leaf_n: np.ndarray, stop_share_c: np.ndarray, reach_cc: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Name each cell: from its broadest ancestor down, stop at a type with that type's share, else at the leaf."""
    order = _broad_to_fine(reach_cc)
    stop_nc = (rng.random((len(leaf_n), len(reach_cc))) < stop_share_c) & (reach_cc[:, leaf_n].T > 0)
    stop_nc[np.arange(len(leaf_n)), leaf_n] = True
    return order[stop_nc[:, order].argmax(axis=1)]


def _write_new_studies(
    folder: Path, world: World, genes: pd.DataFrame, cells_per_donor: int, first_joinid: int
) -> dict[str, int]:
    """Write each new study as h5ad, as a download from the Census would be: raw counts, everything in text."""
    folder.mkdir()
    n_cells = {}
    for number in range(N_STUDIES, N_STUDIES + N_NEW_STUDIES):
        counts, obs = simulate_study(number, world, ["ood"] * NEW_STUDY_DONORS, cells_per_donor)
        obs["cell_type_ontology_term_id"] = np.array(world.types.cl_ids)[obs["label"]]
        obs["soma_joinid"] = first_joinid + np.arange(len(obs))
        first_joinid += len(obs)
        dataset_id = obs["dataset_id"].iloc[0]
        n_cells[dataset_id] = len(obs)
        obs = obs.drop(columns=["label", "leaf", "split", "tech_sample"])
        text = obs.select_dtypes(exclude=["number", "bool"]).columns
        obs = obs.astype(dict.fromkeys(text, "category")).set_index(obs["soma_joinid"].astype(str).to_numpy())
        adata = anndata.AnnData(X=counts, obs=obs, var=genes.set_index(genes["feature_id"].to_numpy()))
        adata.uns["note"] = NOTE
        adata.write_h5ad(folder / f"{dataset_id}.h5ad", compression="gzip")
    return n_cells


def _write_splits(
    folder: Path, types: CellTypes, genes: pd.DataFrame, counts: sparse.csr_array, obs: pd.DataFrame
) -> dict[str, int]:
    """Write the three splits, each shuffled, and the side files."""
    n_types = len(types.labels)
    train_n = (obs["split"] == "train").to_numpy()
    cells_c = np.bincount(obs["label"][train_n], minlength=n_types)
    if not cells_c.all():
        missing = ", ".join(np.array(types.labels)[cells_c == 0])
        raise ValueError(f"too few cells for {n_types} types: no training cell of {missing}; simulate a larger atlas")
    rng = np.random.default_rng([SEED, 1 + N_STUDIES + N_NEW_STUDIES])
    x = normalize_log1p(counts)
    augmentations = _augmentation_vectors(x[train_n], obs[train_n], rng)
    codes = obs[["soma_joinid", "is_primary_data"]].copy()
    lookups = {"cell_type": types.labels}
    for column in CATEGORICAL_COLUMNS:
        lookups.setdefault(column, sorted(obs[column].unique()))
        codes[column] = pd.Categorical(obs[column], lookups[column]).codes.astype(np.int64)
    write_side_files(
        folder,
        genes,
        lookups,
        class_weights=cells_c.sum() / (n_types * cells_c),
        child_matrix=types.reach_cc,
        augmentations=augmentations,
        cl_ids=types.cl_ids,
    )
    n_cells = {}
    for split in SPLITS:
        rows = rng.permutation(np.flatnonzero(obs["split"] == split))
        write_split(folder / split, x[rows], codes.iloc[rows], ROWS_PER_PART, ROWS_PER_GROUP)
        n_cells[split] = len(rows)
    return n_cells


def _augmentation_vectors(x: sparse.csr_array, obs: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    """Draw pairs of tech_samples within a type and take the differences of their mean expression."""
    group = obs.groupby(["label", "tech_sample"]).ngroup().to_numpy()
    cells_k = np.bincount(group)
    member_kn = sparse.csr_array((1.0 / cells_k[group], (group, np.arange(len(group)))))
    mean_kg = (member_kn @ x).toarray()
    label_k = np.empty(len(cells_k), dtype=np.int64)
    label_k[group] = obs["label"]
    usable = np.flatnonzero(cells_k >= MIN_CELLS_PER_MEAN)
    first, second = np.nonzero(np.triu(label_k[usable][:, None] == label_k[usable], k=1))
    chosen = rng.permutation(len(first))[:N_AUGMENTATIONS]
    difference = mean_kg[usable[first[chosen]]] - mean_kg[usable[second[chosen]]]
    difference[np.abs(difference) < AUGMENTATION_THRESHOLD] = 0.0
    return difference.clip(-AUGMENTATION_LIMIT, AUGMENTATION_LIMIT).astype(np.float32)
