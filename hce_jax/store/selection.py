"""Which cells of a source a store takes: the published rules, each with the number of cells it leaves."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

from hce_jax.errors import ConfigError, OntologyError, SourceError
from hce_jax.hierarchy.cell_ontology import CellOntology, Mapped
from hce_jax.store.cell_source import TERM_COLUMN, UNKNOWN, CellSource
from hce_jax.store.schema import LABEL_COLUMN
from hce_jax.store.split_cells import SplitTable

#: The assays of the published store.
PUBLISHED_ASSAYS = (
    "10x 5' v2",
    "10x 3' v3",
    "10x 3' v2",
    "10x 5' v1",
    "10x 3' v1",
    "10x 3' transcription profiling",
    "10x 5' transcription profiling",
)
#: More than 7 ancestors, in the Cell Ontology of 2022-12-15.
PUBLISHED_MIN_ANCESTORS = 8


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a cell and its type must be; the defaults are those of the published store (scTab).

    Attributes
    ----------
    primary
        Only cells that their data set is the first to publish.
    assays
        Only cells measured in one of these ways; None: in any.
    tissues
        Only cells of these general tissues; None: of any.
    below
        Only types below this one, a label or CL id; None: any.
    min_cells
        Only types with at least so many cells.
    min_tech_samples
        Only types found in at least so many tech_samples.
    min_ancestors
        Only types with at least so many ancestors in the ontology. None: at least 8, as published, but any number with
        a release that lists fewer ancestors than the one for which that rule was made.
    """

    primary: bool = True
    assays: tuple[str, ...] | None = PUBLISHED_ASSAYS
    tissues: tuple[str, ...] | None = None
    below: str | None = "native cell"
    min_cells: int = 5_000
    min_tech_samples: int = 31
    min_ancestors: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_cells", "min_tech_samples", "min_ancestors"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ConfigError(f"--{name.replace('_', '-')}={value}: it must be 0 or more")


class Step(NamedTuple):
    """What a rule leaves: cells, and different labels or types among them."""

    rule: str
    cells: int
    types: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """The cells of a store, before they are read.

    Attributes
    ----------
    obs
        One row per cell, ordered by ``row``: ``row``, ``soma_joinid``, ``is_primary_data``, the
        text columns and ``tech_sample`` as categories, sorted and all of them used, and ``split`` where a
        table of splits says so. The code of ``cell_type`` is the class.
    cl_ids
        Cell Ontology ids of the categories of ``cell_type``.
    datasets
        All data sets of the source, whether cells of theirs were chosen or not.
    steps
        What each rule leaves, the first being all cells of the source.
    mapped
        Labels and ids that stand for a type of another name now.
    notes
        What a person should know.
    """

    obs: pd.DataFrame
    cl_ids: tuple[str, ...]
    datasets: tuple[str, ...]
    steps: tuple[Step, ...]
    mapped: tuple[Mapped, ...]
    notes: tuple[str, ...]

    def report(self) -> str:
        """Say what was chosen, in lines for a person."""
        lines = [f"{'cells':>15} {'types':>7}   left after each rule"]
        lines += [f"{step.cells:15,} {step.types:7,}   {step.rule}" for step in self.steps]
        lines += [f"note        {note}" for note in self.notes]
        lines += [f"mapped      {each.given} -> {each.label} ({each.cl_id}; {each.why})" for each in self.mapped]
        return "\n".join(lines)


