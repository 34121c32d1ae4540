"""Files as ``torch.save`` writes them, made without torch: a pickle put together opcode by opcode, in a zip archive."""

import struct
import zipfile

import numpy as np

KINDS = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Opcodes(bytes):
    """A part of a pickle as it is."""


def named(module, name):
    return Opcodes(f"c{module}\n{name}\n".encode())


def called(function, *arguments):
    return Opcodes(pickled(function) + pickled(arguments) + b"R")


def pickled(value):
    """Give the opcodes that put a value on the stack (protocol 2)."""
    match value:
        case Opcodes():
            return bytes(value)
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            return b"J" + struct.pack("<i", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(pickled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(pickled, value)) + b"e"
        case dict():
            return b"}(" + b"".join(pickled(each) for pair in value.items() for each in pair) + b"u"
    raise TypeError(type(value))


def storage(key, kind, size):
    return Opcodes(pickled(("storage", named("torch", kind), key, "cuda:0", size)) + b"Q")


def tensor(of, offset, shape, strides):
    hooks = called(named("collections", "OrderedDict"))
    return called(named("torch._utils", "_rebuild_tensor_v2"), of, offset, shape, strides, False, hooks)


def state_dict(arrays, storages):
    """Give the opcodes of an OrderedDict of tensors, with the attribute that torch adds; fills ``storages``."""
    entries = {}
    for name, array in arrays.items():
        key = str(len(storages))
        storages[key] = np.ascontiguousarray(array).tobytes()
        strides = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides)
        entries[name] = tensor(storage(key, KINDS[array.dtype.name], array.size), 0, array.shape, strides[: array.ndim])
    whole = pickled(called(named("collections", "OrderedDict"))) + pickled(entries)[1:]
    return Opcodes(whole + pickled({"_metadata": {"": {"version": 1}}}) + b"b")


def write_torch_file(path, content, storages=(), **others):
    """Write what ``torch.save`` would: ``content`` is pickled, or is a whole pickle."""
    content = content if isinstance(content, bytes) else Opcodes(pickled(content))
    whole = bytes(content) if content.startswith(b"\x80") else b"\x80\x02" + content + b"."
    entries = {"data.pkl": whole, "byteorder": b"little", "version": b"3\n"} | others
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_checkpoint(path, arrays, hyper_parameters=None, **others):
    """Write a checkpoint as PyTorch Lightning does."""
    storages = {}
    content = {"epoch": 3, "global_step": 40, "state_dict": state_dict(arrays, storages)} | others
    if hyper_parameters is not None:
        content["hyper_parameters"] = hyper_parameters
    return write_torch_file(path, content, storages)
