"""The launchers of clusters and notebooks: what they would execute; and that they do, under stand-ins of the rest."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ONE_DEVICE, ROOT

TPU_VM, SLURM, NOTEBOOK = (ROOT / "launch" / name for name in ("tpu_vm.sh", "slurm.sbatch", "colab.ipynb"))
STAND_INS = Path(__file__).with_name("stand_ins.py")
BIN = Path(sys.executable).parent

RECIPE = "--config=configs/moco_v2_alexnet.py:smoke"
CHEAP = [
    "--config.data.train=train[:128]",
    "--config.data.test=test[:40]",
    "--config.batch_size=16",
    "--config.bn_groups=1",
    "--config.epochs=1",
    "--config.log_every=1",
    "--config.probe.every_epochs=0",
    "--config.probe.linear=False",
    "--config.probe.knn=(5,)",
]
"""Overrides that leave 8 steps of a recipe."""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def execute(*command, cwd, timeout=60, **env):
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in env.items()}},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def path_with(directory: Path) -> str:
    return os.pathsep.join([str(directory), str(BIN), os.environ["PATH"]])


def assert_one_sentence(done, sentence):
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and sentence in done.stderr
    assert done.stdout == ""


def test_shellcheck_has_nothing_to_say():
    done = execute(BIN / "shellcheck", TPU_VM, SLURM, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


# tpu_vm.sh

GCLOUD = "gcloud compute tpus tpu-vm"
SLICE = {"NAME": "rekd", "ZONE": "us-west4-a", "TYPE": "v5litepod-32", "TMPDIR": "/tmp"}
ARGUMENTS = [RECIPE, "--workdir=gs://bucket/run 1", "--config.data.train=train[:10%]", "--config.name=it's $HOME"]
CREATE = f"{GCLOUD} create rekd --accelerator-type=v5litepod-32 --version=v2-alpha-tpuv5-lite --spot --zone=us-west4-a"
LOG = 'cd ssl_kd && tail -n 20 -F run.log --pid="$(cat run.pid)" 2> /dev/null; exit "$(cat run.status)"'
STOP = 'cd ssl_kd && kill -TERM "$(cat python.pid)" && tail -f /dev/null --pid="$(cat run.pid)"'


def dry_run(*arguments, **env):
    """The words of every command that would be executed."""
    done = execute(TPU_VM, "--dry_run", *arguments, cwd="/", **SLICE, **env)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def ssh(worker, command):
    return [*f"{GCLOUD} ssh rekd --worker={worker}".split(), f"--command={command}", "--zone=us-west4-a"]


def test_a_dry_run_prints_the_commands_of_a_slice():
    assert dry_run("create", SPOT="1") == [CREATE.split()]
    assert dry_run("create") == [[word for word in CREATE.split() if word != "--spot"]]
    assert dry_run("create", VERSION="tpu-vm-v4")[0][-2] == "--version=tpu-vm-v4"
    pack, copy, install = dry_run("setup")
    left = [f"--exclude=./{name}" for name in ("runs", "data", ".venv", ".*_cache")]
    assert pack == ["tar", "-czf", "/tmp/rekd.tar.gz", "-C", str(ROOT), *left, "."]
    assert copy == f"{GCLOUD} scp /tmp/rekd.tar.gz rekd:ssl_kd.tar.gz --worker=all --zone=us-west4-a".split()
    assert install[:-2] == ssh("all", "")[:-2]
    assert "-r requirements.txt 'jax[tpu]>=0.10,<0.11'" in install[-2]
    assert 'pip install -U "jax[tpu]>=0.10,<0.11"' in (ROOT / "README.md").read_text()
    assert dry_run("log") == [ssh(0, LOG)]
    assert dry_run("stop") == [ssh("all", STOP)]
    assert dry_run("delete") == [f"{GCLOUD} delete rekd --quiet --zone=us-west4-a".split()]
    (run,) = dry_run("run", *ARGUMENTS)
    assert run == ssh("all", run[-2].removeprefix("--command="))
    assert dry_run("train", *ARGUMENTS, SPOT="1") == [CREATE.split(), pack, copy, install, run, ssh(0, LOG)]


@pytest.mark.parametrize(
    ("arguments", "without", "sentence"),
    [
        ([], None, "say one of create, setup, run"),
        (["destroy"], None, "say one of create, setup, run"),
        (["--dry_run"], None, "say one of create, setup, run"),
        (["create", "--spot"], None, "create takes no arguments, but got --spot."),
        (["run"], None, "--config is missing"),
        (["train", RECIPE], None, "train needs --workdir=gs://"),
        (["create"], "NAME", "NAME is missing"),
        (["--dry_run", "delete"], "ZONE", "ZONE is missing"),
        (["run", RECIPE], "gcloud", "gcloud is missing"),
    ],
    ids=str,
)
def test_what_a_slice_misses_is_one_sentence(arguments, without, sentence, tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    if without != "gcloud":
        script(tmp_path / "gcloud", "#!/bin/sh\nexit 99\n")
    env = {name: "" if name == without else value for name, value in SLICE.items()}
    assert_one_sentence(execute(shutil.which("bash"), TPU_VM, *arguments, cwd="/", PATH=tmp_path, **env), sentence)


PYTHON3 = """#!/bin/sh
# pip install --user uv
mkdir -p "$HOME/.local/bin" && cp "$RECORDS/uv" "$HOME/.local/bin/uv"
"""
UV = """#!/bin/sh
echo "$@" >> "$PWD/uv.calls"
mkdir -p .venv/bin && cp "$RECORDS/python" .venv/bin/python
"""
PYTHON = """#!/bin/bash
# main.py on a worker. Its fate: to be 'stopped', to be 'taken' away with the first slice, or to end with a status.
trap 'kill $!; echo saved; exit 143' TERM
printf '%s\\n' "$@" > arguments
fate=$(cat "$RECORDS/fate")
echo "training until $fate"
case $fate in
  stopped) sleep 100 & wait ;;
  taken) touch "$RECORDS/preempted"; echo 0 > "$RECORDS/fate"; kill -KILL $$ ;;
  *) exit "$fate" ;;
