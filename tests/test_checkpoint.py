"""Checkpoints outlive what happens to files, fit any number of devices, and may lie in an object store."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssl_kd import checkpoint
from ssl_kd.checkpoint import Checkpoints, agreed
from ssl_kd.data.quarantine import Quarantine, keep_lists, read_list
from ssl_kd.digests import DIGESTS, file_digests, inspect
from ssl_kd.errors import UserError
from ssl_kd.log import Metrics
from ssl_kd.state import State
from ssl_kd.workdir import read_json, work_directory, write_json


def make_state(step: int, devices: int = 1, spec: PartitionSpec | None = None, rows: int = 16) -> State:
    """A state of every kind of leaf, a function of its step; matrices are sharded as `spec` says."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    rng = np.random.default_rng(step)
    matrix = rng.standard_normal((rows, 40)).astype(np.float32)
    params = {"student": {"kernel": matrix, "bias": matrix[0].astype(jax.numpy.bfloat16)}}
    state = State(
        step=np.int32(step),
        nonfinite=np.int32(0),
        trained=params,
        averaged={"student_momentum": {"kernel": matrix / 2}},
        batch_stats={"student": {}},
        opt=optax.sgd(0.1, momentum=0.9).init(params),
        memory={"queue": rng.standard_normal((rows, 8)).astype(np.float32), "pointer": np.int32(step % rows)},
    )

    def place(leaf):
        sharding = NamedSharding(mesh, spec if spec is not None and np.ndim(leaf) == 2 else PartitionSpec())
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, state)


def shapes(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a: State, b: State) -> bool:
    """Bit for bit, in the same shardings."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.sharding == y.sharding and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A work directory with checkpoints of steps 3, 6 and 9."""
    workdir = tmp_path_factory.mktemp("written")
    with closing(Checkpoints(workdir, keep=3)) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, make_state(step))
    return workdir


@pytest.fixture
def workdir(written, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    os.truncate(largest(folder), largest(folder).stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    data = bytearray(largest(folder).read_bytes())
    data[len(data) // 2] ^= 8
    largest(folder).write_bytes(data)


def lose_a_file(folder: Path) -> None:
    largest(folder).unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    truncate: "has not the bytes that were written",
    flip_a_bit: "has not the bytes that were written",
    lose_a_file: "is missing",
    empty: "",
}


def restored(workdir: Path, keep: int | None = None, step: int | None = None) -> State:
    with closing(Checkpoints(workdir, keep)) as checkpoints:
        return checkpoints.restore(shapes(make_state(0)), step)


def test_a_flipped_bit_needs_the_digest(workdir):
    """Why there are digests: without them orbax loads other numbers and says nothing."""
    flip_a_bit(workdir / "checkpoints" / "9")
    (workdir / "checkpoints" / "9" / DIGESTS).unlink()
    state = restored(workdir)
    assert int(state.step) == 9 and not same(state, make_state(9))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_is_passed_over_kept_and_saved_again(damage, workdir, capsys):
    damage(workdir / "checkpoints" / "9")
    with closing(Checkpoints(workdir, keep=3)) as checkpoints:
        assert checkpoints.latest == 9
        assert same(checkpoints.restore(shapes(make_state(0))), make_state(6))
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.startswith("Checkpoint 9 is damaged (") and DAMAGES[damage] in said
        assert f"that of step 6 is used instead; it is kept in {workdir}/checkpoints-damaged." in said
        assert checkpoints.latest == 6 and (workdir / "checkpoints-damaged" / "9").is_dir()
        assert (workdir / "checkpoints-damaged" / "why.txt").read_text() == f"{said}\n"
        checkpoints.save(9, make_state(9))
        checkpoints.wait()
        damage(workdir / "checkpoints" / "9")
        assert same(checkpoints.restore(shapes(make_state(0))), make_state(6))
    assert (workdir / "checkpoints-damaged" / "9-again").is_dir()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_readers_pass_over_it_and_touch_nothing(damage, workdir, capsys):
    damage(workdir / "checkpoints" / "9")
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    assert same(restored(workdir), make_state(6))
    assert capsys.readouterr().out.splitlines()[-1].endswith("that of step 6 is used instead.")
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    with pytest.raises(UserError, match=r"checkpoints/9 cannot be read \("):
        restored(workdir, step=9)


def test_when_all_are_damaged_the_newest_is_named_and_nothing_is_moved(workdir):
    for step in (3, 6, 9):
        flip_a_bit(workdir / "checkpoints" / str(step))
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    with pytest.raises(UserError) as error:
        restored(workdir, keep=3)
    assert "checkpoints/9 cannot be read (state/" in str(error.value) and "\n" not in str(error.value)
    assert "has not the bytes that were written), nor can those before it (6, 3): bring back" in str(error.value)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}


def test_another_state_is_no_damage(workdir):
    with (
        closing(Checkpoints(workdir, keep=3)) as checkpoints,
        pytest.raises(
            UserError, match=r"checkpoints/9 is undamaged, but cannot be read as .* use the version of ssl_kd"
        ),
    ):
        checkpoints.restore(shapes(make_state(0)).replace(memory={"centre": shapes(make_state(0)).step}))
    assert not (workdir / "checkpoints-damaged").exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, f"it has no {DIGESTS}"), ("{", f"its {DIGESTS} is damaged"), ("[]", "damaged"), ('{"a": 1}', "damaged")],
)
def test_without_a_digest_it_is_tried_with_a_warning(text, why, workdir, capsys):
    digests = workdir / "checkpoints" / "9" / DIGESTS
    digests.unlink() if text is None else digests.write_text(text)
    assert same(restored(workdir, keep=3), make_state(9))
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("Checkpoint 9 cannot be checked for damage: ") and why in said


