"""Files that ``torch.save`` wrote, read without torch and without running what their pickle asks for.

Such a file is an uncompressed zip archive of one folder: ``data.pkl``, the pickle of what was saved; ``data/KEY``, the
numbers of a storage; ``byteorder``. In the pickle a tensor is a call of ``torch._utils._rebuild_tensor_v2`` on a
storage, which several tensors may share, and a storage is an id that the reader looks up.

A pickle is a program that may call whatever it can name. Here it can name only what a checkpoint of PyTorch Lightning
needs, and gets a stand-in for each, which only describes: nothing of torch is there, and no stand-in can be changed.
"""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hce_jax.errors import CheckpointError

_ZIP = b"PK\x03\x04"
#: How files of torch before 1.6 begin: the pickle of a number.
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class TorchTensor(NamedTuple):
    """A tensor of the file, not yet read: some numbers of a storage.

    Tensors that are the same numbers in the file are equal.

    Attributes
    ----------
    storage
        Where the numbers lie.
    offset
        Place of the first one.
    shape, strides
        As numpy has them; strides are in numbers, not bytes.

    Examples
    --------
    >>> TorchTensor(_Storage("0", np.dtype(np.float32), 12), 0, (4, 3), (1, 4)).shape
    (4, 3)
    """

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """What ``torch.save`` wrote, opened with :func:`open_torch_file`.

    Parameters
    ----------
    path
        The file.
    archive
        The same, open.

    Attributes
    ----------
    content
        What was saved: dictionaries, lists, plain values, and :class:`TorchTensor` for the tensors.

    Examples
    --------
    >>> with open_torch_file(Path("model.ckpt")) as file:  # doctest: +SKIP
    ...     bias = file.array(file.content["state_dict"]["classifier.bias"])
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self._archive = path, archive
        self._storages: dict[str, bytes] = {}
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is a zip archive, but not one of torch.save: it has no FOLDER/data.pkl")
        self._folder = pickles[0].removesuffix("data.pkl")
        order = self._read("byteorder") if f"{self._folder}byteorder" in archive.NameToInfo else b"little"
        if order != b"little":
            raise CheckpointError(f"{path} has byte order {order.decode(errors='replace')!r}; only 'little' is read")
        self.content: Any = self._unpickled(self._read("data.pkl"))

    def array(self, tensor: TorchTensor) -> np.ndarray:
        """Read a tensor: a view, not to be written to, of its storage, which is read once.

        Raises
        ------
        CheckpointError
            If its storage is not in the file, is damaged, or does not hold the whole tensor.
        """
        key, dtype, size = tensor.storage
        if key not in self._storages:
            self._storages[key] = self._read(f"data/{key}")
        data = self._storages[key]
        try:
            if len(data) != size * dtype.itemsize:
                raise ValueError
            strides = [step * dtype.itemsize for step in tensor.strides]
            return np.ndarray(tensor.shape, dtype, data, tensor.offset * dtype.itemsize, strides)
        except (ValueError, OverflowError) as error:  # numpy checks that all lies within the data
            raise CheckpointError(
                f"{self.path} is damaged: data/{key} has {len(data):,} bytes, which do not fit a tensor {tensor.shape}"
            ) from error

    def _read(self, name: str) -> bytes:
        try:
            entry = self._archive.getinfo(self._folder + name)
            if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a small file stays small
                raise CheckpointError(f"{name} of {self.path} is compressed, which torch.save never does")
            return self._archive.read(entry)
        except KeyError as error:
            raise CheckpointError(f"{self.path} is damaged: it lacks {name}") from error
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} is damaged: {name} cannot be read ({error})") from error

    def _unpickled(self, data: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(data):
                # Objects get numbers; the unpickler makes room for as many, before it looks how many there are.
                if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
                    raise ValueError(f"{argument:,} objects in {len(data):,} bytes")
            return _Unpickler(io.BytesIO(data)).load()
        except _RefusedError as error:
            raise CheckpointError(f"{self.path} is not read: its pickle {error}") from error
        except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError,
                MemoryError, RecursionError) as error:  # fmt: skip
            raise CheckpointError(f"{self.path} is damaged: its pickle cannot be read ({error})") from error


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file of ``torch.save``; tensors can be read while it is open.

    Raises
    ------
    CheckpointError
        If it is no such file, is damaged or cut off, or its pickle asks for anything that a checkpoint does not need.

    Examples
    --------
    >>> with open_torch_file(Path("model.ckpt")) as file:  # doctest: +SKIP
    ...     print(file.content["epoch"])
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file of torch.save")
    try:
        with path.open("rb") as opened:
            start = opened.read(len(_LEGACY))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if start == _LEGACY:
        raise CheckpointError(f"{path} has the format of torch before 1.6; load it with torch and save it again")
    if not start.startswith(_ZIP):
        raise CheckpointError(f"{path} is not a file of torch.save")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is cut off or damaged ({error}); copy or download it again") from error
    with archive:
        yield TorchFile(path, archive)


class _RefusedError(Exception):
    """The pickle asks for something that a checkpoint does not need; the message goes on from "its pickle"."""


class _StandIn:
    """What the pickle gets for a name: it cannot be changed from there, and called only if it has a meaning.

    (To "build" an object, a pickle calls its ``__setstate__``; without one it would write into the object.)
    """

    __slots__ = ("_meaning", "name")

    def __init__(self, name: str, meaning: Callable[..., Any] | None = None):
        self.name, self._meaning = name, meaning

    def __call__(self, *arguments: Any) -> Any:
        if self._meaning is None:
            raise _RefusedError(f"calls {self.name}")
        return self._meaning(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"changes {self.name}")


class _Dictionary(dict[Any, Any]):
    """An OrderedDict without the attributes that torch gives it."""

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _gradient: Any, _hooks: Any, metadata: Any = None
) -> TorchTensor:
    whole = type(shape) is type(strides) is tuple and all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if not (isinstance(storage, _Storage) and whole and len(shape) == len(strides)):
        raise _RefusedError("describes a tensor that cannot be")
    if metadata:  # the numbers are to be negated or conjugated
        raise _RefusedError("describes a tensor that is computed from another")
    return TorchTensor(storage, offset, shape, strides)


#: What the pickle may name; the last two are among the hyper-parameters.
_NAMES = {
    stand_in.name: stand_in
    for stand_in in (
        _StandIn("collections.OrderedDict", _Dictionary),
        _StandIn("torch._utils._rebuild_tensor_v2", _rebuild_tensor),
        *(_StandIn(f"torch.{name}") for name in _STORAGES),
        _StandIn("torch.optim.adamw.AdamW"),
        _StandIn("torch.optim.lr_scheduler.StepLR"),
    )
}


class _Unpickler(pickle.Unpickler):
    """Gives the pickle stand-ins for the names it may use, and storages for their ids."""

    def find_class(self, module: str, name: str) -> _StandIn:
        full_name = f"{module}.{name}"
        if full_name not in _NAMES:
            raise _RefusedError(f"asks for {full_name!r}, which no checkpoint of the published models needs")
        return _NAMES[full_name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StandIn(name=kind), str(key), str(), int(size)) if size >= 0:
                dtype = _STORAGES.get(kind.removeprefix("torch."))
                if dtype is not None:
                    return _Storage(key, np.dtype(dtype), size)
        raise _RefusedError("has a storage of an unknown kind")
