"""The CZ CELLxGENE Census: cells with raw counts, published in versions; the only importer of its libraries."""

from hce_jax.census.download import chunks_folder, download_new_studies, known_and_named
from hce_jax.census.open import Census, census_facts, dataset_ids, open_census
from hce_jax.census.source import CensusSource

__all__ = [
    "Census",
    "CensusSource",
    "census_facts",
    "chunks_folder",
    "dataset_ids",
    "download_new_studies",
    "known_and_named",
    "open_census",
]
