"""Eight fake CPU devices, golden fixtures, and one tiny experiment for every method."""

import gc
import os
import tempfile

# Most of the suite's time is compilation: spend little on optimising, and share what is compiled between workers.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={os.environ.get('TEST_DEVICES', 8)}"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_backend_optimization_level=0"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # as it is in workers
    CACHE = tempfile.TemporaryDirectory(prefix="ssl_kd-tests-", ignore_cleanup_errors=True)  # gone with this process
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import functools
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import base
from ssl_kd import models
from ssl_kd.data.quarantine import Quarantine
from ssl_kd.data.resident import Resident
from ssl_kd.data.sources import Source
from ssl_kd.images import Images
from ssl_kd.mesh import layout
from ssl_kd.methods import METHODS
from ssl_kd.models import MODELS, NetworkSpec, init_network
from ssl_kd.models.heads import THead
from ssl_kd.models.resnet import ResNet
from ssl_kd.models.vit import ViT
from ssl_kd.recipe import make_recipe
from ssl_kd.state import create_state, stream
from ssl_kd.step import TrainStep

gc.set_threshold(200_000, 50, 1000)  # tracing makes so many objects that collecting them often is a sixth of its time

GOLDEN = Path(__file__).parent / "golden"

MODELS["tiny"] = functools.partial(ResNet, stage_sizes=(1,), block="basic")
MODELS["tiny_bottleneck"] = functools.partial(ResNet, stage_sizes=(1,), block="bottleneck")
models.THead = functools.partial(THead, depth=1)  # three blocks would take three times as long to compile
MODELS["tiny_vit"] = functools.partial(ViT, embed_dim=16, depth=1, heads=2)


def pytest_collection_modifyitems(items):
    """The tests that look at one variant's compiled step follow each other, and so are one worker's.

    They come first: what is left at the end, workers take from each other.
    """

    def place(item):
        shares = hasattr(item.module, "rig_of")
        return not shares, item.callspec.params.get("variant", "") if shares and hasattr(item, "callspec") else ""

    items.sort(key=place)


@pytest.fixture(scope="session")
def golden():
    """Loads a fixture of tests/golden/ by name."""
    return lambda name: np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


TINY = {"queue": 40, "momentum": 0.9}
SPECIAL = {
    "rekd": {"prototypes": 4, "warmup": 0.0, "neighbours": 3},
    "mokd": {"local_crops": 2, "local_size": 8, "augmentation": "default", "self_temperature_epochs": 2},
}


def tiny_config(method: str, **method_fields):
    """A recipe of seconds: 12-px images, a tiny student and a teacher of another architecture."""
    c = base.get_config()
    c.name = "tiny"
    c.batch_size, c.epochs, c.image_size = 16, 2.0, 12
    c.student = base.network("tiny", width=0.25, stem="small_s2", dim=8)
    c.teacher = base.network("tiny_bottleneck", width=0.125, stem="small_s2", dim=8)
    fields = {name: value for name, value in TINY.items() if name in METHODS[method].__dataclass_fields__}
    fields = {**fields, **SPECIAL.get(method, {}), **method_fields}
    c.method = base.method(method, **fields)
    if method == "compress":
        c.student.update(head="linear" if fields.get("queues") == 1 else "none", dim=0)
    elif method == "simreg":
        c.student.update(head="regression", dim=0)
    elif method == "mokd":
        c.teacher = base.network("tiny_vit", stem="small", head="dino", head_hidden=16, dim=24, thead=16, drop_path=0.1)
        c.student.update(head="dino", head_hidden=16, dim=24, thead=16)
        c.optim.clip = 0.1  # its sharp softmaxes have steep gradients
        # AdamW, which the single network has, blows up the rounding of gradients that are 0 in exact arithmetic.
        c.optim.groups.teacher = base.optimizer("sgd", paths=("teacher",), lr=0.05, final_weight_decay=0.4, clip=0.1)
        if fields.get("teacher") == "none":
            c.student.thead = 0
            c.optim.update(name="adamw", lr=0.05)
            del c.teacher, c.optim.groups.teacher
    c.augment = base.augmentation("weak")
    c.optim.lr = 0.5
    return c


class ArrayReader:
    """A storage format for tests: images in memory."""

    def __init__(self, images, labels=None, classes: int | None = None):
        self.images, self.num_classes, self.rows_read = images, classes, []
        self.numbers = np.full(len(images), -1) if labels is None else labels

    def __len__(self):
        return len(self.images)

    def read(self, row):
        self.rows_read.append(row)
        return self.images[row]

    def labels(self):
        return self.numbers.astype(np.int32)

    def label_of(self, row):
        return int(self.numbers[row])

    def where(self, row):
        return f"row {row}"


def source_of(images, labels=None, classes: int | None = None) -> Source:
    """A source of images (N, H, W, 3) in memory."""
    rows, quarantine = np.arange(len(images)), Quarantine("the test's images", len(images))
    return Source(ArrayReader(images, labels, classes), rows, max(images.shape), images.shape[1:3], quarantine)


