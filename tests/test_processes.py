"""Several processes are one run: as exact as one process, stopped together, and killed in any way it goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from conftest import worst
from jax.sharding import AxisType

from benchmarks.chaos import over, survive, together
from ssl_kd import processes
from ssl_kd.checkpoint import Checkpoints, array_digest
from ssl_kd.errors import UserError
from ssl_kd.run import Run, prepare
from ssl_kd.train import fit


def line(workdir: Path, *flags: str) -> list[str]:
    return [runs.__file__, f"--workdir={workdir}", *flags]


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices."""
    return {"PYTHONPATH": f"{runs.ROOT / 'tests'}:{runs.ROOT}", "TEST_DEVICES": str(devices)}


def run_on(devices: int, workdir: Path, *args, **changes) -> Run:
    """The same run in this process."""
    run = prepare(runs.config(*args, **changes), workdir)
    run.mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    return run


def end(run: Run):
    return jax.device_get(Checkpoints(run.workdir).restore(run.abstract, 12))


def losses(workdir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(found["step"], found["loss"]) for found in lines if "loss" in found]


def test_two_processes_of_which_one_is_killed_end_bit_for_bit_as_if_left_alone(tmp_path):
    (alone, workdir), log = (tmp_path / "alone", tmp_path / "run"), tmp_path / "log"
    survive(line(alone, "--method=moco_v2"), kills=0, seed=0, longest=0.0, log=log, env=environment(1))
    done = survive(
        line(workdir, "--method=moco_v2"),
        kills=1,
        seed=0,
        longest=0.5,
        log=log,
        env=environment(1),
        sign=workdir / "metrics.jsonl",
    )
    assert [hurt["signal"] for hurt in done] == ["SIGKILL"], log.read_text()
    assert "another process of the run has gone" in log.read_text()
    assert losses(alone) == losses(workdir)
    whole, hurt = (array_digest(end(run_on(2, w, "moco_v2"))) for w in (alone, workdir))
    assert whole == hurt
    a, b = (json.loads((w / "results.json").read_text())["student"] for w in (alone, workdir))
    assert a == b


def test_processes_told_to_stop_save_together_and_go_on_as_fewer_with_a_split_state(tmp_path, capsys):
    """Two of four devices each, then one of eight; the whole run equals one on a single device to rounding."""
    teacher = runs.begun(run_on(1, tmp_path / "teacher", "moco_v2"))
    alone = run_on(1, tmp_path / "alone", "seed", **{"teacher.source": teacher})
    fit(alone)
    workdir, log = tmp_path / "run", tmp_path / "log"
    command = line(workdir, "--method=seed", f"--teacher={teacher}", "--sharding=fsdp")
    with together(command, 2, log, environment(4)) as running:
        while "step 1/12" not in log.read_text():
            assert not over(running, 0.05), log.read_text()
        running[1].send_signal(signal.SIGTERM)
        assert [process.wait(300) for process in running] == [128 + signal.SIGTERM] * 2, log.read_text()
    saved = Checkpoints(workdir).latest
    assert saved == losses(workdir)[-1][0] < 12
    assert log.read_text().count("The same command goes on from there.") == 1  # one process speaks
    rest = run_on(8, workdir, "seed", **{"teacher.source": teacher, "sharding": "fsdp"})
    capsys.readouterr()
    fit(rest)
    assert f"Resuming at step {saved} of 12." in capsys.readouterr().out
    np.testing.assert_allclose(losses(alone.workdir), losses(workdir), rtol=2e-4)
    assert worst(end(alone).trained, end(rest).trained) < 2e-3
    a, b = (json.loads((w / "results.json").read_text())["student"] for w in (alone.workdir, workdir))
    assert a == pytest.approx(b, rel=1e-2)


def test_a_peer_that_does_not_arrive_is_one_sentence():
    flags = "--coordinator_address=127.0.0.1:1234", "--num_processes=2", "--process_id=1", "--initialization_timeout=1"
    command, env = [sys.executable, *line(Path("nowhere"), *flags)], {**os.environ, **environment(1)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    (sentence,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "not all processes of this run have met within 1 s" in sentence


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"num_processes": 2}, "go together"),
        ({"coordinator_address": "host:1", "num_processes": 2, "process_id": 2}, "--process_id=2 must be"),
        ({"coordinator_address": "host", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
    ],
    ids=str,
)
def test_flags_that_cannot_be_meant_are_one_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        processes.join(**flags)


def test_alone_nothing_is_joined(monkeypatch):
    """Where one process is asked for, in a cluster too; and where jax finds no cluster."""
    asked = []

    def initialize(*_, **__):
        asked.append(1)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.join(num_processes=1)
    assert not asked
    processes.join()
    assert asked


@pytest.mark.parametrize(
    ("error", "said"), [(RuntimeError, {}), (ValueError, {"coordinator_address": "host:1", "process_id": 0})]
)
def test_others_that_cannot_be_met_are_one_sentence(error, said, monkeypatch):
    """Whoever named others never trains alone without a word."""

    def initialize(*_, **__):
        raise error("no metadata")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"cannot be met \(no metadata\): give --num_processes=1 to train alone"):
        processes.join(**said, **({"num_processes": 2} if said else {}))