class Steps:
    """Counts what is left after each rule; cells may come in several batches."""

    def __init__(self) -> None:
        self._cells: dict[str, int] = {}
        self._types: dict[str, set[str]] = {}
        self._flags: dict[str, str] = {}

    def count(self, rule: str, labels: pd.Series, flag: str = "") -> None:
        """Count cells with these labels as left by a rule, which a flag may loosen."""
        self._flags[rule] = flag
        self._cells[rule] = self._cells.get(rule, 0) + len(labels)
        self._types.setdefault(rule, set()).update(labels.unique())

    def table(self) -> tuple[Step, ...]:
        """Return what each rule left."""
        return tuple(Step(rule, cells, len(self._types[rule])) for rule, cells in self._cells.items())

    def refuse_none(self) -> None:
        """Raise an error if the last rule left nothing.

        Raises
        ------
        SourceError
            That names the rule which took the last cells, with the counts after each.
        """
        table = self.table()
        empty = next((step for step in table if not step.cells), None)
        if empty is not None:
            left = "; ".join(f"{step.rule} {step.cells:,}" for step in table if step.cells)
            flag = self._flags[empty.rule]
            raise SourceError(
                f"no cell is left after the rule {empty.rule!r}{flag and f' ({flag})'}; cells left after each rule: "
                f"{left or 'none at all'}; {empty.rule} 0"
            )


def select_cells(
    source: CellSource, rules: Rules, ontology: CellOntology, splits: SplitTable | None = None
) -> Selection:
    """Go through what a source says of its cells, and choose by the rules. Counts are not read.

    Rules on types count all cells that pass the rules on cells, as published: a type that one rule takes away still
    counted for the others.

    Parameters
    ----------
    source
        Where the cells are.
    rules
        What they must be.
    ontology
        Where the types' ids, labels and ancestors come from.
    splits
        Splits, and labels if it has them, of the cells to take; the others are left out.

    Raises
    ------
    SourceError
        If nothing is left, or an assay, a tissue or the type of ``below`` is not among what the cells have.
    OntologyError
        If a label is not a known type.

    Examples
    --------
    >>> select_cells(source, Rules(), CellOntology.open()).steps[-1]  # doctest: +SKIP
    Step(rule='at least 31 tech_samples', cells=22190622, types=164)
    """
    if splits is not None and splits.table.index.name == "soma_joinid" and not source.has_joinids:
        raise SourceError(
            f"{splits.name} names cells by soma_joinid, but not every file of {source.title} has a different whole "
            "number there for each cell; mend it, or name cells by tech_sample, donor_id or dataset_id"
        )
    steps, seen = Steps(), {name: set[str]() for name in ("dataset_id", "assay", "tissue_general")}
    batches = list(_chosen_batches(source, rules, splits, steps, seen))
    refuse_unknown(rules, seen, source.title)
    steps.refuse_none()
    obs = joined(batches)
    try:
        obs, cl_ids, mapped = _with_types(obs, ontology)
    except OntologyError as error:
        raise OntologyError(
            f"cell types of {source.title}: {error}; mend them there, name another column (--label-column), or give "
            "labels with a table of splits (--splits)"
        ) from error
    obs["tech_sample"] = _tech_samples(obs)
    kept_c, notes = _chosen_types(obs, cl_ids, rules, ontology, steps)
    steps.refuse_none()
    obs = obs[kept_c[obs[LABEL_COLUMN].cat.codes]].reset_index(drop=True)
    for name in obs.select_dtypes("category").columns:
        used = obs[name].cat.remove_unused_categories().cat
        obs[name] = used.reorder_categories(sorted(used.categories))
    types = tuple(cl_id for cl_id, kept in zip(cl_ids, kept_c, strict=True) if kept)
    mapped = tuple(each for each in mapped if each.cl_id in types)
    return Selection(obs, types, tuple(sorted(seen["dataset_id"])), steps.table(), mapped, notes)


def _chosen_batches(
    source: CellSource, rules: Rules, splits: SplitTable | None, steps: Steps, seen: dict[str, set[str]]
) -> Iterator[pd.DataFrame]:
    for batch in source.obs_batches():
        for name, found in seen.items():
            found.update(batch[name].unique())
        steps.count(f"in {source.title}", batch[LABEL_COLUMN])
        for rule, flag, kept in _rules_on_cells(rules, batch):
            batch = batch[kept.reindex(batch.index)]
            steps.count(rule, batch[LABEL_COLUMN], flag)
        if splits is not None:
            batch = splits.assign(batch)
            steps.count(f"in {splits.name}", batch[LABEL_COLUMN], f"its {splits.table.index.name} are not theirs")
        labelled = batch[batch[_term_column(batch)] != UNKNOWN]
        steps.count("with a cell type", labelled[LABEL_COLUMN], "--label-column")
        yield labelled


