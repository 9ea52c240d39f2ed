"""A step that is not finite is kept, and run again: bit for bit, and with what a person needs to find out why."""

import dataclasses
import json
import shutil
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import runs
from PIL import Image
from runs import prepared

from ssl_kd.checkpoint import Checkpoints, array_digest
from ssl_kd.data.loader import epoch_order
from ssl_kd.errors import UserError
from ssl_kd.replay.capture import find, pixels, reopen, replay, same
from ssl_kd.replay.report import NOT_FINITE, drawn, reproduced, tell, write
from ssl_kd.replay.witness import Witness
from ssl_kd.shuffle import order_of
from ssl_kd.train import fit
from ssl_kd.workdir import read_json


def config():
    """A first step that is far too long; two steps may be skipped. In bfloat16, which replays compare with float32."""
    return runs.config("moco_v2", **{"optim.lr": 1e30, "max_nonfinite": 2, "compute_dtype": "bfloat16"})


def again(workdir: Path, step: int | None = None):
    """A step, its run on one device as it was, and the report of its replay."""
    found = find(workdir, step)
    run = prepared(reopen(found).config, workdir)
    return found, run, replay(run, found)


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[Path, str]:
    """The work directory of a run that diverges at once, skips two steps and stops; and its last words."""
    workdir = tmp_path_factory.mktemp("failed") / "run"
    with pytest.raises(UserError) as error:
        fit(prepared(config(), workdir))
    return workdir, str(error.value)


@pytest.fixture(scope="module")
def replayed(failed):
    return again(failed[0])


@pytest.fixture
def copy(failed, tmp_path) -> Path:
    """A failed run a test may damage."""
    return Path(shutil.copytree(failed[0], tmp_path / "run"))


def test_some_steps_are_skipped_and_counted_before_the_run_stops(failed):
    workdir, said = failed
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(m["step"], m["nonfinite"]) for m in lines if "loss" in m] == [(1, 0), (2, 1), (3, 2)]
    assert "step 4 is not finite" in said and f"launch/replay.py --workdir={workdir}" in said


def test_a_run_that_has_skipped_more_than_is_allowed_now_says_so(copy):
    """Else its healthy next step would be called not finite."""
    fewer = config()
    fewer.max_nonfinite = 1
    with pytest.raises(UserError, match=r"has skipped 2 steps: allow that, --config\.max_nonfinite=2"):
        fit(prepared(fewer, copy))


def test_a_capture_has_all_that_a_step_is_a_function_of(failed):
    directory = failed[0] / "replay" / "4"
    assert {path.name for path in directory.iterdir()} == {"run.json", "capture.json", "checkpoints"}
    capture = read_json(directory / "capture.json")
    assert (capture["step"], capture["seed"], capture["compute_dtype"], capture["processes"]) == (4, 0, "bfloat16", 1)
    assert capture["metrics"]["nonfinite"] == 3 and capture["metrics"]["loss"] == "nan"
    assert {"jax", "numpy"} <= set(capture["session"]["versions"]) and capture["session"]["devices"]
    images = capture["images"]
    assert [image["place"] for image in images] == list(range(16))
    assert [image["index"] for image in images] == epoch_order(0, 0, 96)[48:64].tolist()
    reader = prepared(config(), directory).train.reader
    assert [image["where"] for image in images] == [reader.where(image["index"]) for image in images]


def test_a_captured_step_is_replayed_bit_for_bit(failed, replayed):
    found, _, report = replayed
    capture = read_json(failed[0] / "replay" / "4" / "capture.json")
    assert found.pixels == capture["pixels"] and found.metrics == capture["metrics"]
    assert report["differing"] == [] and report["metrics"] == capture["metrics"]


def test_a_replay_finds_what_is_not_finite_and_where_it_began(replayed):
    _, _, report = replayed
    student, outputs = report["networks"]["student"], report["outputs"]
    assert set(report["networks"]) == {"student", "student_momentum"}
    assert student["parameters"]["nonfinite"] == 0 and student["parameters"]["largest"] > 1e20
    assert student["gradients"]["nonfinite"] > 0 and "gradients" not in report["networks"]["student_momentum"]
    names = [output["name"] for output in outputs]
    assert names[:2] == ["student/backbone/conv1", "student/backbone/bn1"] and "student_momentum/head" in names
    first = next(number for number, output in enumerate(outputs) if output["nonfinite"])
    assert names[first] == "student/backbone/layer1_0/conv1" and outputs[first - 1]["largest"] > 1e20
    gradients = report["gradients_not_finite"]
    assert gradients[0].startswith("student/head/fc2/") and gradients[-1].startswith("student/backbone/")
    assert report["pushed_not_finite"] == ["key"] and report["views_not_finite"] == []
    assert report["embeddings_not_finite"] == report["images"] == 16
    assert report["float32"]["loss"] == "nan"


