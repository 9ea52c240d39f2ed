"""Weights of others, in and out: names are theirs, values survive bit for bit, and whatever does not fit is said."""

import dataclasses
import hashlib
import json
import shutil
from contextlib import closing

import jax
import numpy as np
import pytest
import runs
from conftest import GOLDEN
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from ssl_kd.checkpoint import Checkpoints, array_digest
from ssl_kd.command import network_source
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.models import MODELS, Network, NetworkSpec, init_network
from ssl_kd.models.embed import pooled_features
from ssl_kd.recipe import make_recipe
from ssl_kd.state import create_state
from ssl_kd.train import fit
from ssl_kd.trained import at_image_size, load, load_source
from ssl_kd.weights import detect
from ssl_kd.weights.commands import convert, export, inspect, names_for, show_models, verify
from ssl_kd.weights.detect import shapes, torch_shape
from ssl_kd.weights.files import METADATA, read_network, write_network
from ssl_kd.weights.layouts import BACKBONE_WEIGHTS, LAYOUTS, our_names, renamed, to_torch
from ssl_kd.workdir import write_json

NAMES = json.loads((GOLDEN / "weight_names.json").read_text())
RENAMED = [(program, model) for program, models in NAMES.items() for model in models]
DINOV2_SIZE = 518


def variables_of(spec, image_size=224):
    """Random values in the shapes of a network, none of them what an initialiser or a copy error would leave."""
    rng, expected = np.random.default_rng(0), shapes(spec, image_size)
    arrays = {place: rng.normal(size=shape).astype(np.float32) for place, shape in expected.items()}
    arrays |= {place: np.abs(array) for place, array in arrays.items() if place[-1] == "var"}
    return {"params": {}, "batch_stats": {}} | unflatten_dict(arrays)


def as_saved(spec, variables, layout, prefix=""):
    """The tensors of a file that another program would have written."""
    arrays = flatten_dict(variables)
    places = our_names(arrays)
    names = renamed(places, LAYOUTS[layout])
    return {prefix + names[n]: np.ascontiguousarray(to_torch(place, arrays[place])) for n, place in places.items()}


def keep_models(monkeypatch, *names):
    """All others cost seconds."""
    for name in MODELS.keys() - set(names):
        monkeypatch.delitem(MODELS, name)


def assert_equal(found, variables):
    ours, theirs = flatten_dict(found), flatten_dict(variables)
    assert ours.keys() == theirs.keys()
    for place, array in theirs.items():
        np.testing.assert_array_equal(ours[place], array, err_msg=str(place))


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec("tiny", head="mlp_bn", dim=8, classes=3),
        NetworkSpec("tiny_vit", stem="small", head="dino", head_hidden=8, dim=4),
        NetworkSpec("tiny", width=0.125, stem="small_s2", head="linear", dim=4, thead=16, classes=2),
    ],
    ids=lambda spec: spec.head,
)
def test_shapes_are_those_of_the_network(spec):
    variables = jax.eval_shape(lambda: init_network(spec, jax.random.key(0), 16))
    assert shapes(spec, 16) == {place: leaf.shape for place, leaf in flatten_dict(variables).items()}


@pytest.mark.parametrize(("program", "model"), RENAMED, ids=map("-".join, RENAMED))
def test_names_and_shapes_are_those_of_timm_and_torchvision(program, model):
    """Recorded from the real ones by benchmarks/weight_round_trip.py, which also takes every weight there and back."""
    dinov2 = "dinov2" in model
    spec = NetworkSpec(model, head="none", classes=0 if dinov2 else 1000)
    size = DINOV2_SIZE if dinov2 else 224
    layout, found = LAYOUTS[names_for(program, model)], shapes(spec, size)
    counts = len(found) - 2 * bool(spec.classes), sum(len(shape) == 4 for shape in found.values())
    assert counts == BACKBONE_WEIGHTS[model]
    places = our_names(found)
    lines = []
    for name, theirs in renamed(places, layout).items():
        shape = torch_shape(places[name], found[places[name]])
        lines.append(f"{theirs} {list(shape[:2] if name == layout.linear else shape)}")
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    assert {"count": len(lines), "sha256": digest} == NAMES[program][model]