def refuse_unknown(rules: Rules, seen: dict[str, set[str]], title: str) -> None:
    """Refuse names that no cell has, which may be misspelt; the published assays are known not to be.

    Parameters
    ----------
    rules
        Which may ask for assays and tissues.
    seen
        The ``dataset_id``, ``assay`` and ``tissue_general`` of all cells.
    title
        What to call the source.

    Raises
    ------
    SourceError
        If there are no cells, or none has one of the names.

    Examples
    --------
    >>> seen = {"dataset_id": {"d"}, "assay": {"Smart-seq2"}, "tissue_general": {"lung"}}
    >>> refuse_unknown(Rules(assays=None, tissues=("lung",)), seen, "study.h5ad")
    """
    if not seen["dataset_id"]:
        raise SourceError(f"{title} has no cells")
    for what, asked, known, found in (
        ("assay", rules.assays, PUBLISHED_ASSAYS, seen["assay"]),
        ("tissue", rules.tissues, (), seen["tissue_general"]),
    ):
        unknown = sorted({*(asked or ())} - {*known} - found)
        if unknown or (asked is not None and found.isdisjoint(asked)):
            raise SourceError(
                f"no cell of {title} has the {what} {' or '.join(map(repr, unknown or asked or ()))}; its cells have "
                f"{', '.join(map(repr, sorted(found)))}; name some of these, or take any (--{what}s any)"
            )


def _rules_on_cells(rules: Rules, batch: pd.DataFrame) -> Iterator[tuple[str, str, pd.Series]]:
    if rules.primary:
        yield "primary data", "--include-secondary", batch["is_primary_data"]
    if rules.assays is not None:
        yield "of these assays", "--assays", batch["assay"].isin(rules.assays)
    if rules.tissues is not None:
        yield "of these tissues", "--tissues", batch["tissue_general"].isin(rules.tissues)


def _term_column(batch: pd.DataFrame) -> str:
    return TERM_COLUMN if TERM_COLUMN in batch else LABEL_COLUMN


def joined(batches: list[pd.DataFrame]) -> pd.DataFrame:
    """Put batches together, whose categories may differ; they lose their columns on the way.

    Examples
    --------
    >>> joined([pd.DataFrame({"a": pd.Categorical(["x"])}), pd.DataFrame({"a": pd.Categorical(["y"])})])["a"].tolist()
    ['x', 'y']
    """
    columns_of = {}
    for name in batches[0].columns:
        columns = [batch.pop(name) for batch in batches]
        categorical = isinstance(columns[0].dtype, pd.CategoricalDtype)
        columns_of[name] = (
            pd.api.types.union_categoricals(columns)
            if categorical
            else np.concatenate([column.to_numpy() for column in columns])
        )
    return pd.DataFrame(columns_of)


def _with_types(obs: pd.DataFrame, ontology: CellOntology) -> tuple[pd.DataFrame, tuple[str, ...], tuple[Mapped, ...]]:
    """Replace the labels by the ontology's; return also the ids of the types, by code, and what changed."""
    given = obs[_term_column(obs)].cat.remove_unused_categories()
    resolved = ontology.resolve(list(given.cat.categories))
    labels = [ontology.label(cl_id) for cl_id in resolved.cl_ids]
    current = dict(zip(given.cat.categories, zip(resolved.cl_ids, labels, strict=True), strict=True))
    mapped = resolved.mapped + _renamed(obs, given, current)
    ids = dict(zip(labels, resolved.cl_ids, strict=True))
    types = sorted(ids)  # as published: capitals come before small letters
    code = {label: number for number, label in enumerate(types)}
    codes = np.array([code[label] for label in labels])[given.cat.codes]
    obs = obs.drop(columns=[TERM_COLUMN], errors="ignore")
    obs[LABEL_COLUMN] = pd.Categorical.from_codes(codes, pd.Index(types))
    return obs, tuple(ids[label] for label in types), mapped


