import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from comparisons import make_counts, reachability
from run_folders import BEST, LABELS, N_TYPES, change_config, write_counts, write_run, write_runs, write_store

from hce_jax.compare.load import load_comparison
from hce_jax.errors import CheckpointError, ConfigError, StoreError, UserError
from hce_jax.evaluation.decoders import DECODERS
from hce_jax.store import convert

OTHER = "val_f1_macro_epoch=5_val_f1_macro=0.812.ckpt"


@pytest.fixture
def tb_logs(tmp_path):
    return tmp_path / "tb_logs"


def test_runs_are_ordered_by_model_loss_and_seed(tb_logs, tmp_path):
    store = write_store(tmp_path / "atlas")
    written = write_runs(tb_logs, ("small", "linear"), ("HCE", "CE"), (2, 10), data_path=str(store))
    small, linear = (
        [written[model, loss, seed] for loss in ("CE", "HCE") for seed in (2, 10)] for model in ("small", "linear")
    )
    found = load_comparison(
        [tb_logs / "small_hierarchical_loss", tb_logs / "small", tb_logs]
    )  # the second is named anew
    assert [run.folder for run in found.runs] == [*small, *linear]
    assert (found.models, found.losses, found.seeds) == (("small", "linear"), ("CE", "HCE"), (2, 10))
    assert [(run.model, run.loss, run.seed) for run in found.runs[:3]] == [
        ("small", "CE", 2),
        ("small", "CE", 10),
        ("small", "HCE", 2),
    ]
    assert [run.folder for run in found.of("linear", "HCE")] == linear[2:]
    assert found.splits == ("id", "ood")
    assert found.store == "atlas"
    assert found.labels == tuple(f"type {code}" for code in range(N_TYPES))
    assert found.cl_ids[:2] == (None, "CL:0000001")
    np.testing.assert_array_equal(found.reachability, reachability(N_TYPES))
    np.testing.assert_array_equal(found.n_train, np.bincount(LABELS, minlength=N_TYPES))


def test_a_run_has_the_counts_of_its_own_evaluations(tb_logs):
    write_runs(tb_logs)
    found = load_comparison([tb_logs])
    for place, loss in enumerate(("CE", "HCE")):
        for run in found.of("linear", loss):
            for split in ("id", "ood"):
                theirs = make_counts(split, N_TYPES, 10 * place + run.seed, 0.4 + 0.2 * place)
                for name in (*DECODERS, "temperature"):
                    for mine, written in zip(run.counts[split].decoders[name], theirs.decoders[name], strict=True):
                        np.testing.assert_array_equal(mine, written)
            assert run.config["learning_rate"] == 5e-4


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        (None, ("CE", "HCE", "HCE exact", "HCE (epsilon 0.001)")),
        ("HCE exact", ("HCE exact", "CE", "HCE", "HCE (epsilon 0.001)")),
    ],
    ids=["cross entropy is the baseline", "another is, if asked for"],
)
def test_losses_are_named_by_their_epsilon(tb_logs, baseline, expected):
    write_runs(tb_logs, losses=("HCE exact", "HCE", "CE"), seeds=(1,))
    shutil.copytree(tb_logs / "linear_hierarchical_loss/default/version_1", tb_logs / "other_epsilon/default/version_1")
    change_config(tb_logs / "other_epsilon/default/version_1", epsilon=0.001)
    assert load_comparison([tb_logs], baseline=baseline).losses == expected


def test_without_cross_entropy_the_next_loss_is_the_baseline(tb_logs):
    write_runs(tb_logs, losses=("HCE exact", "HCE"), seeds=(1,))
    assert load_comparison([tb_logs]).losses == ("HCE", "HCE exact")


def test_runs_that_were_not_evaluated_on_new_studies_are_compared_on_donors(tb_logs):
    write_runs(tb_logs, splits=("id",))
    found = load_comparison([tb_logs])
    assert found.splits == ("id",)
    assert not any("ood" in note for note in found.notes[2:])


