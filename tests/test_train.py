"""The loop: killed anywhere it ends bit-identical, and every user's mistake is one sentence before long work starts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from etils import epath
from PIL import Image
from runs import prepared

from configs import base
from ssl_kd import checkpoint, train
from ssl_kd.checkpoint import Checkpoints, array_digest
from ssl_kd.data.sources import open_source
from ssl_kd.errors import UserError
from ssl_kd.processes import Interruption
from ssl_kd.report import summarise
from ssl_kd.run import prepare
from ssl_kd.state import State, abstract
from ssl_kd.train import fit
from ssl_kd.trained import load, load_network


def final_state(workdir: Path) -> State:
    run = prepared(runs.config(), workdir)
    return Checkpoints(workdir).restore(abstract(run.create, run.replicated), 12)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The work directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    fit(prepared(runs.config(), workdir))
    return workdir


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A finished run a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_leaves_its_record_metrics_and_results(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["config"]["batch_size"] == 16 and record["images"] == 96
    assert {"jax", "flax", "python"} <= set(record["sessions"][0]["versions"]) and record["sessions"][0]["git"]
    steps = [line["step"] for line in metrics(finished) if "loss" in line]
    assert steps == list(range(1, 13))
    assert {"positives", "relation_precision", "prototype_entropy", "lr", "grad_norm"} <= set(metrics(finished)[5])
    probes = [line for line in metrics(finished) if "probe/knn5" in line]
    assert [line["step"] for line in probes] == [6]
    assert {"probe/feature_std", "probe/effective_rank"} <= set(probes[0])
    results = json.loads((finished / "results.json").read_text())
    assert {"student", "raw pixels", "random weights"} <= set(results)
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [9, 12]  # the newest two


def test_killed_at_every_point_it_ends_bit_identical(finished, tmp_path):
    workdir = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    for point in (*runs.KILLS, ""):
        kill = [f"--kill={point}"] if point else []
        done = subprocess.run(
            [sys.executable, runs.__file__, f"--workdir={workdir}", *kill],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == (-signal.SIGKILL if point else 0), done.stderr
    reference, resumed = jax.device_get(final_state(finished)), jax.device_get(final_state(workdir))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(reference), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    loss = [(m["step"], m["loss"]) for m in metrics(workdir) if "loss" in m]
    assert loss == [(m["step"], m["loss"]) for m in metrics(finished) if "loss" in m]
    assert len(json.loads((workdir / "run.json").read_text())["sessions"]) == 4


def test_sigterm_saves_first_and_the_same_command_goes_on(finished, tmp_path, monkeypatch):
    """The signal comes while the host waits for the device, then while it writes: where a run spends its time."""
    workdir, saved = tmp_path / "run", 0
    for owner, moment in ((train.jax, "device_get"), (train.Metrics, "write")):
        calls, original = [], getattr(owner, moment)

        def interrupted(*args, calls=calls, original=original):
            calls.append(1)
            if len(calls) == 4:
                signal.raise_signal(signal.SIGTERM)
            return original(*args)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(owner, moment, interrupted)
            fit(prepared(runs.config(), workdir))
        assert stop.value.code == 128 + signal.SIGTERM
        before, saved = saved, Checkpoints(workdir).latest
        assert before + 4 <= saved < 12
        assert max(m["step"] for m in metrics(workdir)) == saved
    fit(prepared(runs.config(), workdir))
    assert array_digest(final_state(workdir)) == array_digest(final_state(finished))


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_was_freed_goes_back_to_the_system():
    def resident():
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    small = [bytes(1000) for _ in range(300_000)]
    last = small[-1]  # keeps the heap from shrinking by itself
    small.clear()
    before = resident()
    train.return_memory()
    assert resident() < before - (200 << 20) and len(last) == 1000


def test_a_finished_run_is_left_alone(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    results = fit(prepared(runs.config(), finished))
    assert results == json.loads((finished / "results.json").read_text())
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_other_settings_are_refused_with_the_differing_keys(copy):
    with pytest.raises(UserError, match=r"optim.lr \(0.5 there, 0.25 now\)"):
        fit(prepared(runs.config(**{"optim.lr": 0.25}), copy))


def test_settings_outside_the_mathematics_may_change(copy):
    (copy / "results.json").unlink()
    results = fit(prepared(runs.config(log_every=7, **{"data.resident": "off", "probe.knn": (3,)}), copy))
    assert "knn3" in results["student"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(finished, copy, capsys):
    """What it held is trained again, to the same end."""
    (copy / "results.json").unlink()
    data = max((p for p in (copy / "checkpoints" / "12").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    fit(prepared(runs.config(), copy))
    said = capsys.readouterr().out
    assert "Checkpoint 12 is damaged (state/" in said and "Resuming at step 9 of 12." in said
    assert (copy / "checkpoints-damaged" / "12").is_dir()
    assert array_digest(final_state(copy)) == array_digest(final_state(finished))
    (copy / "results.json").unlink()
    for data in (copy / "checkpoints").rglob("ocdbt.process_0/d/*"):
        os.truncate(data, data.stat().st_size // 2)
    every = r"checkpoints/12 cannot be read \(state/.*nor can those before it \(9\): bring back"
    with pytest.raises(UserError, match=every):
        fit(prepared(runs.config(), copy))


def test_an_unwritable_workdir_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --workdir"):
        fit(prepared(runs.config(), tmp_path / "file" / "run"))


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoints_before(copy, monkeypatch):
    run = prepared(runs.config(), copy)
    checkpoints = Checkpoints(copy, keep=2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._orbax, "save_async", full)
    with pytest.raises(UserError, match=r"No space left on device.*the checkpoints before it are whole"):
        checkpoints.save(15, run.create_now())
    assert Checkpoints(copy).latest == 12
    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(UserError, match=r"results\.json"):
        checkpoint.write_json(copy / "results.json", {})


def test_a_frozen_teacher_comes_from_a_run_and_another_is_refused(finished, copy, tmp_path):
    config = runs.config(epochs=0.5, **{"teacher.source": f"workdir:{finished}"})
    run = prepared(config, tmp_path / "student")
    assert run.recipe.method.teacher == "frozen"
    assert run.recipe.specs["teacher"] == load_network(finished).spec  # architecture as trained, not as configured
    fit(run)
    record = json.loads((tmp_path / "student" / "run.json").read_text())
    assert record["identity"]["teacher.digest"] == load_network(finished).digest
    shutil.rmtree(copy / "checkpoints" / "12")  # its newest is now step 9: other weights
    config.teacher.source = f"workdir:{copy}"
    with pytest.raises(UserError, match=r"teacher\.digest"):
        fit(prepared(config, tmp_path / "student"))


@pytest.mark.parametrize(("maker", "learner"), [("ressl", "disco"), ("mokd-alone", "simreg")])
def test_what_needs_no_teacher_makes_one(maker, learner, tmp_path):
    teacher = prepared(runs.config(maker), tmp_path / "teacher")
    run = prepared(runs.config(learner, **{"teacher.source": runs.begun(teacher)}), tmp_path / "run")
    assert run.recipe.specs["teacher"] == load_network(tmp_path / "teacher").spec
    made = jax.device_get(teacher.create_now()).trained["student"]
    assert array_digest(run.frozen()["teacher"]["params"]) == array_digest(made)


def test_a_student_may_start_from_a_run(finished, tmp_path):
    run = prepared(runs.config(**{"student.source": f"workdir:{finished}"}), tmp_path)
    started = jax.device_get(run.create_now())
    found = load_network(finished)
    assert array_digest(started.trained["student"]) == array_digest(found.variables["params"])
    assert array_digest(started.averaged["student_momentum"]) == array_digest(found.variables["params"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher.source": "workdir:nowhere"}, "nowhere holds no run"),
        ({"teacher.source": "file.pth"}, "teacher.source='file.pth'"),
        ({"method.teacher": "frozen"}, "teacher.source=workdir:PATH"),
        ({"data.source": "folder"}, "data.source='folder'"),
        ({"data.source": "hf:nowhere"}, "nowhere"),
        ({"data.canvas": -1}, "data.canvas=-1"),
        ({"data.train": "train[:8]"}, "larger than the training set of 8"),
        ({"batch_size": 12}, "multiple of 8"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_anything_is_written(changes, sentence, tmp_path):
    with pytest.raises(UserError) as error:
        prepare(runs.config(**changes), tmp_path / "run")
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_bags_of_a_run_in_an_object_store_need_a_place_of_their_own():
    with pytest.raises(UserError, match=r"method\.bag_path must name a place on the local disk"):
        prepare(runs.config("bingo"), epath.Path("gs://bucket/run"), untrained=True)


def test_load_embeds_images_in_three_lines(finished):
    apply, params = load(finished)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 3), np.uint8)
    features = apply(params, images)
    assert features.shape == (5, load_network(finished).spec.backbone().pooled_dim)
    one = jax.jit(apply)(params, images[2:3])  # rows are independent
    np.testing.assert_allclose(one[0], features[2], rtol=1e-4, atol=1e-5)
    other, teacher = load(finished, "teacher", step=9)
    assert jax.jit(other)(teacher, images).shape[0] == 5


def test_load_names_what_is_missing(finished, tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load(tmp_path)
    with pytest.raises(UserError, match="choose one of student, teacher"):
        load(finished, "nobody")
    with pytest.raises(UserError, match=r"no checkpoint of step 5 in .*: there are \[9, 12\]"):
        load(finished, step=5)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json"])
def test_a_damaged_record_is_one_sentence(copy, text):
    (copy / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        fit(prepared(runs.config(), copy))
    with pytest.raises(UserError, match=r"run\.json"):
        load(copy)


def test_a_student_of_another_image_size_is_refused(tmp_path):
    def config(size):
        c = runs.config(epochs=0.5, image_size=size)
        c.student = base.network("alexnet", width=0.02, dim=8)
        return c

    other = config(20)
    other.student.source = runs.begun(prepared(config(28), tmp_path / "run"))
    with pytest.raises(UserError, match=r"image_size=28.*image_size=20"):
        prepare(other, tmp_path / "other")


def test_unlabelled_data_trains_and_reports_what_needs_no_labels(tmp_path, monkeypatch, capsys):
    def unlabelled(*args):
        source = open_source(*args)
        reader = source.reader
        reader.num_classes, reader.label_of, reader.labels = None, lambda row: -1, lambda: np.full(len(reader), -1)
        return source

    monkeypatch.setattr("ssl_kd.run.open_source", unlabelled)
    run = prepared(runs.config("moco_v2", epochs=0.5, **{"probe.every_epochs": 0.2}), tmp_path)
    results = fit(run)
    assert set(results["student"]) == {"feature_std", "effective_rank", "nn_consistency", "nn_chance"}
    assert results["student"]["nn_chance"] == 10 / 39 and 0 < results["student"]["nn_consistency"] <= 1
    assert "probe/nn_consistency" in {name for line in metrics(tmp_path) for name in line}
    summarise(run, results)
    said = capsys.readouterr().out
    assert "shared neighbours" in said and "-NN" not in said and "by chance" in said


@pytest.fixture
def damaged(tmp_path) -> Path:
    """96 images to train on, of which three are bad, and 40 to test on, of which one is."""
    images = np.random.default_rng(0).integers(0, 256, (136, 28, 28, 3), np.uint8)
    for i, image in enumerate(images):
        path = tmp_path / "photos" / ("train" if i < 96 else "test") / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if i in (5, 50, 95, 100):
            path.write_bytes(path.read_bytes()[:1000])
    return tmp_path / "photos"


def test_bad_images_change_nothing_but_what_stands_in_for_them(damaged, tmp_path, monkeypatch, capsys):
    """Held in memory; or streamed, stopped and resumed: the same weights, and every bad image listed once."""
    data = {"data.source": f"folder:{damaged}", "data.train": "train", "data.test": "test"}
    (damaged / "train" / "a" / "notes.txt").write_text("no image")
    config = runs.config("moco_v2", **data)
    results = fit(prepared(config, tmp_path / "whole"))
    assert results["quarantined"] == 4
    assert "1 files that are hidden or not named as images are left out" in capsys.readouterr().out
    summarise(prepared(config, tmp_path / "whole"), results)
    assert "in whose place others stood: 4, each named in" in capsys.readouterr().out
    config = runs.config("moco_v2", **data, **{"data.resident": "off"})
    original, calls = train.Metrics.write, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Metrics, "write", interrupted)
        fit(prepared(config, tmp_path / "parts"))
    assert fit(prepared(config, tmp_path / "parts"))["student"] == results["student"]
    whole, parts = (
        Checkpoints(tmp_path / name).restore(
            abstract(prepared(config, tmp_path).create, prepared(config, tmp_path).replicated), 12
        )
        for name in ("whole", "parts")
    )
    assert array_digest(parts) == array_digest(whole)
    lists = [(tmp_path / name / "quarantine.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert sorted(lists[0]) == sorted(lists[1]) and len(lists[0]) == 4


def test_a_directory_of_garbage_stops_before_anything_is_compiled(damaged, tmp_path, monkeypatch):
    for path in sorted((damaged / "train").rglob("*.png"))[::3]:
        path.write_bytes(b"")
    monkeypatch.setattr("ssl_kd.run.TrainStep", None)
    config = runs.config(**{"data.source": f"folder:{damaged}", "data.train": "train", "data.test": "test"})
    with pytest.raises(UserError, match=r"of the 96 images of .* cannot be read, more than data.max_bad=0.01 allows"):
        fit(prepared(config, tmp_path / "run"))