FOREIGN = {
    "timm": (NetworkSpec("mobilenet_v3_small", head="none", classes=7), ""),
    "timm_lite": (NetworkSpec("tf_efficientnet_lite0", head="none", classes=7), ""),
    "torchvision after DataParallel": (NetworkSpec("resnet18", head="none"), "module.encoder."),
    "moco_v2": (NetworkSpec("resnet18", head="mlp", head_hidden=24, dim=16), "module.encoder_q."),
    "moco_v1": (NetworkSpec("resnet18", head="linear", dim=16), "module.encoder_q."),
    "swav": (NetworkSpec("resnet18", head="mlp_bn", head_hidden=24, dim=16), "module."),
    "dino": (NetworkSpec("vit_tiny", head="dino", head_hidden=24, dim=16), "module."),
    "torchvision": (NetworkSpec("shufflenet_v2_x0_5", head="none", classes=7), ""),
    "torchvision_v2": (NetworkSpec("mobilenet_v2", head="none", classes=7), ""),
    "torchvision_v3": (NetworkSpec("mobilenet_v3_small_tv", head="none", classes=7), ""),
    "efficientnet_lite0": (NetworkSpec("tf_efficientnet_lite0", head="none", classes=7), ""),
}

# Names in published files.
LITERAL = {
    ("moco_v2", "backbone/layer2_0/downsample_1/mean"): "layer2.0.downsample.1.running_mean",
    ("moco_v2", "head/fc1/kernel"): "fc.0.weight",
    ("moco_v2", "head/fc2/bias"): "fc.2.bias",
    ("swav", "head/fc1/kernel"): "projection_head.0.weight",
    ("swav", "head/bn1/var"): "projection_head.1.running_var",
    ("swav", "head/fc2/kernel"): "projection_head.3.weight",
    ("dino", "backbone/patch_embed/kernel"): "backbone.patch_embed.proj.weight",
    ("dino", "backbone/blocks_11/attn/qkv/bias"): "backbone.blocks.11.attn.qkv.bias",
    ("dino", "head/fc3/kernel"): "head.mlp.4.weight",
    ("dino", "head/last/v"): "head.last_layer.weight_v",
    ("dino", "head/last/g"): "head.last_layer.weight_g",
    ("dinov2", "backbone/reg_token"): "register_tokens",
    ("dinov2", "backbone/blocks_0/ls1/gamma"): "blocks.0.ls1.gamma",
    ("torchvision", "backbone/stage2_0/branch1_0/kernel"): "stage2.0.branch1.0.weight",
    ("torchvision", "backbone/features_10/bias"): "features.10.bias",
    ("torchvision_v2", "backbone/blocks_0_0/conv_dw/kernel"): "features.1.conv.0.0.weight",
    ("torchvision_v2", "backbone/blocks_0_0/bn2/scale"): "features.1.conv.2.weight",
    ("torchvision_v2", "backbone/blocks_1_0/bn2/mean"): "features.2.conv.1.1.running_mean",
    ("torchvision_v2", "backbone/blocks_1_0/conv_pwl/kernel"): "features.2.conv.2.weight",
    ("torchvision_v2", "backbone/blocks_1_1/bn3/scale"): "features.3.conv.3.weight",
    ("torchvision_v3", "backbone/blocks_0_0/se/conv_reduce/kernel"): "features.1.block.1.fc1.weight",
    ("torchvision_v3", "backbone/blocks_0_0/conv_pw/kernel"): "features.1.block.2.0.weight",
    ("torchvision_v3", "backbone/blocks_1_0/bn2/scale"): "features.2.block.1.1.weight",
    ("torchvision_v3", "backbone/blocks_1_0/conv_pwl/kernel"): "features.2.block.2.0.weight",
    ("torchvision_v3", "backbone/blocks_5_0/conv/kernel"): "features.12.0.weight",
    ("torchvision_v3", "backbone/conv_head/bias"): "classifier.0.bias",
    ("torchvision_v3", "backbone/classifier/bias"): "classifier.3.bias",
    ("efficientnet_lite0", "backbone/blocks_1_0/bn1/scale"): "_blocks.1._bn0.weight",
    ("efficientnet_lite0", "backbone/blocks_0_0/bn1/scale"): "_blocks.0._bn1.weight",
    ("efficientnet_lite0", "backbone/blocks_2_1/bn3/var"): "_blocks.4._bn2.running_var",
    ("efficientnet_lite0", "backbone/bn2/mean"): "_bn1.running_mean",
    ("detectron2", "backbone/layer2_0/downsample_0/kernel"): "res3.0.shortcut.weight",
    ("detectron2", "backbone/layer4_1/bn2/mean"): "res5.1.conv2.norm.running_mean",
}
MEMBERS = {
    "dinov2": NetworkSpec("vit_small_reg4_dinov2", head="none"),
    "detectron2": NetworkSpec("resnet18", head="none"),
    **{layout: spec for layout, (spec, _) in FOREIGN.items() if layout in LAYOUTS},
}


