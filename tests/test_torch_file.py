"""Files of torch.save are read without torch, and what their pickle asks for is not executed."""

import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
from torch_files import KINDS, Opcodes, called, named, pickled, state_dict, storage, tensor, write_torch_file

from hce_jax.errors import CheckpointError
from hce_jax.torch_file import open_torch_file

REBUILD = named("torch._utils", "_rebuild_tensor_v2")


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it is an error


def content(path):
    with open_torch_file(path) as file:
        return file.content


def refused(path):
    with pytest.raises(CheckpointError) as raised:
        content(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def bfloat16(values):
    """Give the values, exact in bfloat16, as its bytes: the upper half of float32."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


# --- what is in a file


def test_plain_values_come_back_as_they_were(tmp_path):
    saved = {"epoch": 3, "rates": [0.5, (1, -2)], "nothing": None, "on": True, "of": {"a": "ß"}}
    assert content(write_torch_file(tmp_path / "a.ckpt", saved)) == saved


@pytest.mark.parametrize("name", KINDS)
def test_numbers_of_every_type_come_back(tmp_path, name):
    values = [0, 1, 1, 0, 1] if name == "bool" else [0, 1, 7, 100, 64]
    data = bfloat16(values) if name == "bfloat16" else np.array(values, name).tobytes()
    path = write_torch_file(tmp_path / "a.ckpt", tensor(storage("0", KINDS[name], 5), 0, (5,), (1,)), {"0": data})
    with open_torch_file(path) as file:
        found = file.array(file.content)
    assert found.dtype.name == name
    np.testing.assert_array_equal(found.astype(np.float64), values)


def test_views_have_their_strides_and_share_their_storage(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    of = storage("7", "FloatStorage", 12)
    views = {
        "whole": (tensor(of, 0, (3, 4), (4, 1)), numbers.reshape(3, 4)),
        "transposed": (tensor(of, 0, (4, 3), (1, 4)), numbers.reshape(3, 4).T),
        "every second of the last row": (tensor(of, 8, (2,), (2,)), numbers[[8, 10]]),
        "one value in all places": (tensor(of, 5, (2, 3), (0, 0)), np.full((2, 3), 5)),
        "a scalar": (tensor(of, 11, (), ()), np.array(11)),
        "nothing": (tensor(of, 0, (0, 4), (4, 1)), np.zeros((0, 4))),
    }
    path = write_torch_file(tmp_path / "a.ckpt", {name: view for name, (view, _) in views.items()},
                            {"7": numbers.tobytes()})  # fmt: skip
    with open_torch_file(path) as file:
        found = {name: file.array(each) for name, each in file.content.items()}
    for name, (_, expected) in views.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert np.shares_memory(found["whole"], found["transposed"])


def test_only_what_is_wanted_is_read(tmp_path):
    storages = {}
    saved = {"state_dict": state_dict({"w": np.ones(3, np.float32), "moment": np.ones(9, np.float32)}, storages)}
    path = write_torch_file(tmp_path / "a.ckpt", saved, {"0": storages["0"]})
    with open_torch_file(path) as file:
        np.testing.assert_array_equal(file.array(file.content["state_dict"]["w"]), np.ones(3))
        with pytest.raises(CheckpointError, match=r"a\.ckpt is damaged: it lacks data/1"):
            file.array(file.content["state_dict"]["moment"])


def test_files_of_older_torch_do_not_say_the_byte_order(tmp_path):
    path = write_torch_file(tmp_path / "a.ckpt", {"epoch": 3})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as older:
        older.writestr("older/data.pkl", archive.read("archive/data.pkl"))
    assert content(tmp_path / "b.ckpt") == {"epoch": 3}


# --- a pickle that asks for more


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ["system", "eval", "getattr", "open", "import"])
def test_a_call_of_anything_else_is_refused_by_name_and_not_executed(tmp_path, protocol, name):
    witness = tmp_path / "witness"
    call, asked = {
        "system": (Calls(os.system, f"touch {witness}"), f"{os.system.__module__}.system"),
        "eval": (Calls(eval, f"open({str(witness)!r}, 'w')"), "eval"),
        "getattr": (Calls(getattr, Calls(__import__, "os"), "system"), "getattr"),
        "open": (Calls(open, str(witness), "w"), "open"),
        "import": (Calls(__import__, "antigravity"), "__import__"),
    }[name]
    path = write_torch_file(tmp_path / "a.ckpt", pickle.dumps({"state_dict": call}, protocol) if protocol > 1
                            else b"\x80\x02" + pickle.dumps(call, protocol))  # fmt: skip
    message = refused(path)
    assert "its pickle asks for '" in message
    assert f"{asked}'" in message
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (named("cellnet.models", "TabnetClassifier"), "asks for 'cellnet.models.TabnetClassifier'"),
        (named("torch", "load"), "asks for 'torch.load'"),
        (named("torch._utils", "_rebuild_tensor_v2.__globals__"), "asks for 'torch._utils._rebuild_tensor_v2.__glob"),
        (named("collections", "OrderedDict.fromkeys"), "asks for 'collections.OrderedDict.fromkeys'"),
        (Opcodes(b"(X\x02\0\0\0idios\nsystem\n"), "asks for 'os.system'"),
        (Opcodes(b"(cos\nsystem\nX\x02\0\0\0ido"), "asks for 'os.system'"),
        (called(named("torch", "FloatStorage"), 3), "calls torch.FloatStorage"),
        (called(named("torch.optim.adamw", "AdamW"), []), "calls torch.optim.adamw.AdamW"),
        (Opcodes(REBUILD + pickled((None, {"__defaults__": ()})) + b"b"), "changes torch._utils._rebuild_tensor_v2"),
        (Opcodes(named("collections", "OrderedDict") + pickled({"a": 1}) + b"b"), "changes collections.OrderedDict"),
        (called(REBUILD, "no storage", 0, (1,), (1,), False, {}), "describes a tensor that cannot be"),
        (tensor(storage("0", "FloatStorage", 9), 0, (2,), (-1,)), "describes a tensor that cannot be"),
        (tensor(storage("0", "FloatStorage", 9), 0, (2, 2), (1,)), "describes a tensor that cannot be"),
        (tensor(storage("0", "FloatStorage", 9), 0, [2], [1]), "describes a tensor that cannot be"),
        (called(REBUILD, storage("0", "FloatStorage", 9), 0, (9,), (1,), False, {}, {"neg": True}),
         "describes a tensor that is computed"),
        (storage("0", "FloatStorage", -1), "has a storage of an unknown kind"),
        (Opcodes(pickled(("storage", named("torch.optim.adamw", "AdamW"), "0", "cpu", 3)) + b"Q"), "has a storage of"),
        (Opcodes(pickled("module") + b"Q"), "has a storage of an unknown kind"),
    ],
)  # fmt: skip
def test_what_no_checkpoint_needs_is_refused(tmp_path, content, says):
    assert f"its pickle {says}" in refused(write_torch_file(tmp_path / "a.ckpt", content))


@pytest.mark.parametrize(
    "content",
    [
        Opcodes(storage("0", "FloatStorage", 9) + pickled({"size": 99}) + b"b"),
        Opcodes(tensor(storage("0", "FloatStorage", 1), 0, (1,), (1,)) + pickled((None, {"shape": (9,)})) + b"b"),
        Opcodes(named("collections", "OrderedDict") + pickled(()) + b"\x81"),  # NEWOBJ
        Opcodes(b"\x82\x01"),  # a registered extension
        Opcodes(b"\x8e" + struct.pack("<Q", 1 << 40)),  # as many bytes
        Opcodes(b"0"),
        Opcodes(b"}(" + pickled("key without value") + b"u"),
    ],
    ids=["writes into a storage", "writes into a tensor", "NEWOBJ", "extension", "BINBYTES8",
         "empty stack", "half a pair"],
)  # fmt: skip
def test_a_pickle_that_cannot_be_is_damaged(tmp_path, content):
    assert "is damaged: its pickle cannot be read" in refused(write_torch_file(tmp_path / "a.ckpt", content))


@pytest.mark.parametrize("opcode", [b"r" + struct.pack("<I", 4_000_000_000), b"p4000000000\n"])
def test_no_room_is_made_for_more_objects_than_can_be(tmp_path, opcode):
    path = write_torch_file(tmp_path / "a.ckpt", Opcodes(pickled({}) + opcode))
    assert "its pickle cannot be read (4,000,000,000 objects in " in refused(path)


def test_a_tensor_does_not_reach_beyond_its_storage(tmp_path):
    data = {"0": np.arange(4, dtype=np.float32).tobytes()}
    for size, offset, shape, strides in ((4, 1, (4,), (1,)), (4, 0, (2, 2), (3, 1)), (8, 0, (8,), (1,)),
                                         (3, 0, (3,), (1,)), (4, 1 << 30, (1,), (1,)),
                                         (4, 0, (2,), (1 << 30,))):  # fmt: skip
        of = storage("0", "FloatStorage", size)
        path = write_torch_file(tmp_path / "a.ckpt", tensor(of, offset, shape, strides), data)
        with open_torch_file(path) as file, pytest.raises(CheckpointError, match="data/0 has 16 bytes, which do not"):
            file.array(file.content)


# --- damaged, or another kind of file


def test_a_file_that_was_cut_off_is_named(tmp_path):
    storages = {}
    saved = {"state_dict": state_dict({"w": np.ones((40, 5), np.float32)}, storages)}
    whole = write_torch_file(tmp_path / "whole.ckpt", saved, storages).read_bytes()
    path = tmp_path / "a.ckpt"
    for size in range(4, len(whole), 7):
        path.write_bytes(whole[:size])
        assert "a.ckpt is cut off or damaged" in refused(path)


def test_a_flipped_byte_is_found(tmp_path):
    storages = {}
    saved = {"w": state_dict({"w": np.ones(100, np.float32)}, storages)}
    path = write_torch_file(tmp_path / "a.ckpt", saved, storages)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(np.ones(3, np.float32).tobytes(), np.array([1, 2, 1], np.float32).tobytes(), 1))
    with (
        open_torch_file(path) as file,
        pytest.raises(CheckpointError, match=r"damaged: data/0 cannot be read \(Bad CRC"),
    ):
        file.array(file.content["w"]["w"])
    path.write_bytes(whole.replace(b"_metadata", b"_meta\0\0\0\0", 1))
    assert "is damaged: data.pkl cannot be read (Bad CRC" in refused(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "a.ckpt"
    assert "a.ckpt cannot be read: No such file or directory" in refused(path)
    for data, says in (
        (b"", "a.ckpt is not a file of torch.save"),
        (b"epoch: 3\n", "a.ckpt is not a file of torch.save"),
        (pickle.dumps({"epoch": 3}), "a.ckpt is not a file of torch.save"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest", "has the format of torch before 1.6; load it with torch"),
    ):
        path.write_bytes(data)
        assert says in refused(path)
    assert "is a folder, not a file of torch.save" in refused(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    assert "is a zip archive, but not one of torch.save: it has no FOLDER/data.pkl" in refused(path)
    write_torch_file(path, {"epoch": 3}, byteorder=b"big")
    assert "has byte order 'big'; only 'little' is read" in refused(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([0] * 10_000, 2))
    assert "data.pkl of" in refused(path)
    assert "is compressed, which torch.save never does" in refused(path)