def test_what_a_killed_save_left_is_no_checkpoint(workdir):
    left = workdir / "checkpoints" / "12.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "9", left)
    (left / "commit_success.txt").unlink()
    assert same(restored(workdir), make_state(9)) and left.exists()
    with closing(Checkpoints(workdir, keep=3)) as checkpoints:
        assert checkpoints.latest == 9
        checkpoints.save(12, make_state(12))
    assert same(restored(workdir), make_state(12)) and not left.exists()


def test_killed_between_commit_and_digest_it_goes_on_from_there(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from ssl_kd import checkpoint
from test_checkpoint import make_state
checkpoints = checkpoint.Checkpoints(Path(sys.argv[1]), keep=2)
checkpoints.save(3, make_state(3))
checkpoints.wait()
checkpoint.file_digests = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(6, make_state(6))
checkpoints.wait()
"""
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "checkpoints" / "6" / DIGESTS).exists()
    assert same(restored(tmp_path, keep=2), make_state(6))


def test_the_digest_is_of_all_files_and_of_every_byte(workdir):
    folder = workdir / "checkpoints" / "9"
    digests = json.loads((folder / DIGESTS).read_text())
    assert digests.keys() == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {DIGESTS}
    assert inspect(folder) == ("", "")
    for name in digests:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert inspect(folder) == (f"{name} has not the bytes that were written", "")
        (folder / name).write_bytes(data)


def test_saving_often_leaves_no_threads_behind(tmp_path):
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        counts = []
        for step in range(1, 7):
            checkpoints.save(step, make_state(step))
            checkpoints.wait()
            counts.append(threading.active_count())
    assert len(set(counts[1:])) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def refuse(error: Exception):
    raise error


def test_saving_asks_nothing_of_the_service_that_stops_the_processes_together(workdir, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint.multihost_utils, "reached_preemption_sync_point", asked.append)
    with closing(Checkpoints(workdir, keep=3)) as checkpoints:
        checkpoints.save(12, make_state(12))
    assert not asked and same(restored(workdir), make_state(12))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_keeps_the_one_before(workdir, monkeypatch):
    """Twice: when tensorstore writes the arrays, by a limit on the size of files; and when orbax commits them."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, sentence in ((12, "File too large"), (15, "No space left on device")):
        state = make_state(step, rows=2048)
        checkpoints = Checkpoints(workdir, keep=3)
        try:
            with monkeypatch.context() as patch:
                if step == 12:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
                else:
                    patch.setattr(os, "rename", full)
                checkpoints.save(step, state)
                with pytest.raises(UserError, match=f"cannot write a checkpoint to .*{sentence}.*before it are whole"):
                    checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        with pytest.raises(UserError, match=sentence):
            checkpoints.close()
        assert same(restored(workdir), make_state(9))


def test_a_disk_that_fills_up_before_the_digest_loses_nothing(workdir, monkeypatch):
    checkpoints = Checkpoints(workdir, keep=3)
    monkeypatch.setattr(os, "replace", full)
    checkpoints.save(12, make_state(12))
    with pytest.raises(UserError, match=rf"cannot write .*checkpoints/12/{DIGESTS} \(No space left on device\)"):
        checkpoints.save(15, make_state(15))
    checkpoints.close()
    monkeypatch.undo()
    assert same(restored(workdir, keep=3), make_state(12)) and same(restored(workdir, step=9), make_state(9))


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")], ids=str)
@pytest.mark.parametrize("before", [1, 2, 4, 8])
def test_a_state_saved_on_some_devices_restores_on_any_number(before, spec, tmp_path):
    with closing(Checkpoints(tmp_path, keep=1)) as checkpoints:
        checkpoints.save(5, make_state(5, before, spec))
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for after in (1, 2, 4, 8):
            wanted = make_state(5, after, spec if after != 2 else PartitionSpec())
            assert same(checkpoints.restore(shapes(wanted)), wanted)


def test_processes_hear_of_the_first_trouble(monkeypatch):
    assert agreed("as it is") == "as it is"
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    others = np.stack([np.frombuffer(text.ljust(200), np.uint8) for text in (b"", "größer".encode(), b"later")])
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", lambda mine: others)
    assert agreed("") == "größer"


def test_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_json(tmp_path / "run.json", {})
    metrics = Metrics(tmp_path / "run", 0)
    metrics.write(1, {"loss": 1.0})
    metrics.flush()
    assert metrics.seconds >= 0
    metrics.close()
    assert not list(tmp_path.iterdir())


class Bucket(MemoryFileSystem):
    """An object store: objects are written whole, none grows, and a folder is there when there is something in it."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012  fsspec's own way
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        path = path.removeprefix("gs://").strip("/")
        return f"/{path}" if path else ""

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def _open(self, path, mode="rb", **kwargs):
        if "a" in mode:
            raise NotImplementedError("an object cannot be appended to")
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch) -> Path:
    """gs://bucket/run, in memory."""
    store = Bucket()
    store.store.clear()
    store.pseudo_dirs[:] = ["", "/bucket"]
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda *_: store)
    return work_directory("gs://bucket/run")