@pytest.mark.parametrize("layout", sorted({layout for layout, _ in LITERAL}))
def test_names_are_those_in_published_files(layout):
    specs = [MEMBERS[layout]] + [NetworkSpec("alexnet_tv", head="none")] * (layout == "torchvision")
    theirs = {}
    for spec in specs:
        places = our_names(shapes(spec, 224))
        names = renamed(places, LAYOUTS[layout])
        theirs |= {"/".join(place[1:]): names[name] for name, place in places.items()}
    expected = {place: name for (of, place), name in LITERAL.items() if of == layout}
    assert {place: theirs[place] for place in expected} == expected


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_others_are_recognised_and_read_whole(case, tmp_path):
    (spec, prefix), layout = FOREIGN[case], case.split()[0]
    spec = dataclasses.replace(spec, **{key: getattr(LAYOUTS[layout], key) for key in ("mean", "std", "interpolation")})
    variables = variables_of(spec)
    tensors = as_saved(spec, variables, layout, prefix) | {"module.queue": np.zeros((2, 2), np.float32)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_network(tmp_path / "x.safetensors", spec.name, classifier=True)
    assert (found.spec, found.layout, found.prefix, found.image_size) == (spec, layout, prefix, 224)
    assert found.aside == ("module.queue",)
    assert found.about["sha256"] == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert_equal(found.variables, variables)

    without = read_network(tmp_path / "x.safetensors", spec.name)
    assert without.spec == dataclasses.replace(spec, classes=0)
    assert len(flatten_dict(without.variables)) == len(flatten_dict(variables)) - 2 * bool(spec.classes)


@pytest.mark.parametrize("layout", ["ssl_kd", "timm", "torchvision", "detectron2"])
def test_what_is_written_is_read_again_without_guessing(layout, tmp_path):
    entry = {"mean": (0.1, 0.2, 0.3), "interpolation": "bicubic", "crop_fraction": 0.95}
    spec = NetworkSpec("resnet18", width=0.25, stem="small", head="mlp", dim=16, **entry)
    variables, path = variables_of(spec, 32), tmp_path / "x.safetensors"
    write_network(path, spec, variables, 32, {"licence": "MIT", "source": "here"}, layout)
    found = read_network(path, "vit_base")  # what the file says goes before what is preferred
    bare = spec if layout == "ssl_kd" else dataclasses.replace(spec, head="none", dim=0, head_hidden=0)
    assert (found.spec, found.image_size, found.about["licence"], found.about["source"]) == (bare, 32, "MIT", "here")
    expected = variables if layout == "ssl_kd" else {k: {"backbone": v["backbone"]} for k, v in variables.items()}
    assert_equal(found.variables, expected)
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_needs_no_name_unless_several_fit(tmp_path, monkeypatch):
    keep_models(monkeypatch, "vit_tiny", "efficientnet_lite0", "tf_efficientnet_lite0", "resnet50")
    spec = NetworkSpec("vit_tiny", head="none")
    save_file(as_saved(spec, variables_of(spec), "timm"), tmp_path / "vit.safetensors")
    assert read_network(tmp_path / "vit.safetensors").spec.name == "vit_tiny"
    assert read_network(tmp_path / "vit.safetensors", "resnet50").spec.name == "vit_tiny"
    spec = NetworkSpec("efficientnet_lite0", head="none")
    save_file(as_saved(spec, variables_of(spec), "timm"), tmp_path / "lite.safetensors")
    with pytest.raises(
        UserError, match=r"fits several models: say whether it is efficientnet_lite0 or tf_efficientnet_lite0"
    ):
        read_network(tmp_path / "lite.safetensors")
    assert read_network(tmp_path / "lite.safetensors", "tf_efficientnet_lite0").spec.name == "tf_efficientnet_lite0"


SMALL = NetworkSpec("shufflenet_v2_x0_5", head="none")


def test_a_model_is_found_without_tracing_all(tmp_path, monkeypatch):
    """Of a whole file, and of one that lacks a weight: both shufflenets have as many, and no other."""
    for name in [name for name in MODELS if name.startswith("tiny")]:
        monkeypatch.delitem(MODELS, name)
    tensors = as_saved(SMALL, variables_of(SMALL), "torchvision")
    detect._traced.cache_clear()
    save_file(tensors, tmp_path / "x.safetensors")
    assert read_network(tmp_path / "x.safetensors").spec.name == SMALL.name
    del tensors["conv5.0.weight"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"does not fit 'shufflenet_v2_x0_5', which is nearest: missing conv5\.0\.weight"
    ):
        read_network(tmp_path / "x.safetensors")
    assert detect._traced.cache_info().misses == 2


@pytest.mark.parametrize("model", ["alexnet", "resnet50w2"])
def test_weights_are_counted_of_models_that_no_program_has(model):
    found = shapes(NetworkSpec(model, head="none"), 224)
    assert (len(found), sum(len(shape) == 4 for shape in found.values())) == BACKBONE_WEIGHTS[model]
    assert BACKBONE_WEIGHTS.keys() == {name for name in MODELS if not name.startswith("tiny")}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("conv5.0.weight"), "missing conv5.0.weight"),
        (lambda t: t.update({"extra.weight": np.zeros(3, np.float32)}), "without a place extra.weight"),
        (
            lambda t: t.update({"conv1.1.bias": np.zeros(3, np.float32)}),
            r"of another shape conv1.1.bias \(float32\[3\], not \[24\]\)",
        ),
        (lambda t: t.update({"conv1.1.bias": np.zeros(24, np.int8)}), r"conv1.1.bias \(int8\[24\]"),
        (lambda t: t["conv5.1.bias"].fill(np.nan), "weights that are not finite: conv5.1.bias"),
        (lambda t: [t.pop(name) for name in list(t) if "stage4" in name], r"missing stage4.* and \d+ more"),
        (lambda t: [t.pop(name) for name in list(t) if "stage" in name], "none of the networks known here"),
    ],
)
def test_nothing_is_left_random_or_over(change, sentence, tmp_path, monkeypatch):
    keep_models(monkeypatch, "shufflenet_v2_x0_5", "resnet18")
    tensors = as_saved(SMALL, variables_of(SMALL), "torchvision")
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=sentence) as error:
        read_network(tmp_path / "x.safetensors", SMALL.name)
    assert "\n" not in str(error.value)


