import os

import pytest

from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.runs import (
    best_checkpoint,
    checkpoint_name,
    id_results_folder,
    new_run_folder,
    newest_run,
    resolve_checkpoint,
    runs_folder,
)


def with_checkpoints(run, *names):
    for name in names:
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "config.json").write_text("{}")
    return run


def test_versions_count_up_and_the_loss_is_in_the_folder_s_name(tmp_path):
    first, second = (new_run_folder(runs_folder(tmp_path, "linear", use_hierarchical_loss=True)) for _ in range(2))
    assert first.relative_to(tmp_path).as_posix() == "linear_hierarchical_loss/default/version_0"
    assert second.name == "version_1"
    assert runs_folder(tmp_path, "linear", use_hierarchical_loss=False) == tmp_path / "linear" / "default"


def test_a_version_is_never_used_again(tmp_path):
    (tmp_path / "version_7").mkdir(parents=True)
    assert new_run_folder(tmp_path).name == "version_8"


def test_a_place_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the run to \S*file/default .*--config.log_dir"):
        new_run_folder(tmp_path / "file" / "default")


def test_the_best_checkpoint_has_the_highest_f1_and_of_equals_the_earlier_epoch(tmp_path):
    names = [checkpoint_name(epoch, f1) for epoch, f1 in ((2, 0.7), (10, 0.9), (9, 0.9), (3, 0.85))]
    run = with_checkpoints(tmp_path, *names, ".deleted-val_f1_macro_epoch=4_val_f1_macro=0.990.ckpt")
    assert best_checkpoint(run).name == "val_f1_macro_epoch=9_val_f1_macro=0.900.ckpt"
    assert resolve_checkpoint(run) == best_checkpoint(run)


def test_the_newest_run_is_the_last_started_one_that_has_a_checkpoint(tmp_path):
    runs = [new_run_folder(tmp_path / name / "default") for name in ("a", "b", "c")]
    for age, run in enumerate(runs[:2]):
        with_checkpoints(run, checkpoint_name(0, 0.5))
        os.utime(run / "config.json", (100 - age, 100 - age))
    (runs[2] / "config.json").write_text("{}")  # the newest, but it has saved nothing yet
    assert newest_run(tmp_path) == runs[0]


def test_what_has_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no trained run under \S+; train one with train.py"):
        newest_run(tmp_path / "tb_logs")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        resolve_checkpoint(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        resolve_checkpoint(tmp_path)


def test_results_go_to_the_run_or_beside_a_lone_checkpoint(tmp_path):
    name = checkpoint_name(3, 0.5)
    results = "sctab_test/val_f1_macro_epoch=3_val_f1_macro=0.500"
    assert id_results_folder(tmp_path / "checkpoints" / name) == tmp_path / results
    assert id_results_folder(tmp_path / name) == tmp_path / results