esac
"""


@pytest.fixture
def tpu(tmp_path):
    """Runs tpu_vm.sh of a small clone with a stand-in of gcloud; what that records is in the folder `records`."""
    records, clone = tmp_path / "records", tmp_path / "clone"
    for path in (
        "launch/main.py",
        "ssl_kd/data/sources.py",
        "data/big",
        "runs/big",
        ".venv/big",
        ".ruff_cache/big",
        ".git/HEAD",
    ):
        script(clone / path, "")
    shutil.copy(TPU_VM, clone / "launch")
    for name, text in (("python", PYTHON), ("uv", UV), ("bin/python3", PYTHON3)):
        script(records / name, text)
    script(records / "bin" / "gcloud", f'#!/bin/sh\nexec {sys.executable} {STAND_INS} gcloud "$@"\n')

    def tpu(*arguments, fate=""):
        if fate:
            (records / "fate").write_text(fate)
        env = {**SLICE, "TMPDIR": tmp_path, "RECORDS": records, "PATH": path_with(records / "bin"), "PAUSE": 0.1}
        return execute(clone / "launch" / "tpu_vm.sh", *arguments, cwd="/", **env)

    tpu.records = records
    tpu.workers = [records / "rekd" / f"worker{i}" / "ssl_kd" for i in (0, 1)]
    return tpu


def verbs(tpu):
    calls = [json.loads(line) for line in (tpu.records / "calls").read_text().splitlines()]
    return [call[3] for call in calls]


def test_a_run_on_a_slice_from_its_creation_to_its_deletion(tpu):
    assert tpu("create").returncode == 0
    assert tpu("setup").returncode == 0
    copied = {"launch/main.py", "launch/tpu_vm.sh", "ssl_kd/data/sources.py", ".git/HEAD"}
    for worker in tpu.workers:
        files = {str(path.relative_to(worker)) for path in worker.rglob("*") if path.is_file()}
        assert files == copied | {".venv/bin/python", "uv.calls"}
        venv, install = (worker / "uv.calls").read_text().splitlines()
        assert venv == "venv -q --allow-existing --python=3.11 .venv"
        assert install == "pip install -q -r requirements.txt jax[tpu]>=0.10,<0.11 gcsfs"

    for worker in tpu.workers:
        (worker / "run.status").write_text("of a run before\n")
    done = tpu("run", *ARGUMENTS, fate="stopped")
    assert (done.returncode, done.stdout) == (0, "")
    assert tpu("run", *ARGUMENTS).stdout == "it is running already\n" * 2
    begun = [worker / name for worker in tpu.workers for name in ("run.log", "python.pid")]
    wait_for(lambda: all(path.exists() and path.read_text() for path in begun))
    for worker in tpu.workers:
        shell, python = (int((worker / f"{name}.pid").read_text()) for name in ("run", "python"))
        assert os.getsid(python) == shell  # a session that ssh does not end
        assert not (worker / "run.status").exists()
    assert tpu("stop").returncode == 0
    for worker in tpu.workers:
        assert (worker / "run.status").read_text() == "143\n"
        assert (worker / "run.log").read_text() == "training until stopped\nsaved\n"
        assert (worker / "arguments").read_text().splitlines() == ["launch/main.py", *ARGUMENTS]
    log = tpu("log")
    assert (log.returncode, log.stdout) == (143, "training until stopped\nsaved\n")

    assert tpu("run", *ARGUMENTS, fate="0").returncode == 0
    log = tpu("log")
    assert (log.returncode, log.stdout) == (0, "training until stopped\nsaved\ntraining until 0\n")
    assert tpu("delete").returncode == 0
    assert not (tpu.records / "rekd").exists()


def test_a_slice_that_was_taken_away_is_made_again_and_the_run_goes_on(tpu):
    done = tpu("train", *ARGUMENTS, fate="taken")
    assert done.returncode == 0, done.stderr
    start = ["describe", "create", "scp", "ssh", "ssh", "ssh"]  # set up, run, log
    assert verbs(tpu) == [*start, "ssh", "describe", "delete", *start, "ssh"]  # how did it end
    assert [(worker / "run.log").read_text() for worker in tpu.workers] == ["training until 0\n"] * 2


def test_a_run_that_failed_is_not_tried_again(tpu):
    done = tpu("train", *ARGUMENTS, fate="2")
    assert done.returncode == 2
    assert verbs(tpu) == ["describe", "create", "scp", "ssh", "ssh", "ssh", "ssh", "describe"]


# slurm.sbatch


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sbatch in a clone as a job of 2 tasks, with stand-ins of srun and scontrol."""
    records, clone, free = tmp_path / "records", tmp_path / "clone", socket.socket()
    with free:  # jax derives its port from the job's number
        for job in range(1000, 5096):
            try:
                free.bind(("localhost", 61440 + job % 4096))
                break
            except OSError:
                continue
    clone.mkdir()
    for name in ("launch", "configs"):
        (clone / name).symlink_to(ROOT / name)
    script(records / "bin" / "srun", f'#!/bin/sh\nexec {sys.executable} {STAND_INS} srun "$@"\n')
    script(records / "bin" / "scontrol", '#!/bin/sh\necho "$@" >> "$RECORDS/scontrol"\n')
    job_env = {
        "SLURM_JOB_ID": str(job),
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "3",
        "RECORDS": str(records),
        "PATH": path_with(records / "bin"),
    }

    def slurm(*arguments, **env):
        return execute("bash", "launch/slurm.sbatch", *arguments, cwd=clone, **{**job_env, **env})

    slurm.clone, slurm.records, slurm.env = clone, records, job_env
    return slurm