def test_a_report_is_sentences_and_a_picture_and_nothing_else(copy, replayed, capsys):
    found, run, report = replayed
    found = dataclasses.replace(found, workdir=copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    write(run, found, report)
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {copy / "replay" / "4" / name for name in ("replay.json", "replay.png")}
    assert before.items() <= after.items()
    assert read_json(copy / "replay" / "4" / "replay.json") == report
    with Image.open(copy / "replay" / "4" / "replay.png") as picture:
        assert len(picture.getcolors(2**16)) > 100
    tell(found, report)
    said = capsys.readouterr().out
    for part in (
        "bit for bit",
        "not finite is student/backbone/layer1_0/conv1",
        "embeddings of all 16 images",
        "precision is not the cause",
    ):
        assert part in said


def test_a_capture_outlives_the_checkpoints_of_the_run(copy):
    """With more steps to skip the run goes on, and keeps its newest checkpoints only."""
    run = prepared(config(), copy)
    with closing(Checkpoints(copy, keep=2)) as checkpoints:
        state = checkpoints.restore(run.abstract, 3)
        for step in (6, 9):
            checkpoints.save(step, state)
        checkpoints.wait()
        assert sorted(int(path.name) for path in checkpoints.directory.iterdir() if path.name.isdigit()) == [6, 9]
    found = find(copy)
    with closing(Checkpoints(found.source)) as checkpoints:
        kept = checkpoints.restore(run.abstract, found.step - 1)
    assert array_digest(kept) == array_digest(state) and kept.nonfinite == 2


class Spoilt(Witness):
    """Sees NaN in two images of the batch: in view 'query' of one, in 'key', whose rows are shuffled, of the other."""

    def views(self, step, batch, row, hands=None, data=None):
        views = super().views(step, batch, row, hands, data)
        for name, spoilt in (("query", row == 5), ("key", order_of(hands) == 7)):
            views[name] = jnp.where(spoilt[:, None, None, None], jnp.nan, views[name])
        return views


def test_a_step_after_a_checkpoint_is_replayed_too_and_spoilt_images_are_named(copy, monkeypatch, capsys):
    """The run's first step was finite; what is known of it is its line of metrics.jsonl."""
    shutil.rmtree(copy / "replay")
    shutil.rmtree(copy / "checkpoints")
    with closing(Checkpoints(copy, keep=1)) as checkpoints:
        checkpoints.save(0, prepared(config(), copy).create_now())
        checkpoints.wait()
    monkeypatch.setattr(
        "ssl_kd.replay.capture.Witness", Spoilt
    )  # which the run's own step, whose metrics count, is not
    found, _, report = again(copy, 1)
    assert {"loss", "grad_norm", "lr", "nonfinite"} <= set(report["recorded"]) and 0 < report["metrics"]["loss"] < 10
    assert report["differing"] == []
    spoilt = report["views_not_finite"]
    assert [(image["place"], image["views_not_finite"]) for image in spoilt] == [(5, ["query"]), (7, ["key"])]
    order = epoch_order(0, 0, 96)
    assert [image["index"] for image in spoilt] == [order[5], order[7]]
    assert (
        report["outputs"][0]["name"] == "student/backbone/conv1" and report["outputs"][0]["nonfinite"] == 14 * 14 * 16
    )
    assert report["witnessed"]["loss"] == "nan"
    tell(found, report)
    said = capsys.readouterr().out
    assert "Compiled to be looked at, it has loss nan" in said
    assert f"{spoilt[0]['where']} (query), {spoilt[1]['where']} (key)." in said


def test_what_differs_is_named(replayed):
    """A metric, with null for what is not finite; the pixels of an image that was changed since; what else is new."""
    found, run, report = replayed
    assert same(0.1, 0.1) and not same(0.1, 0.2) and same("nan", "nan") and not same("nan", "inf")
    assert same(None, "inf") and not same(None, 0.1) and not same(0.1, None)
    index = np.array([image["index"] for image in read_json(found.source / "capture.json")["images"]])
    assert pixels(run, index) == found.pixels != pixels(run, index[::-1])
    later = {**report["session"], "git": "later"}
    assert "(loss, pixels differ; changed since: git)" in reproduced(
        {**report, "differing": ["loss", "pixels"], "session": later}
    )


def test_pixels_that_are_not_finite_stand_out():
    view = np.full((4, 4, 3), 0.5)
    view[1, 2, 0] = np.nan
    tile = np.asarray(drawn(view))
    assert {tuple(colour) for colour in tile.reshape(-1, 3)} == {(128, 128, 128), NOT_FINITE}
    assert (tile[36, 60] == NOT_FINITE).all()


@pytest.mark.parametrize(
    ("damage", "step", "sentence"),
    [
        (lambda run: shutil.rmtree(run), None, "holds no captured step and no checkpoint"),
        (lambda run: shutil.rmtree(run / "replay"), None, r"was captured: name one .* N of \[4\]"),
        (lambda run: None, 9, r"step 9 of .* choose one of \[4\]"),
        (lambda run: (run / "replay" / "4" / "capture.json").write_text("{}"), None, "capture.json is damaged"),
        (lambda run: (run / "replay" / "4" / "run.json").unlink(), None, "no run.json"),
        (lambda run: (run / "replay" / "4" / "run.json").write_text('{"config": {}}'), None, "not of this version"),
        (lambda run: move_data(run), None, "'folder:nowhere' is not there"),
    ],
)
def test_what_is_missing_is_one_sentence(copy, damage, step, sentence):
    damage(copy)
    with pytest.raises(UserError, match=sentence) as error:
        reopen(find(copy, step))
    assert "\n" not in str(error.value)


def move_data(run: Path) -> None:
    path = run / "replay" / "4" / "run.json"
    path.write_text(path.read_text().replace('"source": "embedded"', '"source": "folder:nowhere"'))


def test_the_launcher_exits_2_with_the_sentence_alone(tmp_path):
    done = runs.launch("replay", "--workdir=nowhere", cwd=tmp_path)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert done.stderr == "error: nowhere holds no captured step and no checkpoint: check the path of the run.\n"