def test_a_record_in_an_object_store(bucket):
    assert str(bucket) == "gs://bucket/run" and read_json(bucket / "run.json") is None
    write_json(bucket / "run.json", {"a": 1})
    write_json(bucket / "run.json", {"a": 2})
    assert read_json(bucket / "run.json") == {"a": 2}
    assert [path.name for path in bucket.iterdir()] == ["run.json"]
    (bucket / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read gs://bucket/run/run\.json"):
        read_json(bucket / "run.json")


def test_metrics_in_an_object_store_are_there_after_every_flush(bucket):
    def steps():
        return [json.loads(line)["step"] for line in (bucket / "metrics.jsonl").read_text().splitlines()]

    first = Metrics(bucket, 0)
    first.write(1, {"loss": 1.0})
    first.write(2, {"loss": 1.0})
    first.flush()
    assert steps() == [1, 2]
    first.write(3, {"loss": 1.0})
    assert steps() == [1, 2]  # nobody may rely on it yet
    first.close()
    assert steps() == [1, 2, 3]
    second = Metrics(bucket, 2)
    second.write(3, {"loss": 2.0})
    second.close()
    assert steps() == [1, 2, 3]
    assert list((bucket / "tensorboard").iterdir()) and not Path(second._desk.name).exists()


def test_a_store_that_refuses_is_one_sentence(bucket, monkeypatch):
    metrics = Metrics(bucket, 0)
    monkeypatch.setattr(Bucket, "_open", lambda *_, **__: refuse(RuntimeError("no rights")))
    for action in (metrics.flush, metrics.close):
        with pytest.raises(UserError, match=r"cannot write gs://bucket/run/.*\(no rights\): the same command resumes"):
            action()
    assert not Path(metrics._desk.name).exists()


def test_bad_images_are_listed_in_an_object_store(bucket):
    quarantine = Quarantine("photos", 100)
    keep_lists([quarantine], bucket, begun=False)
    quarantine.report({3: "junk"}, str)
    quarantine.report({7: "junk"}, str)
    assert read_list(bucket) == {("photos", 3), ("photos", 7)}
    resumed = Quarantine("photos", 100)
    keep_lists([resumed], bucket, begun=True)
    assert resumed.listed == {3, 7}


def test_the_digest_of_files_in_an_object_store(bucket):
    (bucket / "9" / "state").mkdir(parents=True)
    (bucket / "9" / "state" / "data").write_bytes(b"123456789")
    assert file_digests(bucket / "9") == {"state/data": (9, 0xCBF43926)}  # the check value of CRC-32
    write_json(bucket / "9" / DIGESTS, file_digests(bucket / "9"))
    assert inspect(bucket / "9") == ("", "")
    (bucket / "9" / "state" / "data").write_bytes(b"123456780")
    assert inspect(bucket / "9") == ("state/data has not the bytes that were written", "")


def test_a_damaged_checkpoint_is_moved_in_an_object_store(bucket, monkeypatch):
    with closing(Checkpoints(bucket, keep=2)) as checkpoints:
        monkeypatch.setattr(checkpoints._orbax, "reload", lambda: None)  # it asks Google what kind of bucket this is
        for name in ("6/data", "9/data", "9/state/data"):
            (checkpoints.directory / name).write_bytes(b"123456789")
        checkpoints._put_aside({9: "data is missing"}, 6)
        assert [path.name for path in checkpoints.directory.iterdir()] == ["6"]
    assert file_digests(bucket / "checkpoints-damaged" / "9").keys() == {"data", "state/data"}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ImportError("Please install gcsfs to access Google Storage"),
            "needs a package .* pip install gcsfs for gs://",
        ),
        (RuntimeError("Forbidden"), r"cannot be reached \(Forbidden\): check the address and your rights"),
    ],
    ids=["package", "rights"],
)
def test_a_store_that_cannot_be_used_is_known_at_once(error, sentence, monkeypatch):
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda *_: refuse(error))
    with pytest.raises(UserError, match=f"^gs://bucket/run {sentence}"):
        work_directory("gs://bucket/run")


def test_a_directory_stays_a_path(tmp_path):
    assert work_directory("runs/a") == Path("runs/a") and work_directory(tmp_path) is not None
    assert isinstance(work_directory(str(tmp_path)), Path)
    with pytest.raises(UserError, match=r"nowhere://a is in no store that is known: use gs://"):
        work_directory("nowhere://a")
