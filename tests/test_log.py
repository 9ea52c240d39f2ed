"""metrics.jsonl survives what can happen to it; and what long work says of itself."""

import json
import math

import pytest

from ssl_kd.errors import UserError
from ssl_kd.log import Bar, Meter, Metrics, console


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_resume_cuts_back_to_the_restored_step(tmp_path):
    first = Metrics(tmp_path, 0)
    for step in (5, 10, 15):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')  # killed in the middle of a line
    second = Metrics(tmp_path, 10)
    second.write(15, {"loss": 1.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(5, 5.0), (10, 10.0), (15, 1.0)]


def test_nan_is_written_as_null(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": float("nan"), "lr": 0.5})
    metrics.close()
    (line,) = lines(tmp_path)
    assert line.pop("seconds") >= 0 and line == {"step": 1, "loss": None, "lr": 0.5}
    assert list((tmp_path / "tensorboard").iterdir())


def test_time_adds_up_over_sessions_and_final_results_are_written_anew(tmp_path):
    first = Metrics(tmp_path, 0)
    first._began -= 100
    first.write(5, {"loss": 1.0})
    first.write(5, {"final/linear": 0.5})
    first.close()
    second = Metrics(tmp_path, 5)
    assert 100 <= second.seconds < 200
    second.write(5, {"final/linear": 0.6})
    second.close()
    assert [line.get("final/linear") for line in lines(tmp_path)] == [None, 0.6]


def test_a_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("not json }\n")
    with pytest.raises(UserError, match="is damaged"):
        Metrics(tmp_path, 5)


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir"):
        Metrics(tmp_path / "file" / "run", 0)


def test_without_a_terminal_long_work_is_said_in_lines(capsys):
    with Meter(5000, 2, "image", "packing …") as meter:
        meter.show(3, "7 images/s", math.nan)
        meter.show(4, "8 images/s", 90)  # too soon for a line
        meter.show(5000, "9 images/s", 0)
    with Bar(20, 4) as bar:
        bar.update(5, images_per_second=math.nan, seconds_left=math.nan, loss=2.0)
        bar.update(20, images_per_second=1234.5, seconds_left=90, loss=1.0, probed="kNN 25.0 %")
    assert capsys.readouterr().out.splitlines() == [
        "image 2/5,000 · packing …",
        "image 3/5,000 · 7 images/s",
        "image 5,000/5,000 · 9 images/s · 0.0 min left",
        "step 4/20 · compiling the step …",
        "step 5/20 · loss 2.000",
        "step 20/20 · 1,234 images/s · loss 1.000 · kNN 25.0 % · 1.5 min left",
    ]


def test_a_quiet_process_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(console, "quiet", True)
    console.print("Resuming at step 4 of 20.")
    with Bar(20, 4) as bar:
        bar.update(20, images_per_second=1234.5, seconds_left=90, loss=1.0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(console, "_force_terminal", True)  # a live bar is as quiet
    with Bar(20, 4) as bar:
        bar.update(20, images_per_second=1234.5, seconds_left=90, loss=1.0)
    assert capsys.readouterr().out == ""