def test_a_head_of_another_kind_is_refused_and_the_backbone_alone_is_not(tmp_path):
    """DINO's ResNet-50, whole: two layers, batch norm, no weight norm (github.com/facebookresearch/dino/issues/189)."""
    spec = NetworkSpec("resnet18", head="none")
    backbone = as_saved(spec, variables_of(spec), "torchvision", "module.backbone.")
    sizes = {"mlp.0.weight": (24, 512), "mlp.0.bias": (24,), "mlp.3.weight": (8, 24), "mlp.3.bias": (8,)}
    sizes |= {f"mlp.1.{leaf}": (24,) for leaf in ("weight", "bias", "running_mean", "running_var")}
    sizes |= {"last_layer.weight": (40, 8)}
    head = {f"module.head.{name}": np.ones(size, np.float32) for name, size in sizes.items()}
    save_file(backbone | head, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"'resnet18'.*without a place module\.head\.last_layer\.weight, .*rest alone can"
    ):
        read_network(tmp_path / "x.safetensors", "resnet18")
    save_file(backbone, tmp_path / "x.safetensors")
    assert read_network(tmp_path / "x.safetensors", "resnet18").spec.head == "none"


def test_a_trained_norm_is_not_taken_for_one(tmp_path):
    spec = NetworkSpec("resnet18", head="dino", head_hidden=24, dim=16)
    tensors = as_saved(spec, variables_of(spec), "dino", "module.")
    for norm, whole in ((1.0, True), (3.0, False)):
        tensors["module.head.last_layer.weight_g"] = np.full((16, 1), norm, np.float32)
        save_file(tensors, tmp_path / "x.safetensors")
        if whole:
            assert read_network(tmp_path / "x.safetensors", "resnet18").spec.head == "dino"
        else:
            with pytest.raises(UserError, match=r"without a place module\.head\.last_layer\.weight_g"):
                read_network(tmp_path / "x.safetensors", "resnet18")


