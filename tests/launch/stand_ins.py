"""What the launchers call and a test has not: SLURM's srun, and gcloud with a slice of two TPU workers.

python stand_ins.py srun|gcloud …, called by scripts of these names that a test puts on its PATH.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKERS = 2


def srun(*arguments: str) -> int:
    """SLURM_NTASKS tasks on this machine; the greatest of their statuses.

    With --kill-on-bad-exit=1 the first that fails takes the others with it. A SIGTERM to the process whose number is in
    $RECORDS/srun stands for --signal=TERM@120, with which slurmd signals every process of every task.
    """
    (Path(os.environ["RECORDS"]) / "srun").write_text(str(os.getpid()))
    first = next(i for i, word in enumerate(arguments) if not word.startswith("--"))
    options, command = arguments[:first], arguments[first:]
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            start_new_session=True,
        )
        for i in range(int(os.environ["SLURM_NTASKS"]))
    ]

    def send(number: int) -> None:
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.pid, number)

    signal.signal(signal.SIGTERM, lambda number, _: send(number))
    while any(task.poll() is None for task in tasks):
        if any(task.returncode for task in tasks) and "--kill-on-bad-exit=1" in options:
            send(signal.SIGKILL)
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def gcloud(*arguments: str) -> int:
    """`gcloud compute tpus tpu-vm VERB [NAME] …` in $RECORDS, where a slice is a folder with a home for every worker.

    A line of $RECORDS/calls for every call, as JSON. ssh really executes its command, in a worker's home. The slice is
    PREEMPTED while there is $RECORDS/preempted.
    """
    root = Path(os.environ["RECORDS"])
    with (root / "calls").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    assert arguments[:3] == ("compute", "tpus", "tpu-vm") and f"--zone={os.environ['ZONE']}" in arguments
    verb, *words = arguments[3:]
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    words = [word for word in words if not word.startswith("--")]
    made = root / os.environ["NAME"]
    homes = [made / f"worker{i}" for i in range(WORKERS) if options.get("worker") in ("all", str(i))]
    preempted = root / "preempted"
    if verb == "create":
        assert words == [made.name]
        for i in range(WORKERS):
            (made / f"worker{i}").mkdir(parents=True)
        return 0
    if not made.exists():
        return 1
    if verb == "describe":
        print("PREEMPTED" if preempted.exists() else "READY")
    elif verb == "delete":
        shutil.rmtree(made)
        preempted.unlink(missing_ok=True)
    elif verb == "scp":
        source, target = words
        for home in homes:
            shutil.copy(source, home / target.removeprefix(f"{made.name}:"))
    elif verb == "ssh":
        if preempted.exists():
            return 1
        commands = [
            subprocess.run(["bash", "-c", options["command"]], cwd=home, env={**os.environ, "HOME": str(home)})
            for home in homes
        ]
        return next((done.returncode for done in commands if done.returncode), 0)
    else:
        raise AssertionError(f"{verb} is not known here")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "gcloud": gcloud}[sys.argv[1]](*sys.argv[2:]))
