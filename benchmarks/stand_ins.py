"""Inert stand-ins for packages that are not installed, so that hce_jax can be imported where few are.

A machine with a GPU often has jax, flax and optax, and nothing else that hce_jax imports: readers of files, loaders,
plots. A measurement of the steps there uses none of them, but the modules that it uses import them. A stand-in lets
such an import pass: whatever is asked of it gives the same inert object, which can be called, indexed, used in an
annotation and derived from, and does nothing. A package that is installed is never replaced.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

#: What hce_jax imports beside the standard library, jax, flax, optax, numpy and scipy.
PACKAGES = (
    "absl", "anndata", "cellxgene_census", "cellxgene_ontology_guide", "celltypist", "grain", "h5py", "jaxtyping",
    "matplotlib", "ml_collections", "numba", "obonet", "orbax", "pandas", "psutil", "pyarrow", "sklearn",
    "tensorboardX", "threadpoolctl", "tiledbsoma", "tqdm", "xxhash", "yaml", "zarr",
)  # fmt: skip


def stand_in(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Let those packages be imported that are not installed; return which they are.

    Parameters
    ----------
    packages
        Names of top-level packages.

    Returns
    -------
    list
        The names among them for which a stand-in is imported from now on, in the order given.

    Examples
    --------
    >>> stand_in(["json", "no_such_package_at_all"])
    ['no_such_package_at_all']
    >>> import no_such_package_at_all.part
    >>> no_such_package_at_all.part.function(3) is no_such_package_at_all.thing
    True
    """
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    sys.meta_path.append(_Finder(absent))  # last: every other finder is asked before
    return absent


class _Inert:
    """Gives itself, whatever is done with it; as a base class it is none."""

    def __getattr__(self, name: str) -> "_Inert":
        if name.startswith("__"):  # or Python would take it for whatever it looks for
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Inert":
        return self

    def __getitem__(self, key: Any) -> "_Inert":
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())  # with __getitem__ alone a loop would never end

    def __or__(self, other: Any) -> "_Inert":
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


_INERT = _Inert()


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> _Inert:
        if name.startswith("__"):
            raise AttributeError(name)
        return _INERT


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]):
        self._packages = frozenset(packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