def test_a_config_of_the_hub_names_the_model_and_its_preprocessing(tmp_path):
    spec = NetworkSpec("tf_efficientnet_lite0", head="none")
    save_file(as_saved(spec, variables_of(spec), "timm"), tmp_path / "x.safetensors")
    pretrained = {"mean": [0.4] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 0.95}
    pretrained |= {"license": "MIT", "input_size": [3, 240, 240]}
    config = {"architecture": "tf_efficientnet_lite0", "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_network(tmp_path / "x.safetensors", "efficientnet_lite0")  # the same names and shapes
    entry = {"mean": (0.4,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear", "crop_fraction": 0.95}
    assert found.spec == dataclasses.replace(spec, dim=found.spec.dim, **entry)
    assert (found.image_size, found.about["license"]) == (240, "MIT")
    pretrained |= {"std": [0.25, 0, 0.25], "interpolation": "lanczos", "crop_pct": 1.5}  # what no network here takes
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_network(tmp_path / "x.safetensors")
    assert (found.spec.mean, found.spec.std) == ((0.4,) * 3, (0.5,) * 3)  # its layout's
    assert (found.spec.interpolation, found.spec.crop_fraction) == ("bicubic", 0.875)
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "resnetblur50"}))
    with pytest.raises(UserError, match="timm's 'resnetblur50', which is not known here"):
        read_network(tmp_path / "x.safetensors")


def test_half_precision_is_widened_exactly(tmp_path):
    variables = variables_of(SMALL)
    tensors = {name: array.astype(np.float16) for name, array in as_saved(SMALL, variables, "torchvision").items()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = flatten_dict(read_network(tmp_path / "x.safetensors", SMALL.name).variables)
    for place, array in flatten_dict(variables).items():
        assert found[place].dtype == np.float32
        np.testing.assert_array_equal(found[place], array.astype(np.float16))


IMPOSSIBLE = {"width": 1e300, "std": [0, 1, 1], "interpolation": "nearest", "crop_fraction": 2}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"spec": {"name": "nobody"}}', *IMPOSSIBLE])
def test_metadata_that_describe_nothing_are_one_sentence(text, tmp_path):
    path = tmp_path / "x.safetensors"
    write_network(path, SMALL, variables_of(SMALL), 224, {})
    if text in IMPOSSIBLE:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            record = json.loads(file.metadata()[METADATA])
        record["spec"][text] = IMPOSSIBLE[text]
        text = json.dumps(record)
    save_file(load_file(path), path, {METADATA: text})
    with pytest.raises(UserError, match=r"metadata of .*x\.safetensors describe no network"):
        read_network(path)


def test_dinov2_keeps_its_grid_and_a_class_position_finds_its_token(tmp_path):
    spec = NetworkSpec("vit_small_reg4_dinov2", head="none")
    variables = variables_of(spec, 70)  # 5 × 5 patches
    tensors = as_saved(spec, variables, "dinov2") | {"mask_token": np.zeros((1, 384), np.float32)}
    position = np.full((1, 1, 384), 0.25, np.float32)
    tensors["pos_embed"] = np.concatenate([position, tensors["pos_embed"]], axis=1)
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_network(tmp_path / "x.safetensors", spec.name)
    assert (found.layout, found.image_size) == ("dinov2", 70)
    variables["params"]["backbone"]["cls_token"] += position
    assert_equal(found.variables, variables)


def test_position_embeddings_are_interpolated_for_another_image_size(tmp_path):
    spec = NetworkSpec("tiny_vit", stem="small", head="none")
    variables = variables_of(spec, 16)
    write_network(tmp_path / "x.safetensors", spec, variables, 16, {})
    found = load_source(f"file:{tmp_path / 'x.safetensors'}")
    assert at_image_size(found, 16) is found
    larger = at_image_size(found, 24)
    assert larger.variables["params"]["backbone"]["pos_embed"].shape == (1, 1 + 36, 16)
    images = Images.whole(np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8))
    apply = jax.jit(pooled_features(spec, 24))  # the backbone interpolates by itself what it is given
    np.testing.assert_allclose(apply(larger.variables, images), apply(variables, images), rtol=1e-5, atol=1e-5)