def requeued(slurm):
    path = slurm.records / "scontrol"
    return path.read_text().split() if path.exists() else []


def test_a_dry_run_prints_what_the_job_would_execute(slurm):
    arguments = [RECIPE, "--config.data.train=train[:10%]"]
    done = slurm(*arguments, DRY_RUN="1", SLURM_JOB_ID="")
    step, requeue = done.stdout.splitlines()
    options = ["--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=3"]
    assert shlex.split(step) == ["srun", *options, "python", "launch/main.py", *arguments, "||", "status=$?"]
    assert requeue == '[ "$status" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"'
    script(slurm.clone / ".venv" / "bin" / "activate", "")
    assert slurm(*arguments, DRY_RUN="1").stdout == f"source .venv/bin/activate\n{done.stdout}"
    assert not slurm.records.joinpath("srun").exists()


def test_every_task_sees_all_gpus_of_its_node_and_hears_of_the_time_limit():
    head = SLURM.read_text().split("\nset ")[0]
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in re.findall("(?m)^#SBATCH.*", head))
    assert options["ntasks-per-node"] == options["gpus-per-node"] and "gpus-per-task" not in options
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"


def test_what_a_job_misses_is_one_sentence(slurm):
    assert_one_sentence(slurm(), "--config is missing")
    assert_one_sentence(slurm(RECIPE, SLURM_JOB_ID=""), "not a SLURM job")
    (slurm.clone / "launch").unlink()
    elsewhere = execute("bash", SLURM, RECIPE, cwd=slurm.clone)
    assert_one_sentence(elsewhere, "launch/main.py is not in")


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (2, 137), (143, 143)])
def test_only_a_job_that_was_stopped_queues_again(status, ends, slurm):
    """Python is that of .venv. Task 1 outlives the others, unless one fails; then it is killed: 137."""
    bin = slurm.clone / ".venv" / "bin"
    script(bin / "activate", f"PATH={bin}:$PATH\n")
    wait = 'if [ "$SLURM_PROCID" = 1 ]; then exec sleep 100; fi\n' if status else ""
    script(bin / "python", f'#!/bin/sh\n{wait}echo "$@"\nexit {status}\n')
    done = slurm(RECIPE)
    assert done.returncode == ends
    assert set(done.stdout.splitlines()) == {f"launch/main.py {RECIPE}"}
    assert requeued(slurm) == (["requeue", slurm.env["SLURM_JOB_ID"]] if status == 143 else [])


