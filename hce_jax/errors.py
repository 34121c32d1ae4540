"""Errors that a user can cause. The commands print their text as one line and exit with code 2."""


class UserError(Exception):
    r"""Something the user gave cannot be used; the message says what, where, and what to do.

    Examples
    --------
    >>> str(UserError("no such folder: /data\n(a library's own words); set DATA_PATH to a store"))
    "no such folder: /data (a library's own words); set DATA_PATH to a store"
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))  # one line, also where it quotes a library's message


class ConfigError(UserError):
    """A field of the configuration is unknown or has an unusable value."""


class StoreError(UserError):
    """A store's file is missing, damaged, or does not agree with another file of the store."""


class HierarchyError(UserError):
    """A matrix is not the reachability matrix of a directed acyclic graph."""


class OntologyError(UserError):
    """A cell type, or a release of the Cell Ontology, is not known, or its file cannot be read."""


class SourceError(UserError):
    """Cells with raw counts, a Census or h5ad files, cannot be read as they are, or hold nothing that was asked for."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not belong to the given data."""


class TrainingError(UserError):
    """Training cannot go on: its loss is no longer a number."""


class Preempted(Exception):
    """The process was told to end (SIGTERM). No mistake: what was done is saved before the command says so."""