def test_the_entry_resizes_as_the_file_says(tmp_path):
    """In a recipe; what is evaluated is cropped and resized by `preprocess`."""
    spec = NetworkSpec("tiny", width=0.125, stem="small_s2", head="none", interpolation="bicubic", resize=24)
    variables = variables_of(spec, 24)
    images = np.random.default_rng(0).random((2, 12, 12, 3), np.float32)
    resized = jax.image.resize(images, (2, 24, 24, 3), "bicubic").clip(0, 1)

    def pooled(spec, images):
        return Network(spec).apply(variables, images, norm="running", method="features").pooled

    expected = pooled(dataclasses.replace(spec, resize=0), resized)
    np.testing.assert_allclose(pooled(spec, images), expected, rtol=1e-6)
    assert not np.allclose(pooled(dataclasses.replace(spec, interpolation="bilinear"), images), expected, rtol=1e-3)


@pytest.fixture
def tiny_file(tmp_path):
    entry = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_fraction": 1.0}
    spec = NetworkSpec("tiny_bottleneck", width=0.25, stem="small", head="mlp", dim=8, **entry)
    write_network(tmp_path / "tiny.safetensors", spec, variables_of(spec, 28), 28, {})
    return tmp_path / "tiny.safetensors", spec


def test_a_frozen_teacher_comes_from_a_file_with_its_preprocessing(tiny_file, tmp_path):
    path, spec = tiny_file
    config = runs.config(epochs=0.25, **{"teacher.source": f"file:{path}"})
    run = runs.prepared(config, tmp_path / "run")
    teacher = run.recipe.specs["teacher"]
    assert (teacher.name, teacher.width, teacher.mean, teacher.std) == (spec.name, 0.25, spec.mean, spec.std)
    assert (teacher.interpolation, teacher.crop_fraction) == ("bicubic", 1.0)
    assert run.recipe.method.teacher == "frozen"
    identity = run.record["identity"]
    assert (identity["teacher.digest"], identity["teacher.mean"]) == (run.pretrained["teacher"].digest, [0.5] * 3)
    assert (identity["teacher.interpolation"], identity["teacher.crop_fraction"]) == ("bicubic", 1.0)
    assert_equal(jax.device_get(run.frozen()["teacher"]), read_network(path).variables)

    changes = {"teacher.source": f"file:{path}", "teacher.mean": (0.1, 0.2, 0.3), "teacher.resize": 36}
    changes |= {"teacher.interpolation": "bilinear"}
    teacher = runs.prepared(runs.config(**changes), tmp_path / "run").recipe.specs["teacher"]
    assert (teacher.mean, teacher.std, teacher.resize) == ((0.1, 0.2, 0.3), spec.std, 36)
    assert (teacher.interpolation, teacher.crop_fraction) == ("bilinear", 1.0)


def test_a_student_starts_from_a_file_and_its_missing_head_anew(tiny_file, tmp_path, capsys):
    path, spec = tiny_file
    write_network(path, spec, read_network(path).variables, 28, {}, "ssl_kd")
    bare = dataclasses.replace(spec, head="none", dim=0)
    backbone = {name: {"backbone": tree["backbone"]} for name, tree in read_network(path).variables.items()}
    write_network(path, bare, backbone, 28, {})
    changes = {"student.source": f"file:{path}", "teacher.source": f"file:{path}"}
    run = runs.prepared(runs.config(**changes), tmp_path / "run")
    shown = capsys.readouterr().out
    assert "student: its mlp head is not that of the weights, and starts anew" in shown
    assert "teacher: its" not in shown  # it is used without a head, as it is
    run = runs.prepared(runs.config(**{"student.source": f"file:{path}"}), tmp_path / "run")
    assert "student: its mlp head is not that of the weights, and starts anew" in capsys.readouterr().out
    state = jax.jit(run.create)()
    assert_equal(jax.device_get(state.trained["student"]["backbone"]), backbone["params"]["backbone"])
    assert state.trained["student"].keys() == {"backbone", "head"}
    assert jax.tree.map(np.shape, state.trained) == jax.tree.map(
        np.shape, jax.eval_shape(lambda: create_state(run.recipe)).trained
    )


