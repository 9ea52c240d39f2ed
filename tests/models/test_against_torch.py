"""Every backbone computes what torch's does with the same weights: as recorded, and with torch itself if installed.

`python benchmarks/model_fixtures.py` records. Weights and images are its formulas: a weight is a function of its name
there, so that one taken for another of the same shape shows. Without torch, the networks of WITH_TORCH are checked by
their parameter counts alone: others have each of their parts, and all would take too long to compile.
"""

import re

import jax
import numpy as np
import pytest
from backbones import shapes
from conftest import GOLDEN

from benchmarks.model_fixtures import CLASSES, compute, digest, images, parameter
from ssl_kd.models import MODELS
from ssl_kd.models.vit import interpolate_positions
from ssl_kd.weights.layouts import LAYOUTS, from_torch, our_name, renamed, to_torch

try:
    import torch

    from benchmarks.torch_models import timm, torchvision
except ImportError:
    VERSIONS = None
else:
    VERSIONS = f"torch {torch.__version__}, timm {timm.__version__} and torchvision {torchvision.__version__}"

NAMES = sorted(path.stem for path in (GOLDEN / "models").glob("*.npz") if path.stem != "positions")
# The deepest, and those that are a table's line away from another.
WITH_TORCH = {"efficientnet_b1", "mobilenet_v3_large", "resnet34", "resnet50w2", "resnet101", "resnet152"}
WITH_TORCH |= {"tf_efficientnet_b1", "vit_small", "vit_base", "vit_base_dinov2", "vit_base_reg4_dinov2"}
WITH_TORCH |= {"mobilenet_v3_small_tv", "shufflenet_v2_x0_5", "efficientnet_lite0", "tf_efficientnet_lite0"}
# Batch statistics of 16 values in a hundred layers enlarge float32's rounding to 3e-4 and 8e-4, here as in torch.
IN_FLOAT64 = {"resnet101", "resnet152"}
# With 1000 classes, as torchvision's documentation and timm's tables have them.
PUBLISHED = {
    "alexnet_tv": 61_100_840,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_lite0": 4_652_008,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_large_tv": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "mobilenet_v3_small_tv": 2_542_856,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "shufflenet_v2_x0_5": 1_366_792,
    "shufflenet_v2_x1_0": 2_278_604,
    "tf_efficientnet_b0": 5_288_548,
    "tf_efficientnet_b1": 7_794_184,
    "tf_efficientnet_lite0": 4_652_008,
    "vit_tiny": 5_717_416,
    "vit_small": 22_050_664,
    "vit_base": 86_567_656,
}


def keys(path) -> list[str]:
    """Of a leaf, without its collection."""
    return [key.key for key in path[1:]]


def torch_names(name: str, tree) -> dict[str, str]:
    """Our names of a network's weights → the recorded model's, which differ for torchvision's MobileNets alone."""
    layout = next((key for key in ("torchvision_v2", "torchvision_v3") if re.search(LAYOUTS[key].models, name)), "timm")
    return renamed([our_name(*keys(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)], LAYOUTS[layout])


def filled(tree, theirs: dict[str, str]):
    """The formula's values of parameters and statistics in flax's layout, for leaves with a shape."""

    def values(path, leaf):
        shape = to_torch(keys(path), np.broadcast_to(np.float32(0), leaf.shape)).shape
        return from_torch(keys(path), parameter(theirs[our_name(*keys(path))], shape))

    return jax.tree_util.tree_map_with_path(values, tree)


def fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "models" / f"{name}.npz") as file:
        return dict(file)


def variables(name: str, size: int):
    """Shapes of a network's variables."""
    return shapes(MODELS[name](classes=CLASSES), size)[1]


def outputs(name: str, norms) -> dict[str, np.ndarray]:
    """What `compute` gives, of our network."""
    dtype = np.float64 if name in IN_FLOAT64 else np.float32
    model, x = MODELS[name](classes=CLASSES, dtype=dtype), images(56 if "dinov2" in name else 64).astype(dtype)

    @jax.jit
    def forward(values, x):
        features = model.apply(values, x, norm="running")
        return features, *model.apply(values, x, norm="batch", mutable=["batch_stats"])

    expected = variables(name, x.shape[1])
    theirs = torch_names(name, expected)
    values = filled(expected, theirs)
    with jax.enable_x64(dtype == np.float64):
        values = jax.tree.map(lambda leaf: leaf.astype(dtype), values)
        running, batch, moved = jax.device_get(forward(values, x))
    moved = {theirs[our_name(*keys(path))]: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(moved)}
    return {
        "eval": np.array([digest(x) for x in (*running.stages, running.pooled, running.logits)]),
        "train": np.array([digest(x) for x in (*batch.stages, batch.pooled, batch.logits)]),
        "moved": np.array(
            [digest(moved[f"{norm}.{leaf}"]) for norm in norms for leaf in ("running_mean", "running_var")]
        ),
    }


@pytest.fixture(scope="module", autouse=True)
def which(pytestconfig):
    """Says what is compared with."""
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nbackbones: against what was recorded{f' and {VERSIONS}' if VERSIONS else ', torch is not here'}")


@pytest.mark.parametrize("name", [name for name in NAMES if VERSIONS or name not in WITH_TORCH])
def test_outputs_and_statistics_are_torchs(name):
    """Stages, pooled feature and logits by running and by batch statistics, and how far the running ones move."""
    recorded = fixture(name)
    got = outputs(name, recorded["norms"])
    for reference in (recorded, compute(name)) if VERSIONS else (recorded,):
        for key, ours in got.items():
            theirs = reference[key]
            assert ours.shape == theirs.shape
            for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                np.testing.assert_allclose(a / b[0], b / b[0], rtol=0, atol=1e-4, err_msg=f"{key}, row {row}")


def test_every_backbone_is_compared():
    assert set(NAMES) == {name for name in MODELS if not name.startswith("tiny")}


@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_are_torchs_and_the_published(name):
    size = 518 if "dinov2" in name else 224 if name.startswith(("vit", "alexnet")) else 64  # the others' hang on none
    count = sum(leaf.size for leaf in jax.tree.leaves(variables(name, size)["params"]))
    assert count == fixture(name)["count"]
    assert count == PUBLISHED.get(name, count)


def test_swavs_wide_resnet_has_94_million_parameters_and_4096_features():
    assert MODELS["resnet50w2"]().pooled_dim == 4096
    assert round((fixture("resnet50w2")["count"] - 4097 * CLASSES) / 1e6) == 94


def test_positions_are_sampled_as_in_dinov2():
    recorded = fixture("positions")
    for key, antialias in (("plain", False), ("registers", True)):
        got = interpolate_positions(recorded["given"], (3, 7), antialias=antialias)
        np.testing.assert_allclose(got, recorded[key], rtol=0, atol=1e-6)