def test_the_best_checkpoint_is_the_one_that_the_run_ended_with_unless_another_is_named(tb_logs):
    runs = write_runs(tb_logs, seeds=(1,))
    run = runs["linear", "HCE", 1]
    others = {split: make_counts(split, N_TYPES, 77, 0.9) for split in ("id", "ood")}
    for split, counts in others.items():
        write_counts(run, split, counts, OTHER)
    (run / "checkpoints" / OTHER).mkdir()

    def right(paths):
        return load_comparison(paths).of("linear", "HCE")[0].counts["id"].decoders["argmax"].by_study[:, 0].sum()

    named = run / "checkpoints" / OTHER
    best, other = (
        counts.decoders["argmax"].by_study[:, 0].sum() for counts in (make_counts("id", N_TYPES, 11, 0.6), others["id"])
    )
    assert best != other
    assert [right([tb_logs]), right([tb_logs, named]), right([named, tb_logs])] == [best, other, other]


def test_runs_below_a_folder_that_are_not_finished_are_left_out_and_said(tb_logs):
    write_runs(tb_logs)
    (write_run(tb_logs, seed=3) / "result.json").unlink()
    (tb_logs / "linear/default/ensemble_1_2/sctab_test").mkdir(parents=True)
    (tb_logs / "linear/default/version_old").mkdir()
    found = load_comparison([tb_logs])
    assert found.seeds == (1, 2)
    assert found.notes[-1] == "Left out, for they are no finished runs: linear/default/version_3."


# --- what is refused


def counts_changed(run, split="id", **changes):
    """Write the counts of a run anew, with some fields changed."""
    place, seed = int("hierarchical" in run.parts[-3]), int(run.name.removeprefix("version_"))
    counts = make_counts(split, N_TYPES, 10 * place + seed, 0.4 + 0.2 * place)
    write_counts(run, split, dataclasses.replace(counts, **changes))


def other_labels(runs, tb_logs):
    labels = tuple(f"type {code}" for code in range(N_TYPES))
    counts_changed(runs["linear", "HCE", 1], labels=(*labels[:4], labels[5], labels[4], *labels[6:]))


def fewer_types(runs, tb_logs):
    write_counts(runs["linear", "HCE", 1], "id", make_counts("id", 8))


def other_hierarchy(runs, tb_logs):
    # One cell of each type, rightly predicted, fits any hierarchy.
    for run, below in ((runs["linear", "CE", 1], 8), (runs["linear", "CE", 2], 9)):
        reach = np.eye(N_TYPES)
        reach[0, below] = 1
        counts = make_counts("id", N_TYPES)
        cells = np.eye(N_TYPES, N_TYPES + 1, dtype=np.int64)
        bins = np.zeros((1500, 3))
        bins[1499] = N_TYPES, N_TYPES, N_TYPES
        by_study = np.ones((1, 3, N_TYPES), np.int64)
        decoders = dict.fromkeys(counts.decoders, type(counts.decoders["argmax"])(cells, by_study, bins))
        write_counts(
            run, "id", dataclasses.replace(counts, reachability=reach, decoders=decoders, studies=("a study",))
        )


def other_types_in_ood(runs, tb_logs):
    counts_changed(runs["linear", "HCE", 2], "ood", labels=tuple(f"kind {code}" for code in range(N_TYPES)))


def other_study(runs, tb_logs):
    counts_changed(
        runs["linear", "HCE", 1], "ood", studies=("new one", *(f"ood study {number}" for number in range(1, 5)))
    )


def other_order_of_studies(runs, tb_logs):
    counts_changed(runs["linear", "HCE", 1], studies=tuple(f"id study {number}" for number in (1, 0, 2, 3, 4, 5)))


def other_number_of_cells(runs, tb_logs):
    write_counts(runs["linear", "HCE", 2], "ood", make_counts("ood", N_TYPES, cells=401))