@pytest.mark.parametrize(
    ("key", "value"), [("interpolation", "nearest"), ("crop_fraction", 0.0), ("crop_fraction", 1.1)]
)
def test_a_recipe_with_an_impossible_entry_is_one_sentence(key, value):
    with pytest.raises(UserError, match=rf"^student\.{key}={value!r} .*\.$"):
        make_recipe(runs.config(**{f"student.{key}": value}), 96)


def test_a_begun_run_needs_the_file_of_a_frozen_network_alone(tiny_file, tmp_path, capsys):
    path, spec = tiny_file
    student, teacher, workdir = tmp_path / "s.safetensors", tmp_path / "t.safetensors", tmp_path / "run"
    for copy in (student, teacher):
        shutil.copy(path, copy)
    sources = {"student.source": f"file:{student}", "teacher.source": f"file:{teacher}"}
    config = runs.config("seed", epochs=0.5, **sources)
    results = fit(runs.prepared(config, workdir))
    student.unlink()
    again = runs.prepared(config, workdir)
    assert again.recipe.specs["student"].name == spec.name
    assert fit(again) == results
    assert "This run is done" in capsys.readouterr().out
    (workdir / "results.json").unlink()
    resumed = fit(runs.prepared(config, workdir))
    assert resumed | {"seconds": 0} == results | {"seconds": 0}
    shown = capsys.readouterr().out
    assert "s.safetensors cannot be read; its weights are in the checkpoint" in shown and "Resuming at step 3" in shown

    with pytest.raises(UserError, match=r"^student\.source: there is no file"):
        runs.prepared(config, tmp_path / "another")
    moved = runs.config("seed", epochs=0.5, **sources | {"student.source": "file:elsewhere"})
    with pytest.raises(UserError, match=r"^student\.source: there is no file elsewhere"):
        runs.prepared(moved, workdir)
    with pytest.raises(UserError, match=r"student\.mean \(.* there, .* now\)"):
        fit(runs.prepared(runs.config("seed", epochs=0.5, **sources, **{"student.mean": (0.1,) * 3}), workdir))
    teacher.unlink()
    with pytest.raises(UserError, match=r"^teacher\.source, which a frozen network needs .*: there is no file"):
        runs.prepared(config, workdir)


def test_load_embeds_with_a_file(tiny_file):
    path, spec = tiny_file
    apply, params = load(f"file:{path}")
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    variables = read_network(path).variables

    def features(**other):
        embed = pooled_features(dataclasses.replace(spec, **other), 28)
        return jax.jit(lambda variables, images: embed(variables, Images.whole(images)))(variables, images)

    expected = features()
    np.testing.assert_array_equal(jax.jit(apply)(params, images), expected)
    for other in ({"crop_fraction": 0.7}, {"interpolation": "bilinear"}):  # the file's own are used
        assert not np.allclose(features(**other), expected, rtol=1e-2)


def test_a_launcher_probes_the_weights_of_a_file(tmp_path):
    spec = NetworkSpec("resnet18", width=0.125, stem="small_s2", head="none")
    write_network(tmp_path / "x.safetensors", spec, variables_of(spec, 28), 28, {})
    weights, data = f"--weights=file:{tmp_path / 'x.safetensors'}", ("--train=train[:256]", "--test=test[:100]")
    probed = runs.launch("evaluate", weights, *data, f"--json={tmp_path / 'x.json'}")
    assert probed.returncode == 0, probed.stderr
    figures = json.loads((tmp_path / "x.json").read_text())
    row = figures["resnet18"]
    assert {"knn10", "knn200", "linear", "effective_rank"} <= row.keys()


def test_a_launcher_takes_a_run_or_weights_of_others():
    assert network_source("runs/x", None) == "workdir:runs/x"
    assert network_source(None, "file:x.pth") == "file:x.pth"
    for both in ((None, None), ("runs/x", "file:x.pth"), ("", "")):
        with pytest.raises(UserError, match=r"give either --workdir=DIR, a run, or --weights=file:PATH"):
            network_source(*both)


