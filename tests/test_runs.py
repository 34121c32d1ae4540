import json
import os
from pathlib import Path

import pytest

from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.runs import (
    best_checkpoint,
    checkpoint_name,
    listed_checkpoints,
    new_run_folder,
    newest_run,
    resolve_checkpoint,
    results_folder,
    runs_folder,
    stated_model_type,
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
    assert results_folder([tmp_path / "checkpoints" / name], "id") == tmp_path / results
    assert results_folder([tmp_path / name], "id") == tmp_path / results


def test_a_run_folder_says_what_its_checkpoints_are(tmp_path):
    def stated(model_name, config=None):
        run = tmp_path / model_name / "default" / "version_0"
        run.mkdir(parents=True)
        if config:
            (run / "config.json").write_text(json.dumps({"config": config}))
        return stated_model_type(run / "checkpoints" / "a.ckpt", ["linear", "mlp", "tabnet"])

    assert stated("cxg_2023_05_15_tabnet_hierarchical_loss") == "tabnet"
    assert stated("linear_beside_mlp") is None
    assert stated("mine") is None
    assert stated("linear_baseline", {"model_type": "mlp"}) == "mlp"  # a name is free, a configuration is not
    assert stated_model_type(tmp_path / "tabnet" / "a.ckpt", ["tabnet"]) is None


def test_results_on_new_studies_lie_beside_the_checkpoint_never_in_it(tmp_path):
    name = checkpoint_name(3, 0.5)
    assert results_folder([tmp_path / name], "ood") == tmp_path / "val_f1_macro_epoch=3_val_f1_macro=0.500"
    assert results_folder([tmp_path / "model.pkl"], "ood") == tmp_path / "model"
    assert results_folder([tmp_path / "mine"], "ood") == tmp_path / "mine_ood"
    assert results_folder([tmp_path / "v1.2"], "ood") == tmp_path / "v1.2_ood"


def test_results_of_an_ensemble_lie_beside_its_runs(tmp_path):
    members = [tmp_path / "linear" / "default" / f"version_{k}" / "checkpoints" / "a.ckpt" for k in (0, 2)]
    folder = tmp_path / "linear" / "default" / "ensemble_0_2"
    assert results_folder(members, "id") == folder / "sctab_test"
    assert results_folder(members, "ood") == folder / "ood"
    with pytest.raises(ConfigError, match="--output_dir"):
        results_folder([tmp_path / "a.ckpt", tmp_path / "b.ckpt"], "ood")


def made(*paths):
    """Folders of checkpoints."""
    for path in paths:
        path.mkdir(parents=True)
    return paths


def test_a_list_names_checkpoints_and_folders_of_them(tmp_path, monkeypatch):
    first, second = made(tmp_path / "runs" / "a" / "x.ckpt", tmp_path / "runs" / "b" / "y.ckpt")
    published = tmp_path / "published.ckpt"
    published.write_text("")
    ours = tmp_path / "mine"  # a checkpoint of another name, as import-torch writes it
    ours.mkdir()
    (ours / "_CHECKPOINT_METADATA").write_text("{}")
    made(first / "inner" / "inner.ckpt", tmp_path / "runs" / ".deleted-z.ckpt")  # what is none
    listed = tmp_path / "list.txt"
    listed.write_text(f"# of the paper\n{published}\n\n  runs \nmine\n")
    assert listed_checkpoints(listed) == [published, first, second, ours]
    assert listed_checkpoints(tmp_path / "runs") == [first, second]
    assert listed_checkpoints(first) == [first]
    monkeypatch.chdir(tmp_path)
    assert listed_checkpoints(listed)[1:3] == [Path("runs/a/x.ckpt"), Path("runs/b/y.ckpt")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nowhere.ckpt", "list.txt, line 1: nowhere.ckpt does not exist"),
        ("\n#\n", "list.txt names no checkpoint"),
        ("runs\nruns/a.ckpt", "names .*a.ckpt twice"),
        ("empty", "no checkpoint .* below .*empty"),
    ],
)
def test_a_mistake_in_a_list_is_named(tmp_path, text, says):
    made(tmp_path / "runs" / "a.ckpt", tmp_path / "empty")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        listed_checkpoints(tmp_path / "list.txt")


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"list.txt does not exist; name a file"):
        listed_checkpoints(tmp_path / "list.txt")