def other_backoff(runs, tb_logs):
    counts_changed(runs["linear", "HCE", 2], backoff={"max_error": 0.05})


def without_ood(runs, tb_logs):
    shutil.rmtree(runs["linear", "HCE", 2] / "checkpoints")


def without_id(runs, tb_logs):
    shutil.rmtree(runs["linear", "HCE", 2] / "sctab_test")


def damaged_counts(runs, tb_logs):
    next(runs["linear", "HCE", 2].glob("sctab_test/*/*.npz")).write_bytes(b"no counts")


def without_a_seed(runs, tb_logs):
    shutil.rmtree(runs["linear", "HCE", 2])


def a_model_with_one_loss(runs, tb_logs):
    write_runs(tb_logs, ("small",), ("CE",))


def twice(runs, tb_logs):
    shutil.copytree(runs["linear", "CE", 1], tb_logs / "again/default/version_7")


def other_field(runs, tb_logs):
    change_config(runs["linear", "HCE", 2], learning_rate=0.1)


def unknown_field(runs, tb_logs):
    change_config(runs["linear", "CE", 2], label_smoothing=0.1)


def one_loss(runs, tb_logs):
    shutil.rmtree(tb_logs / "linear_hierarchical_loss")


def published_run(runs, tb_logs):
    (runs["linear", "CE", 1] / "config.json").unlink()


def damaged_config(runs, tb_logs):
    (runs["linear", "CE", 1] / "config.json").write_text("{")


def config_without_a_field(runs, tb_logs):
    (runs["linear", "CE", 1] / "config.json").write_text(json.dumps({"config": {"model_name": "linear"}}))


def damaged_result(runs, tb_logs):
    (runs["linear", "CE", 1] / "result.json").write_text("{}")


def nothing_finished(runs, tb_logs):
    for run in runs.values():
        (run / "result.json").unlink()


