"""Which cell goes into which split."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd

from hce_jax.errors import SourceError
from hce_jax.store.given_table import read_given_table
from hce_jax.store.schema import LABEL_COLUMN, SPLITS

#: Shares of the tech_samples, as published.
VAL_SHARE, TEST_SHARE = 0.15, 0.15
#: By what a table of splits may name cells; the first of these columns that it has counts.
_KEYS = ("soma_joinid", "tech_sample", "donor_id", "dataset_id")


@dataclasses.dataclass(frozen=True)
class SplitTable:
    """Splits that somebody has decided on.

    Attributes
    ----------
    name
        What to call it in messages.
    table
        Indexed by the cells' key, whose name says which; columns ``split`` and, maybe, ``cell_type``.
    """

    name: str
    table: pd.DataFrame

    @staticmethod
    def read(path: str | Path) -> "SplitTable":
        """Read a table of splits, CSV (also compressed) or parquet.

        It has a column ``split`` (train, val, test), and one that says which cells: ``soma_joinid``, ``tech_sample``,
        ``donor_id`` or ``dataset_id``, the first of these that it has. A column ``cell_type`` takes the place of the
        cells' labels; it needs ``soma_joinid``.

        Raises
        ------
        SourceError
            If it is absent, cannot be read, lacks a column, or names a cell twice or another split.

        Examples
        --------
        >>> SplitTable.read("splits.csv").table["split"].value_counts()  # doctest: +SKIP
        """
        path = Path(path)
        table = read_given_table(path, "the table of splits")
        key = next((name for name in _KEYS if name in table), None)
        if key is None or "split" not in table:
            raise SourceError(
                f"the table of splits {path} has the columns {', '.join(map(repr, map(str, table.columns)))}; it needs "
                f"'split' and one of {', '.join(map(repr, _KEYS))}, separated by commas"
            )
        wanted = [key, "split", *([LABEL_COLUMN] if key == "soma_joinid" and LABEL_COLUMN in table else [])]
        if table[wanted].isna().any(axis=None):
            raise SourceError(f"{path} has an empty entry in one of the columns {', '.join(wanted)}")
        if key == "soma_joinid":
            numbers = pd.to_numeric(table[key], errors="coerce")
            whole = (numbers % 1 == 0).all()  # they are 1.0, 2.0, ... after many a join
            table[key] = numbers.astype(np.int64) if whole else numbers
        if key == "soma_joinid" and not pd.api.types.is_integer_dtype(table[key]):
            raise SourceError(f"{path} has entries in the column {key} that are no whole numbers")
        table = table[wanted].astype({name: str for name in wanted if name != "soma_joinid"})
        others = sorted(set(table["split"]) - set(SPLITS))
        if others:
            raise SourceError(f"{path} names the split {others[0]!r}; a split is one of {', '.join(SPLITS)}")
        table = table.drop_duplicates().set_index(key)
        if repeated := table.index[table.index.duplicated()].tolist():
            raise SourceError(f"{path} puts the {key} {repeated[0]} into two splits, or gives it two labels")
        return SplitTable(path.name, table)

    def assign(self, batch: pd.DataFrame) -> pd.DataFrame:
        """Keep the cells that the table names, with their split and, where it has one, its label.

        Examples
        --------
        >>> table = pd.DataFrame({"split": ["val"]}, index=pd.Index(["d"], name="donor_id"))
        >>> batch = pd.DataFrame({"donor_id": ["c", "d"]})
        >>> SplitTable("splits", table).assign(batch)["split"].tolist()
        ['val']
        """
        key = self.table.index.name
        if key == "tech_sample":
            values = batch["dataset_id"].astype(str) + "_" + batch["donor_id"].astype(str)
        else:
            values = batch[key]
        place = self.table.index.get_indexer(pd.Index(values))
        kept = place >= 0
        named = batch[kept].assign(split=pd.Categorical(self.table["split"].iloc[place[kept]], SPLITS))
        if LABEL_COLUMN in self.table:
            named[LABEL_COLUMN] = pd.Categorical(self.table[LABEL_COLUMN].iloc[place[kept]])
            named = named.drop(columns=["cell_type_ontology_term_id"], errors="ignore")
        return named


def draw_splits(tech_samples: pd.Series, seed: int) -> pd.Categorical:
    """Split cells by tech_sample, 70 % of these into train and 15 % each into val and test, as published.

    The tech_samples in order of appearance are shuffled; the first go into train. val and test are rounded up.

    Parameters
    ----------
    tech_samples
        The tech_sample of each cell (n,), categorical.
    seed
        Of the shuffling; 1 as published.

    Raises
    ------
    SourceError
        If there are too few for three splits.

    Examples
    --------
    >>> draw_splits(pd.Series(["a", "b", "b", "c"], dtype="category"), seed=1).tolist()
    ['train', 'val', 'val', 'test']
    """
    samples = tech_samples.unique()
    n_val, n_test = math.ceil(VAL_SHARE * len(samples)), math.ceil(TEST_SHARE * len(samples))
    n_train = len(samples) - n_val - n_test
    if n_train < 1:
        raise SourceError(
            f"the cells come from {len(samples)} tech_samples (donors of a study), too few to draw three splits of; "
            "say which cell goes where with a table of splits (--splits) or a column (--split-column)"
        )
    order = np.arange(len(samples))
    np.random.default_rng(seed).shuffle(order)
    split = np.empty(len(samples), np.int64)
    split[order] = np.repeat(np.arange(3), [n_train, n_val, n_test])
    number = pd.Categorical(samples.astype(str), tech_samples.cat.categories).codes
    split_of = np.empty(len(tech_samples.cat.categories), np.int64)
    split_of[number] = split
    return pd.Categorical.from_codes(split_of[tech_samples.cat.codes], pd.Index(SPLITS, dtype=object))
