"""Studies of a Census, downloaded once, to evaluate models on."""

from collections.abc import Collection
from pathlib import Path

import xxhash

from hce_jax.census.open import dataset_ids as all_dataset_ids
from hce_jax.census.open import open_census
from hce_jax.census.source import CensusSource
from hce_jax.errors import ConfigError, SourceError
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.store import SideFiles
from hce_jax.store.new_studies import digest_of, refuse_other_request, write_new_studies
from hce_jax.store.selection import PUBLISHED_ASSAYS

#: In place of a dataset_id, before a version: the studies that this Census had not.
_DIFF = "diff_"


def known_and_named(asked: Collection[str]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """Read dataset_ids, among which "diff_VERSION" stands for the studies that this Census had not.

    Returns
    -------
    The studies that are not new, None where no version is named; and the studies that are named.

    Raises
    ------
    SourceError
        If that Census cannot be read.

    Examples
    --------
    >>> known_and_named(["a study"])
    (None, frozenset({'a study'}))
    """
    known: list[frozenset[str]] = []
    for version in sorted(each.removeprefix(_DIFF) for each in asked if each.startswith(_DIFF)):
        with open_census(version) as old:
            known.append(frozenset(all_dataset_ids(old)))
    named = frozenset(each for each in asked if not each.startswith(_DIFF))
    return frozenset.intersection(*known) if known else None, named


def chunks_folder(root: str | Path, dataset_ids: Collection[str], census_version: str) -> Path:
    """Return where downloaded studies lie, as published: ``{name}_{version}_chunks``.

    The name is that of the one study, or "diff_VERSION"; of several it is their number and a checksum of their names. A
    copy of a Census goes by the last part of its path.

    Examples
    --------
    >>> chunks_folder("ood", ["diff_2023-05-15"], "2023-12-15").as_posix()
    'ood/diff_2023-05-15_2023-12-15_chunks'
    >>> chunks_folder("ood", ["b", "a"], "copies/2023-12-15").as_posix()
    'ood/2_studies_c60f8ba5_2023-12-15_chunks'
    """
    names = sorted(map(_name, set(dataset_ids)))
    digest = xxhash.xxh3_64_hexdigest("\n".join(names).encode())[:8]
    name = names[0] if len(names) == 1 else f"{len(names)}_studies_{digest}"
    return Path(root) / f"{name}_{_last(census_version)}_chunks"


def _name(dataset_id: str) -> str:
    return _DIFF + _last(dataset_id.removeprefix(_DIFF)) if dataset_id.startswith(_DIFF) else dataset_id


def _last(census_version: str) -> str:
    return census_version.rstrip("/").rpartition("/")[2]


def download_new_studies(
    side: SideFiles,
    root: str | Path,
    *,
    census_version: str = "2023-12-15",
    dataset_ids: Collection[str] = ("diff_2023-05-15",),
    ontology: CellOntology | None = None,
    assays: tuple[str, ...] | None = PUBLISHED_ASSAYS,
    force: bool = False,
) -> Path:
    """Give the folder with the cells of some studies of a Census, raw counts, for a model's genes and types.

    A complete folder that was made for the same is used as it is, without opening a Census; else it is made, which goes
    on where an interrupted call ended. The defaults are the published ones.

    Parameters
    ----------
    side
        The model's genes and types.
    root
        The folder is in it; see :func:`chunks_folder`.
    census_version
        A published version, or a copy.
    dataset_ids
        The studies; "diff_VERSION": those that this Census had not.
    ontology
        Says which type a label stands for; the default release if not given.
    assays
        Only cells measured in one of these ways; None: in any.
    force
        Make the folder anew.

    Returns
    -------
    The folder with ``chunk_0.h5ad``, ``chunk_1.h5ad``, ... of 131,072 cells.

    Raises
    ------
    StoreError
        If a folder of that name was made for something else, is not complete, or cannot be written.
    SourceError
        If the Census cannot be read, has no such study, or no cell is left.
    ConfigError
        If no study is named.

    Examples
    --------
    >>> download_new_studies(open_store("store").side, "ood")  # doctest: +SKIP
    PosixPath('ood/diff_2023-05-15_2023-12-15_chunks')
    """
    if not dataset_ids:
        raise ConfigError("no study is named; give dataset_ids, or diff_2023-05-15 for those that this Census had not")
    ontology = ontology or CellOntology.open()
    folder = chunks_folder(root, dataset_ids, census_version)
    request = {
        "Census": _last(census_version),
        "studies": sorted(map(_name, set(dataset_ids))),
        "assays": "any" if assays is None else sorted(assays),
        "Cell Ontology": ontology.release,
        **digest_of(side),
    }
    if folder.exists() and not force:
        refuse_other_request(folder, request)
        return folder
    known, named = known_and_named(dataset_ids)
    with CensusSource(census_version) as source:
        if absent := sorted(named.difference(all_dataset_ids(source.census))):
            raise SourceError(f"{source.title} has no study {' or '.join(map(repr, absent))}; name a dataset_id of it")
        found = write_new_studies(
            source,
            side,
            known,
            folder,
            ontology=ontology,
            assays=assays,
            dataset_ids=named,
            request=request,
            force=force,
        )
    print(found.report())
    return folder