@functools.cache
def drawn_network(spec: NetworkSpec, seed: int, side: int):
    """A network's variables by its own initialisers, compiled: hundreds of small operations otherwise."""
    return jax.jit(functools.partial(init_network, spec, image_size=side))(jax.random.key(seed))


class Rig:
    """A tiny experiment without files: recipe, mesh over some of the devices, data, and steps."""

    drawn: ClassVar = {}  # config → initial state, on the host

    def __init__(self, config, devices: int = 1, images: int = 64):
        self.config = config
        self.recipe = r = make_recipe(config, images)
        self.mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        rng = np.random.default_rng(7)
        side = config.image_size
        pixels = rng.integers(0, 256, (images, side, side, 3), np.uint8)
        label = rng.integers(0, 3, images).astype(np.int32)
        mated = any(view.source == "mate" for view in r.method.views.values())
        bag = rng.integers(0, images, (images, 2)).astype(np.int32) if mated else None
        self.data = self.put(Resident(Images.whole(pixels), label, bag))
        frozen = {n: drawn_network(r.specs[n], 9, side) for n in r.method.frozen}
        self.frozen = jax.device_put(frozen, layout(frozen, self.mesh, r.sharding))
        self.step = TrainStep(r, self.mesh).jit()
        self.shapes = jax.eval_shape(functools.partial(create_state, r))

    def create(self):
        """The initial state, drawn once for all layouts of it."""
        alike = self.config.copy_and_resolve_references()
        alike.sharding, alike.bn_groups = "replicated", 1
        name = alike.to_json()
        if name not in self.drawn:
            self.drawn[name] = jax.device_get(jax.jit(functools.partial(create_state, self.recipe))())
        return jax.device_put(self.drawn[name], layout(self.shapes, self.mesh, self.recipe.sharding))

    def put(self, tree):
        return jax.device_put(tree, self.replicated)

    def batch(self, step: int):
        order = jax.random.permutation(stream(self.config.seed, "test order", step), len(self.data.label))
        index = order[: self.config.batch_size].astype(np.int32)
        return {"index": jax.device_put(index, NamedSharding(self.mesh, PartitionSpec("data")))}

    def text(self) -> str:
        """The compiled step, in the compiler's words."""
        return self.step.lower(self.create(), self.frozen, self.batch(0), self.data).compile().as_text()

    def run(self, steps: int, state=None):
        """The state after some steps, and each step's metrics."""
        state = self.create() if state is None else state
        metrics = []
        for step in range(int(state.step), int(state.step) + steps):
            state, values = self.step(state, self.frozen, self.batch(step), self.data)
            metrics.append({name: float(value) for name, value in values.items()})
        return state, metrics


VARIANTS = {
    "moco_v2": ("moco_v2", {}),
    "rekd": ("rekd", {}),
    "rekd-balanced": ("rekd", {"balanced": True}),
    "rekd-neighbour": ("rekd", {"miner": "neighbour"}),
    "rekd-soft": ("rekd", {"miner": "soft"}),
    "rekd-frozen": ("rekd", {"teacher": "frozen"}),
    "rekd-self": ("rekd", {"teacher": "self"}),
    "rekd-response": ("rekd", {"knowledge": "response"}),
    "disco": ("disco", {"consistency": 1.0, "distance": 0.5, "angle": 0.5}),
    "seed": ("seed", {}),
    "ressl": ("ressl", {}),
    "compress": ("compress", {}),
    "compress-1q": ("compress", {"queues": 1}),
    "simreg": ("simreg", {}),
    "bingo": ("bingo", {"single_epochs": 0.5}),
    "mokd": ("mokd", {}),
    "mokd-alone": ("mokd", {"teacher": "none"}),
}

GROUPS = {"rekd-balanced": 8, "disco": 8, "seed": 2, "ressl": 2, "compress": 2, "simreg": 2, "bingo": 8}


def config_of(variant: str):
    """The recipe of a variant, some with groups of batch norm."""
    method, fields = VARIANTS[variant]
    config = tiny_config(method, **fields)
    config.bn_groups = GROUPS.get(variant, 1)
    return config


@functools.cache
def rig_of(variant: str, devices: int = 1, **changes) -> Rig:
    """One compiled step a variant, number of devices and changes, shared by all tests that only look at it."""
    config = config_of(variant)
    config.update(changes)
    return Rig(config, devices)


@functools.cache
def three_steps(variant: str):
    """(initial state, state after three steps, metrics) on the host."""
    rig = rig_of(variant)
    first = jax.device_get(rig.create())
    last, metrics = rig.run(3)
    return first, jax.device_get(last), metrics


def worst(a, b) -> float:
    """Largest difference of two trees, relative to the largest entry of each leaf."""
    a, b = (jax.tree.leaves(jax.device_get(tree)) for tree in (a, b))
    pairs = [(np.float64(x), np.float64(y)) for x, y in zip(a, b, strict=True) if np.size(x)]
    return max((np.abs(x - y).max() / max(1e-3, np.abs(x).max()) for x, y in pairs), default=0.0)