REFUSED = {
    other_labels: (CheckpointError, r"linear/default/version_1 knows 10 cell types and \S+ 10, and type 4 is 'type 4' "
                   r"in the one and 'type 5' in the other; compare runs of one store"),
    fewer_types: (CheckpointError, r"version_1 knows 10 cell types and \S*hierarchical_loss\S* 8, and type 8 is "
                  r"'type 8' in the one and None"),
    other_hierarchy: (CheckpointError, r"version_1 and \S+version_2 have other hierarchies: only in one of them "
                      r"'type 8' is below 'type 0'; compare runs of one store"),
    other_types_in_ood: (CheckpointError, r"loss/default/version_2 was evaluated with other types or another hierarchy "
                         r"in ood than in id; evaluate it again: python evaluate.py --split ood --run \S+version_2$"),
    other_study: (CheckpointError, r"version_1 and \S+version_1 were evaluated on other cells \(ood, only one of them "
                  r"on the study 'new one'\); evaluate both on the same: python evaluate.py --split ood"),
    other_order_of_studies: (CheckpointError, r"other cells \(id, studies in another order\)"),
    other_number_of_cells: (CheckpointError, r"linear/default/version_1 and \S+loss/default/version_2 were evaluated "
                            r"on other cells \(ood: \d+ and \d+ of 'type \d' in the study 'ood study \d'\)"),
    other_backoff: (CheckpointError, r"back-off asked for confidence 0.5 in \S+version_1 and for max_error 0.05 in "
                    r"\S+version_2 \(id\); evaluate both with the same --confidence or --max_error"),
    without_ood: (CheckpointError, r"linear/default/version_1 was evaluated on new studies, \S+version_2 was not: "
                  r"python evaluate.py --split ood --run \S+loss/default/version_2, with --ood_data"),
    without_id: (CheckpointError, r"version_2 has no counts of an evaluation on held-out donors: python evaluate.py "
                 r"--split id --run \S+loss/default/version_2$"),
    damaged_counts: (CheckpointError, r"linear_counts.npz is damaged"),
    without_a_seed: (ConfigError, r"^linear has no run with HCE of seed 2, but with another loss; seeds are compared "
                     "in pairs: train what is missing, or name runs that pair"),
    a_model_with_one_loss: (ConfigError, r"^small has no run with HCE of seeds 1, 2, but with another loss"),
    twice: (ConfigError, r"again/default/version_7 and \S+linear/default/version_1 are both of linear, CE, seed 1; "
            "name one of them"),
    other_field: (CheckpointError, r"runs of linear, HCE may differ in their seed only, but learning_rate is 0.0005 "
                  r"in \S+version_1 and 0.1 in \S+version_2; compare runs of one recipe"),
    unknown_field: (CheckpointError, r"linear, CE may differ in their seed only, but label_smoothing is 'not there' in "
                    r"\S+version_1 and 0.1 in"),
    one_loss: (ConfigError, r"^all 2 runs are of the loss CE, so there is nothing to compare; name others"),
    published_run: (CheckpointError, r"linear/default/version_1 has no config.json, as a run of the published "
                    r"PyTorch code has none: its seed is not known, by which runs are paired; compare runs of hce_jax"),
    damaged_config: (CheckpointError, r"linear/default/version_1/config.json is damaged; bring it back, or leave the "
                     "run out"),
    config_without_a_field: (CheckpointError, r"version_1/config.json is damaged"),
    damaged_result: (CheckpointError, r"version_1/result.json is damaged; remove it, and the command that trained the "
                     "run writes it anew"),
    nothing_finished: (CheckpointError, r"^no run below \S+tb_logs is finished; train them to their end first"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__.replace("_", " "))
def test_runs_that_cannot_be_compared_are_refused_with_the_reason(tb_logs, spoil):
    spoil(write_runs(tb_logs), tb_logs)
    kind, says = REFUSED[spoil]
    with pytest.raises(UserError, match=says) as refusal:
        load_comparison([tb_logs])
    assert type(refusal.value) is kind


def test_paths_that_are_no_runs_are_refused(tb_logs, tmp_path):
    run = write_run(tb_logs)
    with pytest.raises(CheckpointError, match=r"absent does not exist; name runs \(version_N\), or a folder with runs"):
        load_comparison([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    (run / "checkpoints/last").mkdir()
    for path in (tmp_path / "empty", run / "config.json", run / "checkpoints/last"):
        with pytest.raises(CheckpointError, match=rf"{path.name} is no run and has none below; name runs"):
            load_comparison([tb_logs, path])


def test_a_run_that_is_not_finished_is_refused_where_it_is_named(tb_logs):
    run = write_run(tb_logs)
    (run / "result.json").unlink()
    for path in (run, run / "checkpoints" / OTHER):
        (run / "checkpoints" / OTHER).mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=r"version_1 is not finished; train it to its end with the command"):
            load_comparison([path])


def test_a_named_checkpoint_needs_evaluations_of_its_own(tb_logs):
    run = write_run(tb_logs)
    named = run / "checkpoints" / OTHER
    named.mkdir()
    with pytest.raises(CheckpointError, match=rf"--split id --checkpoint {re.escape(str(named))}$"):
        load_comparison([named])


def test_two_checkpoints_of_a_run_are_refused(tb_logs):
    run = write_run(tb_logs)
    paths = [run / "checkpoints" / name for name in (OTHER, BEST)]
    for path in paths:
        path.mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=rf"{BEST} and {OTHER} are of the same run; name one of them"):
        load_comparison(paths)


def test_a_baseline_that_no_run_has_is_refused(tb_logs):
    write_runs(tb_logs)
    with pytest.raises(ConfigError, match=r"--baseline=ce: no run has this loss; give one of CE, HCE"):
        load_comparison([tb_logs], baseline="ce")


def test_fields_that_change_nothing_of_what_is_trained_may_differ(tb_logs):
    runs = write_runs(tb_logs)
    change_config(
        runs["linear", "HCE", 2],
        log_dir="elsewhere",
        cells_in="device",
        log_every_n_steps=1,
        checkpoint_every_minutes=0.0,
        profile_steps=3,
        save_top_k=9,
        data_seed=5,
    )
    change_config(runs["linear", "CE", 2], epsilon=0.5)  # which cross entropy does not have
    assert len(load_comparison([tb_logs]).runs) == 4


# --- the training store


def in_stores(tb_logs, ours, theirs):
    """Write runs with cross entropy trained on one store, those with the other loss on another."""
    write_runs(tb_logs, losses=("CE",), data_path=str(ours))
    write_runs(tb_logs, losses=("HCE",), data_path=str(theirs))


def test_without_the_store_training_cells_are_not_known_and_this_is_said(tb_logs, tmp_path):
    write_runs(tb_logs, data_path=str(tmp_path / "gone"))
    found = load_comparison([tb_logs])
    assert found.n_train is None
    assert found.store == "gone"
    says = f"The training store {tmp_path / 'gone'} is not there, so that the numbers of training cells are not known."
    assert says in found.notes


def test_a_store_that_has_been_moved_can_be_named(tb_logs, tmp_path):
    in_stores(tb_logs, tmp_path / "gone", tmp_path / "gone too")
    found = load_comparison([tb_logs], write_store(tmp_path / "moved"))
    assert found.n_train.sum() == len(LABELS)
    assert found.store == "moved"


def test_stores_in_two_places_may_be_the_same(tb_logs, tmp_path):
    ours = write_store(tmp_path / "parquet")
    convert(ours, tmp_path / "cells", workers=1)
    in_stores(tb_logs, ours, tmp_path / "cells")
    np.testing.assert_array_equal(load_comparison([tb_logs]).n_train, np.bincount(LABELS, minlength=N_TYPES))


@pytest.mark.parametrize(
    "other", [{"genes": ("ENSG1", "ENSG3")}, {"labels": (LABELS + 1) % N_TYPES}], ids=["other genes", "other cells"]
)
def test_runs_of_different_stores_are_refused(tb_logs, tmp_path, other):
    in_stores(tb_logs, write_store(tmp_path / "ours"), write_store(tmp_path / "theirs", **other))
    says = r"linear/default/version_1 was trained on \S+ours and \S+version_1 on \S+theirs, which have other genes or"
    with pytest.raises(CheckpointError, match=says):
        load_comparison([tb_logs])


def test_a_store_that_is_not_there_to_be_looked_at_is_refused_beside_another(tb_logs, tmp_path):
    in_stores(tb_logs, write_store(tmp_path / "ours"), tmp_path / "gone")
    with pytest.raises(
        CheckpointError, match=r"in 2 places, and that of \S+, \S+gone, is not there.*--data-path STORE$"
    ):
        load_comparison([tb_logs])


@pytest.mark.parametrize(
    "other", [{"names": [f"kind {code}" for code in range(N_TYPES)]}, {"reach": np.eye(N_TYPES)}],
    ids=["other types", "another hierarchy"],
)  # fmt: skip
def test_a_store_of_other_types_is_refused(tb_logs, tmp_path, other):
    write_runs(tb_logs)
    with pytest.raises(
        StoreError, match=r"other has other cell types, or another hierarchy, than the run \S+version_1"
    ):
        load_comparison([tb_logs], write_store(tmp_path / "other", **other))


def test_training_cells_are_those_of_the_parts_that_the_runs_saw(tb_logs, tmp_path):
    store = write_store(tmp_path / "store")  # 45 cells in parts of 16
    runs = write_runs(tb_logs, data_path=str(store), sub_sample_frac=0.5)
    np.testing.assert_array_equal(load_comparison([tb_logs]).n_train, np.bincount(LABELS[:32], minlength=N_TYPES))
    for seed in (1, 2):
        change_config(runs["linear", "CE", seed], sub_sample_frac=0.3)
    found = load_comparison([tb_logs])
    assert found.n_train.sum() == 32
    assert "Some of the runs saw fewer training cells (sub_sample_frac) than are given here." in found.notes


# --- what is said


def test_the_data_are_named_beside_the_published_ones(tb_logs, tmp_path):
    store = write_store(tmp_path / "atlas")
    write_runs(tb_logs, data_path=str(store))
    assert load_comparison([tb_logs]).notes[0] == (
        "Data: atlas; 10 cell types, 45 training cells; held-out donors (id): 400 cells of 9 types from 6 studies; new "
        "studies (ood): 400 cells of 8 types from 5 studies. The published figures are of other data: CELLxGENE Census "
        "2023-05-15 (164 types, 22.2 M cells), and 21 studies that were new in Census 2023-12-15 (2.6 M cells of 80 of "
        "the types)."
    )


def test_simulated_cells_are_called_so(tb_logs, tmp_path):
    store = write_store(tmp_path / "atlas")
    (store / "store.json").write_text(json.dumps({"simulated": True}))
    write_runs(tb_logs, data_path=str(store))
    found = load_comparison([tb_logs])
    assert found.store == "atlas (simulated cells)"
    assert found.notes[0].startswith(
        "Data: atlas (simulated cells); nothing here was measured on a cell; 10 cell types"
    )


def test_the_rules_of_macro_f1_are_said(tb_logs):
    write_runs(tb_logs)
    assert re.search(
        "in the id split is the mean over all types that occur among labels or predictions, in the ood split over "
        "those that occur among labels",
        load_comparison([tb_logs]).notes[1],
    )


SAME_ORDER = "Runs of several seeds saw the cells in the same order"


def test_that_seeds_share_the_order_of_cells_is_said_where_they_do(tb_logs):
    runs = write_runs(tb_logs)
    assert any(note.startswith(SAME_ORDER) for note in load_comparison([tb_logs]).notes)
    for (_, _, seed), run in runs.items():
        change_config(run, data_seed=seed)
    assert not any(note.startswith(SAME_ORDER) for note in load_comparison([tb_logs]).notes)


def test_one_seed_is_said(tb_logs):
    write_runs(tb_logs, seeds=(4,))
    notes = load_comparison([tb_logs]).notes
    assert "There is one seed: no spread over seeds, and no test of single cell types." in notes
    assert not any(note.startswith(SAME_ORDER) for note in notes)


@pytest.mark.parametrize(
    ("n_studies", "says"),
    [
        (1, "The id cells are of one study, so that there is no interval over studies."),
        (4, "The id cells are of 4 studies: an interval over so few says little."),
        (5, None),
    ],
)
def test_few_studies_are_said(tb_logs, n_studies, says):
    counts = make_counts("id", N_TYPES)

    def joined(each):
        by_study = each.by_study
        return each._replace(
            by_study=np.concatenate([by_study[: n_studies - 1], by_study[n_studies - 1 :].sum(axis=0, keepdims=True)])
        )

    few = dataclasses.replace(
        counts,
        studies=counts.studies[:n_studies],
        decoders={name: joined(each) for name, each in counts.decoders.items()},
    )
    write_runs(tb_logs, counts={"id": few})
    found = [note for note in load_comparison([tb_logs]).notes if note.startswith("The id cells")]
    assert found == ([] if says is None else [says])


def test_other_fields_in_which_losses_differ_are_said_and_not_refused(tb_logs):
    runs = write_runs(tb_logs)
    for seed in (1, 2):
        change_config(runs["linear", "HCE", seed], learning_rate=0.01)
    assert (
        "linear: CE and HCE differ also in learning_rate (0.0005 and 0.01), so that not all of the difference is the "
        "loss."
    ) in load_comparison([tb_logs]).notes
    for seed in (1, 2):
        change_config(runs["linear", "CE", seed], learning_rate=0.01)
    assert not any("differ also" in note for note in load_comparison([tb_logs]).notes)
