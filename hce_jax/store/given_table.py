"""Tables that a user gives."""

import zlib
from pathlib import Path

import pandas as pd

from hce_jax.errors import SourceError


def read_given_table(path: Path, what: str) -> pd.DataFrame:
    """Read parquet or CSV (also compressed); of CSV every entry as text, for a donor may be called 007 and a gene NA.

    Parameters
    ----------
    path
        The file.
    what
        What to call it in a message, e.g. "the table of splits".

    Raises
    ------
    SourceError
        If it is absent or cannot be read.

    Examples
    --------
    >>> read_given_table(Path("absent.csv"), "the list of genes")
    Traceback (most recent call last):
        ...
    hce_jax.errors.SourceError: the list of genes absent.csv does not exist
    """
    if not path.is_file():
        raise SourceError(f"{what} {path} does not exist")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SourceError(f"{what} {path} cannot be read as CSV or parquet ({error})") from error