def test_convert_records_the_origin_and_verify_holds_it_to_that(tiny_file, tmp_path, capsys):
    path, _ = tiny_file
    out = tmp_path / "converted.safetensors"
    convert(f"file:{path}", str(out), licence="MIT")
    verify(str(out))
    shown = capsys.readouterr().out
    assert read_network(out).digest in "".join(word for word in shown.split() if word != "│")
    assert "--config.teacher.source=file:" in shown and "Weights as written" in shown and "MIT" in shown
    from safetensors import safe_open

    with safe_open(out, "np") as file:
        metadata = file.metadata()
    about = json.loads(metadata[METADATA])["about"]
    assert (about["licence"], about["source"]) == ("MIT", f"file:{path}")
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = load_file(out)
    tensors["conv1.weight"] = tensors["conv1.weight"] + 1
    save_file(tensors, out, metadata)
    with pytest.raises(UserError, match="are not those that were written"):
        verify(str(out))


def test_export_writes_the_student_of_a_run(tmp_path, capsys):
    run = runs.prepared(runs.config(), tmp_path / "run")
    write_json(tmp_path / "run" / "run.json", run.record)
    with closing(Checkpoints(tmp_path / "run", 1)) as checkpoints:
        checkpoints.save(0, run.create_now())
    with pytest.raises(UserError, match=r"detectron2 has no model 'tiny': choose --names=ssl_kd"):
        export(f"workdir:{tmp_path / 'run'}", tmp_path / "x.safetensors", "detectron2")
    export(f"workdir:{tmp_path / 'run'}", tmp_path / "x.safetensors", "ssl_kd")
    apply, params = load(f"file:{tmp_path / 'x.safetensors'}")
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    original, weights = load(tmp_path / "run")
    np.testing.assert_array_equal(apply(params, images), original(weights, images))
    assert "written to" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is a file, which holds one network: choose no network and no step in it"):
        load(f"file:{tmp_path / 'x.safetensors'}", "teacher")


def test_a_digest_is_of_all_weights_whatever_holds_them(tmp_path):
    """So that convert's, a run's and that of a converted file can be compared."""
    spec = dataclasses.replace(SMALL, classes=7)
    variables, (first, second) = variables_of(spec), (tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    save_file(as_saved(spec, variables, "torchvision"), first)
    convert(f"file:{first}", str(second), SMALL.name)
    with_classifier = read_network(second, classifier=True)
    digests = {load_source(f"file:{path}", SMALL.name).digest for path in (first, second)}
    assert digests == {with_classifier.digest} == {array_digest(variables)} == {with_classifier.about["digest"]}
    assert load_source(f"file:{second}").spec.classes == 0 and with_classifier.spec.classes == 7


def test_the_list_counts_parameters_and_products(monkeypatch, capsys):
    keep_models(monkeypatch, "resnet18", "mobilenet_v2")
    show_models()
    shown = capsys.readouterr().out
    assert "11.18 M" in shown and "1.81" in shown  # without the classifier's .51 M
    assert "2.22 M" in shown and "0.30" in shown


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("file:nowhere.pth", "there is no file nowhere.pth"),
        ("nowhere.pth", "is no source of weights"),
        ("file:nowhere.pth#teacher", "there is no file nowhere.pth"),
        ("hf:timm", "names no file of the hub"),
        ("hf:timm/resnet18", "names no file of the hub"),
    ],
)
def test_a_wrong_source_is_one_sentence(source, sentence):
    with pytest.raises(UserError, match=sentence):
        inspect(source)


def test_the_hub_is_read_from_its_cache_and_missed_in_a_sentence(tmp_path):
    """A directory in the layout of huggingface_hub's cache stands in for the hub."""
    repository = tmp_path / "hub" / "models--someone--tiny"  # at one revision, which is main
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    spec = NetworkSpec("shufflenet_v2_x0_5", head="none")
    write_network(repository / "snapshots" / ("0" * 40) / "model.safetensors", spec, variables_of(spec), 224, {})
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    found = runs.launch("teacher", "inspect", "hf:someone/tiny/model.safetensors", **cache)
    assert found.returncode == 0 and "shufflenet_v2_x0_5" in found.stdout, found.stderr
    missed = runs.launch("teacher", "inspect", "hf:someone/other/model.safetensors", **cache)
    assert missed.returncode == 2 and missed.stderr.startswith("error: cannot get 'hf:someone/other/model.safetensors'")
    assert len(missed.stderr.splitlines()) == 1