def test_two_processes_train_as_one_run_that_stops_before_the_time_limit(slurm):
    """Under SLURM's own variables. How such a run goes on is test_processes.py's."""
    output = slurm.records / "output"
    with output.open("w") as file:
        env = {**os.environ, **slurm.env, **ONE_DEVICE}
        command = ["bash", "launch/slurm.sbatch", RECIPE, *CHEAP, "--workdir=run"]
        job = subprocess.Popen(command, cwd=slurm.clone, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "compiling the step" in output.read_text() or job.poll() is not None)
    finally:
        os.kill(int((slurm.records / "srun").read_text()), signal.SIGTERM)
    assert job.wait(240) == 143, output.read_text()
    (stopped,) = map(int, re.findall(r"saved at step (\d+)", output.read_text()))  # one run of two, not two
    assert 0 < stopped < 8 and requeued(slurm) == ["requeue", slurm.env["SLURM_JOB_ID"]]
    lines = [json.loads(line) for line in (slurm.clone / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, stopped + 1))


# colab.ipynb


def test_the_notebook_holds_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_the_notebook_trains_and_shows_what_it_learned(tmp_path):
    """As a user fills in its form; on a CPU its preset is smoke."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    for name, value in {"RECIPE": "moco_v2_alexnet", "FLAGS": shlex.join(CHEAP)}.items():
        line = f"{name} = {json.dumps(value)}"
        cells["form"].source, found = re.subn(rf"(?m)^{name} = \S+", line, cells["form"].source)
        assert found == 1
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, **ONE_DEVICE})
    assert f"1 × cpu · preset smoke · {tmp_path}/runs/first\n" in cells["install"].outputs[0].text
    printed = "".join(output.text for output in cells["train"].outputs)
    assert printed.startswith("python launch/main.py --config=configs/moco_v2_alexnet.py:smoke --workdir=")
    assert "step 8/8" in printed and "\x1b" not in printed
    for name in ("curves", "neighbours"):
        (picture,) = cells[name].outputs
        assert base64.b64decode(picture.data["image/png"]).startswith(b"\x89PNG")
    assert json.loads((tmp_path / "runs" / "first" / "results.json").read_text())["step"] == 8
