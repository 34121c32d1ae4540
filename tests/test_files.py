import pytest

from hce_jax.errors import StoreError
from hce_jax.files import written_aside, written_together


def test_interrupted_writing_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write_half() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def put(folder, names, error=None):
    with written_together(folder) as aside:
        for name in names:
            (aside / name).write_text("new")
        if error:
            raise error


def test_files_take_their_places_together_or_not_at_all(tmp_path):
    folder = tmp_path / "results"
    with pytest.raises(KeyboardInterrupt):
        put(folder, ["a", "b"], KeyboardInterrupt())
    assert not folder.exists()
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        put(folder, ["a", "b"], KeyboardInterrupt())
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("a", "old")]
    put(folder, ["a", "b"])
    assert sorted((path.name, path.read_text()) for path in folder.iterdir()) == [("a", "new"), ("b", "new")]


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_not_disturbed(tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "half").write_text("half")
    with written_together(tmp_path) as aside:
        assert not list(aside.iterdir())
        (aside / "a").write_text("a")
        with pytest.raises(StoreError, match="another process is writing results to"):
            put(tmp_path, ["b"])
        assert [path.name for path in aside.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
