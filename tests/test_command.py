"""The command line: a mistake is one sentence and exit status 2, never a traceback."""

import sys

import jax
import pytest
from absl import flags
from runs import ROOT, launch

from ssl_kd import command
from ssl_kd.errors import UserError

SMALL = [
    "--config.data.train=train[:256]",
    "--config.data.test=test[:100]",
    "--config.epochs=1",
    "--config.log_every=2",
]
RECIPE = f"--config={ROOT}/configs/rekd_alexnet.py"


@pytest.fixture(scope="module")
def config():
    return command.define_config()


@pytest.fixture
def parse(monkeypatch):
    """Parses arguments as if they stood on the command line, where ml_collections looks for overrides."""

    def parse(*arguments):
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # overrides of the parse before
        flags.FLAGS.unparse_flags()
        flags.FLAGS["config"].unparse()
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        command.parse()

    return parse


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config is missing"),
        ([RECIPE, "--config.optim.lrr=1"], "--config.optim.lrr=1 sets an unknown key"),
        ([RECIPE, "--config.batch_size=many"], "batch_size"),
        ([RECIPE, "--config.seed=1.5"], "seed"),
        ([RECIPE, "--colour=red"], "colour"),
        ([RECIPE, "train"], "'train' is not a flag"),
        ([f"{RECIPE}:huge"], "preset 'huge' is unknown: choose one of none, smoke, cifar10, imagenet"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(config, parse, arguments, sentence):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_the_workdir_is_named_after_recipe_preset_and_overrides(config, parse):
    def workdir(*arguments):
        parse(*arguments)
        return str(command.default_workdir(config.value))

    assert workdir(RECIPE) == "runs/rekd_alexnet"
    assert workdir(f"{RECIPE}:smoke") == "runs/rekd_alexnet-smoke"
    one, two = (workdir(f"{RECIPE}:smoke", f"--config.seed={seed}") for seed in (1, 2))
    assert one != two and one.startswith("runs/rekd_alexnet-smoke-")
    assert one == workdir(f"{RECIPE}:smoke", "--config.seed=1")


def test_every_compiled_program_is_kept_unless_jaxs_variables_say_otherwise(monkeypatch):
    options = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: jax.config.values[name] for name in options}
    command.set_up_process()
    assert before == {name: jax.config.values[name] for name in options}
    for name in options:
        monkeypatch.delenv(name.upper())
    said = {}
    monkeypatch.setattr(command.jax.config, "update", said.__setitem__)
    command.set_up_process()
    assert said.keys() == set(options) and said[options[1]] == 0
    assert said[options[0]].endswith("ssl_kd/xla")


def test_an_idle_gpu_is_one_warning_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(command.shutil, "which", lambda name: f"/usr/bin/{name}")
    command.warn_of_idle_gpu()
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and command.CUDA_INSTALL in warning
    assert command.CUDA_INSTALL in (ROOT / "README.md").read_text()


def test_main_exits_2_with_the_sentence_alone(tmp_path):
    done = launch("main", RECIPE, "--config.data.source=hf:nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_smoke_recipe_trains_and_is_evaluated(tmp_path):
    """What CI and the notebook run, as a user would."""
    done = launch("main", f"{RECIPE}:smoke", *SMALL, "--workdir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("raw pixels", "random weights", "linear", "run/checkpoints", "Next: python launch/"):
        assert word in done.stdout
    probe = launch("evaluate", "--workdir=run", "--network=teacher", cwd=tmp_path)
    assert probe.returncode == 0, probe.stderr
    assert "teacher at step 4" in probe.stdout


def test_dry_run_prints_parameters_memory_and_time_and_writes_nothing(tmp_path):
    recipe = f"--config={ROOT}/configs/moco_v2_alexnet.py:smoke"
    done = launch("main", recipe, *SMALL, "--dry_run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("student", "student_momentum", "parameters", "MiB", "GFLOP", "min at"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []
