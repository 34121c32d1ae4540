"""The golden files are those that their manifest describes."""

import hashlib

import pytest


@pytest.mark.golden
def test_golden_file_is_the_one_in_the_manifest(golden):
    assert hashlib.sha256(golden.path.read_bytes()).hexdigest() == golden.entry["sha256"]


@pytest.mark.golden
def test_golden_arrays_have_the_types_and_shapes_of_the_manifest(golden):
    if golden.path.suffix == ".npz":
        found = {key: f"{array.dtype}[{','.join(map(str, array.shape))}]" for key, array in golden.arrays.items()}
        assert found == golden.entry["arrays"]