def _renamed(obs: pd.DataFrame, terms: pd.Series, current: dict[str, tuple[str, str]]) -> tuple[Mapped, ...]:
    """List the labels beside ids that are not the type's label in this release."""
    if terms.name == LABEL_COLUMN:
        return ()
    pairs = obs[[LABEL_COLUMN, TERM_COLUMN]].drop_duplicates()
    return tuple(
        Mapped(label, *current[term], "renamed")
        for label, term in sorted(pairs.itertuples(index=False, name=None))
        if label != current[term][1]
    )


def _tech_samples(obs: pd.DataFrame) -> pd.Categorical:
    """Name each donor of a study: dataset_id + "_" + donor_id."""
    studies, donors = obs["dataset_id"].cat, obs["donor_id"].cat
    pair = studies.codes.to_numpy(np.int64) * len(donors.categories) + donors.codes.to_numpy(np.int64)
    pairs, code = np.unique(pair, return_inverse=True)
    study, donor = np.divmod(pairs, len(donors.categories))
    names = [f"{studies.categories[s]}_{donors.categories[d]}" for s, d in zip(study, donor, strict=True)]
    sorted_names = sorted(set(names))  # two pairs may give one name
    place = {name: number for number, name in enumerate(sorted_names)}
    places = np.array([place[name] for name in names], np.int64)
    return pd.Categorical.from_codes(places[code], pd.Index(sorted_names, dtype=object))


def _chosen_types(
    obs: pd.DataFrame, cl_ids: tuple[str, ...], rules: Rules, ontology: CellOntology, steps: Steps
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return which types pass the rules on types, (c,) bool, and what to say about the rules."""
    kept_c = np.ones(len(cl_ids), bool)
    notes: list[str] = []
    for rule, flag, passed_c in _rules_on_types(obs, cl_ids, rules, ontology, notes):
        kept_c = kept_c & passed_c
        steps.count(rule, obs[LABEL_COLUMN][kept_c[obs[LABEL_COLUMN].cat.codes]], flag)
    return kept_c, tuple(notes)


def _rules_on_types(
    obs: pd.DataFrame, cl_ids: tuple[str, ...], rules: Rules, ontology: CellOntology, notes: list[str]
) -> Iterator[tuple[str, str, np.ndarray]]:
    code, samples = obs[LABEL_COLUMN].cat.codes.to_numpy(np.int64), obs["tech_sample"].cat
    if rules.below is not None:
        resolved = ontology.resolve([rules.below])
        (top,) = resolved.cl_ids
        below = ontology.descendants(top)
        release = f"Cell Ontology {ontology.release}"
        notes += [f"{rules.below} is {each.label} in {release} ({each.why})" for each in resolved.mapped]
        yield f"below {ontology.label(top)}", "--below", np.array([cl_id in below for cl_id in cl_ids])
    cells_c = np.bincount(code, minlength=len(cl_ids))
    yield f"at least {rules.min_cells:,} cells", "--min-cells", cells_c >= rules.min_cells
    pairs = np.unique(code * len(samples.categories) + samples.codes.to_numpy(np.int64))
    found_c = np.bincount(pairs // len(samples.categories), minlength=len(cl_ids))
    yield f"at least {rules.min_tech_samples:,} tech_samples", "--min-tech-samples", found_c >= rules.min_tech_samples
    least = PUBLISHED_MIN_ANCESTORS if rules.min_ancestors is None else rules.min_ancestors
    if rules.min_ancestors is None and not ontology.has_published_depth:
        notes.append(
            f"the published rule of at least {least} ancestors is off: Cell Ontology {ontology.release} "
            f"({ontology.source}) lists fewer ancestors than the release for which it was made"
        )
    elif least > 0:
        n_above = np.array([len(ontology.ancestors(cl_id)) for cl_id in cl_ids])
        yield f"at least {least} ancestors", "--min-ancestors", n_above >= least
