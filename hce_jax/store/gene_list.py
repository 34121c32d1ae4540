"""The genes of a store to be built."""

from pathlib import Path

import pandas as pd

from hce_jax.errors import SourceError
from hce_jax.store.cell_source import CellSource
from hce_jax.store.given_table import read_given_table

#: In place of a file: the genes of the source that code for proteins, or all.
PROTEIN_CODING, ALL = "protein-coding", "all"
#: How the Census and h5ad files say it.
_FEATURE_TYPE = "protein_coding"
#: What the column of names is called; the last in the published features.parquet.
_NAME_COLUMNS = ("feature_name", "gene_names")


def gene_list(spec: str, source: CellSource) -> pd.DataFrame:
    """Return the genes of a store: ``feature_id`` and ``feature_name``, in the order of its columns.

    Parameters
    ----------
    spec
        "protein-coding": those of which the source says so. "all": all of the source. Else a file, parquet or CSV, such
        as another store's var.parquet: with a column ``feature_id`` these genes, in this order, in the source or not;
        with names only (``feature_name``, or ``gene_names`` as in the published features.parquet) the genes of the
        source that have these names, in its order.
    source
        Where the cells are.

    Raises
    ------
    SourceError
        If the source does not say which genes code for proteins, the file cannot be used, or no gene is left.

    Examples
    --------
    >>> len(gene_list("merlin_cxg_2023_05_15_sf-log1p/var.parquet", source))  # doctest: +SKIP
    19331
    """
    genes = source.genes()
    if spec == PROTEIN_CODING:
        if "feature_type" not in genes:
            raise SourceError(
                f"{source.title} does not say which genes code for proteins; name a file that does, such as another "
                "store's var.parquet or the published features.parquet (--genes FILE), or take all (--genes all)"
            )
        genes = genes[genes["feature_type"] == _FEATURE_TYPE]
    elif spec != ALL:
        genes = _read(Path(spec), genes)
    genes = genes[["feature_id", "feature_name"]].reset_index(drop=True)
    if genes.empty:
        raise SourceError(f"no gene of {source.title} is among those asked for by --genes {spec}")
    if repeated := genes["feature_id"][genes["feature_id"].duplicated()].tolist():
        raise SourceError(
            f"--genes {spec} gives the gene {repeated[0]} more than once ({len(repeated):,} in all); each must be "
            "there once"
        )
    return genes


def _read(path: Path, genes: pd.DataFrame) -> pd.DataFrame:
    table = read_given_table(path, f"the list of genes (--genes FILE, {PROTEIN_CODING} or {ALL})")
    names = next((column for column in _NAME_COLUMNS if column in table), None)
    if names is None and "feature_id" not in table:
        columns = ", ".join(map(str, table.columns))
        raise SourceError(f"the list of genes {path} has the columns {columns}; it needs feature_id or feature_name")
    if "feature_id" not in table:
        return genes[genes["feature_name"].isin(table[names].astype(str))]
    if table["feature_id"].isna().any():
        raise SourceError(f"the list of genes {path} has an empty entry in the column feature_id")
    ids = table["feature_id"].astype(str)
    known = genes.drop_duplicates("feature_id").set_index("feature_id")["feature_name"]
    found = table[names].astype(object) if names else ids.map(known)
    return pd.DataFrame({"feature_id": ids, "feature_name": found.fillna(ids).astype(str)})
