"""The CZ CELLxGENE Census: cells with raw counts, published in versions; the only importer of its libraries."""

from hce_jax.census.open import Census, census_facts, dataset_ids, open_census
from hce_jax.census.source import CensusSource

__all__ = ["Census", "CensusSource", "census_facts", "dataset_ids", "open_census"]
