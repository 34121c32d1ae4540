"""The toy of ``examples/``: what it prints is what it says."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "examples" / "ce_vs_hce.py"


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("ce_vs_hce", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_four_fifths_of_the_labels_of_leaves_are_their_ancestors(toy):
    _, types, labels = toy.training_data()
    parents = {child: [p for p, c in toy.EDGES if c == child] for child in range(toy.N_TYPES)}

    def above(t):
        return {*parents[t], *(a for p in parents[t] for a in above(p))}

    leaf = np.isin(types, [8, 9, 10, 11, 12])
    assert (labels[~leaf] == types[~leaf]).all()
    assert {t for t in range(13) if t not in {p for p, _ in toy.EDGES}} == set(toy.LEAVES)
    assert np.mean(labels[leaf] != types[leaf]) == pytest.approx(0.8, abs=0.02)
    for t in toy.LEAVES:
        moved = labels[(types == t) & (labels != types)]
        assert set(moved) == above(t)
        counts = [np.mean(moved == a) for a in above(t)]
        assert max(counts) - min(counts) < 0.15  # each as likely as the other


def test_hce_finds_the_leaves_and_cross_entropy_names_their_ancestors(toy, tmp_path):
    outcomes = toy.compare(steps=300)
    ce, hce = (shares for _, shares in outcomes.values())
    assert list(outcomes) == ["CE", "HCE"]
    assert 0.55 < ce["right"] < 0.75
    assert hce["right"] > 0.97
    assert ce["leaf, right"] < 0.15
    assert ce["leaf, ancestor named"] > 0.8
    assert hce["leaf, right"] > 0.9
    assert hce["leaf, ancestor named"] < 0.01
    toy.plot(outcomes, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG"
