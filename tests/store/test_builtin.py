import pytest

from hce_jax.errors import StoreError
from hce_jax.store import builtin


def test_the_atlas_is_made_once_and_said_to_be_simulated_every_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(builtin, "simulate_atlas", lambda folder: (made.append(folder), folder.mkdir(parents=True)))
    for _ in range(2):
        assert builtin.builtin_atlas() == builtin.BUILTIN_ATLAS
        assert "SIMULATED" in capsys.readouterr().err
    assert made == [builtin.BUILTIN_ATLAS]


def test_another_process_that_makes_the_atlas_at_the_same_time_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def too_late(folder):
        folder.mkdir(parents=True)
        raise StoreError(f"{folder} exists already")

    monkeypatch.setattr(builtin, "simulate_atlas", too_late)
    assert builtin.builtin_atlas().is_dir()


def test_a_place_where_the_atlas_cannot_be_made_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(folder):
        raise StoreError("cannot write")

    monkeypatch.setattr(builtin, "simulate_atlas", fails)
    with pytest.raises(StoreError, match="cannot write"):
        builtin.builtin_atlas()
