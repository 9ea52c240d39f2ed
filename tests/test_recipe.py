"""Every config builds; every impossible one ends in one sentence that names the key."""

import dataclasses
import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import VARIANTS, tiny_config
from ml_collections import ConfigDict

from configs import base
from ssl_kd.errors import UserError
from ssl_kd.methods import METHODS
from ssl_kd.models import Network, init_network
from ssl_kd.models.convolution import plain_convolutions
from ssl_kd.recipe import FREE_KEYS, WEIGHT_SOURCES, flatten, identity, make_recipe, short_side

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base"))


def load(name, preset):
    return importlib.import_module(f"configs.{name}").get_config(preset)


@functools.cache
def widths(spec, image_size):
    """Of what a network's heads make of images of this size, traced from its initialisation on."""

    def heads(network, images):
        features = network.features(images, norm="batch")
        outputs = [network.project(features, norm="batch")]
        return [*outputs, network.search(features)] if spec.thead else outputs

    images = jnp.zeros((spec.bn_groups, image_size, image_size, 3))
    with plain_convolutions():  # faster to trace
        outputs, _ = jax.eval_shape(lambda: Network(spec).init_with_output(jax.random.key(0), images, method=heads))
    return [output.shape[1] for output in outputs]


@pytest.mark.parametrize("preset", ["", "smoke", "cifar10", "imagenet"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name, preset):
    config = load(name, preset)
    assert (config.name, config.preset) == (name, preset)
    recipe = make_recipe(config, 1_281_167)
    assert set(recipe.specs) == {*recipe.method.trained, *recipe.method.frozen, *recipe.method.averaged}
    for spec in set(recipe.specs.values()) if preset in ("", "imagenet") else ():  # other presets: other sizes
        assert set(widths(spec, config.image_size)) == {spec.dim}


SGD = {"optim.name": "sgd", "optim.lr": 0.03, "optim.momentum": 0.9, "optim.weight_decay": 1e-4, "optim.decay": "all"}
MOCO = {
    **SGD,
    **{"data.source": "tfds:imagenet2012", "image_size": 224, "batch_size": 256, "epochs": 200.0, "bn_groups": 8},
    **{"optim.schedule": "cosine", "optim.warmup_epochs": 0.0, "optim.final_lr": 0.0},
    **{"method.queue": 65536, "method.momentum": 0.999, "method.temperature": 0.2, "student.dim": 128},
    **{"augment.crop_scale": [0.2, 1.0], "augment.jitter": 0.8, "augment.grayscale": 0.2, "augment.blur": 0.5},
}
VIT = {
    "lr": 3e-4,
    "final_lr": 1e-5,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "warmup_epochs": 10.0,
    "clip": 3.0,
}
PAPERS = {
    "moco_v2": MOCO,
    "rekd": {**MOCO, "teacher.name": "resnet50", "method.prototypes": 3000},
    "disco": {**MOCO, "student.head_hidden": 2048, "method.consistency": 32.0, "method.contrast": 1.0},
    "seed": {
        **SGD,
        "epochs": 200.0,
        "method.queue": 65536,
        "method.temperature": 0.2,
        "method.teacher_temperature": 0.01,
    },
    "compress": {
        **{**SGD, "optim.lr": 0.01, "optim.schedule": "stairs", "optim.factor": 0.2},
        **{"optim.milestones": [90 / 130, 120 / 130], "epochs": 130.0, "method.queue": 128_000},
        "method.temperature": 0.04,
    },
    "simreg": {**SGD, "optim.lr": 0.05, "epochs": 130.0, "student.head": "regression"},
    "bingo": {
        **{**{key: value for key, value in MOCO.items() if key != "method.momentum"}, "student.head_hidden": 2048},
        **{"method.neighbours": 5, "method.single_epochs": 11.0, "method.late_weight": 0.5, "method.cutmix_alpha": 2.0},
    },
    "ressl": {
        **{**SGD, "optim.lr": 0.05, "optim.warmup_epochs": 5.0, "optim.decay": "weights", "student.dim": 512},
        **{"method.queue": 131_072, "method.temperature": 0.1, "method.key_temperature": 0.04},
    },
    "mokd_resnet50_vit_small": {
        **{**SGD, "optim.lr": 0.1, "optim.final_lr": 0.0048, "optim.decay": "weights", "optim.warmup_epochs": 10.0},
        **{"optim.clip": 3.0, "optim.last_layer_epochs": 1.0, "epochs": 100.0, "batch_size": 256, "bn_groups": 1},
        **{f"optim.groups.teacher.{key}": value for key, value in VIT.items()},
        **{f"optim.groups.thead.{key}": value for key, value in VIT.items()},
        **{"optim.groups.teacher.name": "adamw", "optim.groups.teacher.decay": "weights", "teacher.drop_path": 0.1},
        **{"optim.groups.thead.name": "sgd", "optim.groups.thead.decay": "all", "student.thead": 384},
        **{"student.dim": 65536, "student.head_hidden": 0, "method.local_crops": 8, "method.local_size": 96},
        **{"method.global_scale": [0.25, 1.0], "method.local_scale": [0.05, 0.25], "method.augmentation": "dino"},
        **{"method.temperature": 0.1, "method.first_teacher_temperature": 0.04, "method.teacher_temperature": 0.07},
        **{"method.self_temperature_epochs": 50, "method.temperature_epochs": 30, "method.momentum": 0.996},
        **{"method.centre_momentum": 0.9, "method.student_cross": 1.0, "method.teacher_cross": 0.1},
    },
}
"""Start of recipes' names → what their papers set."""


@pytest.mark.parametrize(
    ("start", "name"), [(start, name) for start in PAPERS for name in RECIPES if name.startswith(start)]
)
def test_the_imagenet_preset_is_the_papers_setting(start, name):
    config = flatten(load(name, "imagenet"))
    assert {key: config[key] for key in PAPERS[start]} == PAPERS[start]
    assert config["student.width"] == 1.0 and config["preset"] == "imagenet"


def test_images_are_reduced_to_eight_sevenths_of_the_largest_view_unless_told():
    c = tiny_config("mokd")  # with crops smaller than its views
    c.image_size = 224
    assert short_side(c) == 256
    c.method.local_size = 280
    assert short_side(c) == 320
    c.data.canvas = 100
    assert short_side(c) == 100


def test_recipes_are_short():
    for name in RECIPES:
        assert len((ROOT / "configs" / f"{name}.py").read_text().splitlines()) <= 40, name


@pytest.mark.parametrize("method", ["disco", "seed"])
def test_embeddings_that_are_compared_must_be_of_equal_width(method):
    config = tiny_config(method)
    config.teacher.dim = 16
    with pytest.raises(UserError, match=r"student\.dim=8 and teacher\.dim=16: set them alike"):
        make_recipe(config, 64)


def test_every_method_key_of_a_config_is_a_field():
    for name, method in METHODS.items():
        config = tiny_config(name)
        assert set(config.method) - {"name"} == {field.name for field in dataclasses.fields(method)}


BAD = [
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 48}, "method.queue=40 is smaller than batch_size=48"),
    ({"batch_size": 128, "method.queue": 400}, "larger than the training set of 64"),
    ({"optim.accum": 3}, "not divisible by optim.accum=3"),
    ({"bn_groups": 3}, "bn_groups=3"),
    ({"image_size": 1}, "image_size=1 is smaller than"),
    ({"epochs": 0.0}, "epochs"),
    ({"optim.name": "adam"}, "optim.name='adam'"),
    ({"optim.decay": "none"}, "optim.decay='none'"),
    ({"optim.lr": -1.0}, "optim.lr"),
    ({"optim.weight_decay": -1.0}, "optim.weight_decay"),
    ({"optim.final_weight_decay": -1.0}, "optim.final_weight_decay=-1.0"),
    ({"optim.momentum": 1.0}, "optim.momentum=1.0"),
    ({"optim.final_lr": float("inf")}, "optim.final_lr=inf"),
    ({"optim.schedule": "linear"}, "optim.schedule='linear' is unknown: choose one of 'cosine', 'stairs'"),
    ({"optim.ramp": "fast"}, "optim.ramp='fast' is unknown: choose one of 'from_zero', 'through_peak', 'from_base'"),
    ({"optim.milestones": (0.5, 1.0)}, "optim.milestones=(0.5, 1.0) must be shares of the run, between 0 and 1"),
    ({"optim.milestones": (60, 80)}, "optim.milestones=(60, 80)"),
    ({"optim.milestones": ("half",)}, "optim.milestones=('half',)"),
    ({"optim.factor": 0.0}, "optim.factor=0.0"),
    ({"optim.clip": -3.0}, "optim.clip=-3.0"),
    ({"optim.clip": float("nan")}, "optim.clip=nan"),
    ({"optim.last_layer_epochs": -1.0}, "optim.last_layer_epochs=-1.0"),
    ({"optim.paths": ("head",)}, "paths of optim.groups or optim: no parameter lies under 'head'"),
    ({"optim.accum": 2, "bn_groups": 8}, "bn_groups=8 must split the 8 images of a micro-batch into equal groups of 2"),
    ({"bn_groups": 0}, "bn_groups=0"),
    ({"student.head": "projector"}, "student.head='projector' is unknown"),
    ({"student.drop_path": 0.1}, "student.drop_path=0.1 is stochastic depth, which student.name='tiny' has not"),
    ({"teacher.name": "tiny_vit", "teacher.stem": "small", "teacher.drop_path": 1.0}, "teacher.drop_path=1.0"),
    ({"student.drop_path": float("nan")}, "student.drop_path=nan"),
    ({"student.thead": 200}, "student.thead=200 does not split into 3 attention heads"),
    ({"student.width": 0.0}, "student.width=0.0"),
    ({"student.name": "vgg"}, "student.name='vgg'"),
    ({"student.stem": "huge"}, "student.stem='huge'"),
    ({"teacher.dim": 0}, "teacher.dim"),
    ({"compute_dtype": "float8"}, "compute_dtype='float8'"),
    ({"method.miner": "magic"}, "method.miner='magic'"),
    ({"method.teacher": "offline"}, "method.teacher='offline'"),
    ({"method.knowledge": "response", "method.teacher": "self"}, "method.knowledge"),
    ({"method.knowledge": "response", "teacher.dim": 16}, "student.dim=8 and teacher.dim=16"),
    ({"method.miner": "neighbour", "method.neighbours": 0}, "method.neighbours=0"),
    ({"augment.flip": 1.5}, "flip"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**63}, "seed=9223372036854775808 must be below"),
    ({"student.thead": 64}, "student.thead=64 is for method.name='mokd' alone"),
    ({"method.threshold": -1.0}, "method.threshold=-1.0"),
    ({"epochs": float("inf")}, "epochs=inf"),
    ({"optim.warmup_epochs": float("nan")}, "optim.warmup_epochs"),
    ({"probe.knn": ()}, "probe.knn"),
    ({"probe.knn": ("all",)}, "probe.knn=('all',)"),
    ({"data.resident": "yes"}, "data.resident='yes'"),
    ({"method.queue": 0}, "method.queue=0"),
    ({"method.temperature": 0.0}, "method.temperature=0.0"),
    ({"method.momentum": 2.0}, "method.momentum=2.0"),
    ({"method.name": "moco_v2"}, "method.name='moco_v2'"),
    ({"student.head_hidden": -5}, "student.head_hidden=-5"),
    ({"augment.crop_scale": (0.5,)}, "augment"),
    ({"augment.crop_scale": (0.0, 1.0)}, "crop_scale"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_values_end_in_one_sentence_that_names_the_key(changes, sentence):
    config = tiny_config("rekd")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        make_recipe(config, 64)
    assert sentence in str(error.value) and "\n" not in str(error.value)


BAD_OF = [
    ("mokd", {"student.name": "alexnet", "student.stem": "small"}, "student.name='alexnet' takes images of one size"),
    ("mokd", {"method.local_size": 3}, "crops of 3 px"),
    ("mokd", {"method.local_size": 7, "teacher.stem": "small_s2"}, "teacher.name='tiny_vit' with the small_s2 stem"),
    ("mokd", {"student.thead": 32}, "student.thead=32 and teacher.thead=16 must be equal and above 0"),
    ("mokd", {"student.thead": 0, "teacher.thead": 0}, "student.thead=0 and teacher.thead=0"),
    ("mokd", {"teacher.head": "mlp"}, "needs teacher.head='dino', not 'mlp'"),
    ("mokd", {"teacher.dim": 8}, "student.dim=24 and teacher.dim=8: set them alike"),
    ("mokd", {"method.local_crops": 0}, "method.local_crops=0"),
    ("mokd", {"method.local_size": 0}, "method.local_size=0"),
    ("mokd", {"method.global_scale": (0.0, 1.0)}, "(0, 1]"),
    ("mokd", {"method.local_scale": (0.3, 0.1)}, "(0, 1]"),
    ("mokd", {"method.local_scale": (0.3,)}, "method.local_scale=(0.3,) must hold 2 numbers"),
    ("mokd", {"method.local_scale": ("a", "b")}, "method.local_scale=('a', 'b') must hold 2 numbers"),
    ("mokd", {"method.temperature_epochs": 0}, "method.temperature_epochs=0"),
    ("mokd", {"method.teacher": "none"}, "no parameter lies under 'teacher'"),
    ("mokd", {"optim.groups.teacher.clip": -1.0}, "optim.groups.teacher.clip=-1.0"),
    ("mokd", {"optim.groups.teacher.ramp": "fast"}, "optim.groups.teacher.ramp='fast'"),
    ("mokd-alone", {"method.teacher": "online"}, "needs a teacher, and this recipe has none"),
    ("simreg", {"student.dim": 8}, "set student.dim=0"),
    ("simreg", {"teacher.drop_path": 0.1}, "teacher.drop_path=0.1"),
    ("compress-1q", {"student.dim": 8}, "student.head='linear' and student.dim=0"),
    ("compress", {"method.queues": 1}, "student.head='linear' and student.dim=0"),
    ("bingo", {"method.neighbours": 64}, "method.neighbours=64 must be between 1 and 63"),
    ("bingo", {"method.neighbours": 0}, "method.neighbours=0"),
    ("seed", {"teacher.dim": 0}, "teacher.dim=0 takes the feature width of the teacher's teacher"),
]


@pytest.mark.parametrize(("variant", "changes", "sentence"), BAD_OF, ids=[f"{v}-{c}" for v, c, _ in BAD_OF])
def test_bad_values_of_other_methods_end_in_one_sentence_too(variant, changes, sentence):
    method, fields = VARIANTS[variant]
    config = tiny_config(method, **fields)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        make_recipe(config, 64)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_student_without_a_teacher_has_its_own_width():
    config = tiny_config("moco_v2")
    del config.teacher
    make_recipe(config, 64)
    config.student.dim = 0
    with pytest.raises(UserError, match=r"student\.dim=0 takes .* teacher, which it does not have: set a width"):
        make_recipe(config, 64)


GROUPS = [
    (3, "optim.groups.x is not an optimizer"),
    (ConfigDict({"lr": 0.1, "paths": ("student",)}), "optim.groups.x is not an optimizer"),
    (base.optimizer(), "optim.groups.x.paths is empty"),
    (base.optimizer(paths=("student/haed",)), "no parameter lies under 'student/haed'"),
    (base.optimizer(paths=("teacher",)), "no parameter lies under 'teacher'"),  # it is frozen
    (base.optimizer(paths=("student", "student")), "'student' is given twice"),
    (base.optimizer(paths=("student",), lr=0.0), "optim.groups.x.lr=0.0"),
    (base.optimizer(paths=("student",), final_weight_decay=-1.0), "optim.groups.x.final_weight_decay=-1.0"),
]


@pytest.mark.parametrize(("group", "sentence"), GROUPS, ids=[sentence for _, sentence in GROUPS])
def test_a_bad_group_ends_in_one_sentence(group, sentence):
    config = tiny_config("seed")
    config.optim.groups.x = group
    with pytest.raises(UserError) as error:
        make_recipe(config, 64)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_out_of_a_run_makes_the_same_recipe(variant):
    """JSON has lists where a recipe has tuples, and no placeholders."""
    method, fields = VARIANTS[variant]
    config = tiny_config(method, **fields)
    read = ConfigDict(json.loads(json.dumps(config.to_dict())), convert_dict=True)
    ours, theirs = make_recipe(config, 64), make_recipe(read, 64)
    assert identity(read) == identity(config)
    assert (ours.method, ours.specs, ours.augmentations) == (theirs.method, theirs.specs, theirs.augmentations)
    assert ours.method.views == theirs.method.views
    assert [hash(theirs.augmentation(view)) for view in theirs.method.views.values()]


def test_identity_leaves_out_exactly_the_free_keys():
    config = tiny_config("rekd")
    keys = set(flatten(config)) - set(identity(config))
    assert keys == {k for k in flatten(config) if any(f"{k}.".startswith(f"{f}.") for f in FREE_KEYS + WEIGHT_SOURCES)}
    assert {"log_every", "data.workers", "probe.linear", "student.source"} <= keys
    assert {"seed", "batch_size", "optim.lr", "method.miner", "data.train"}.isdisjoint(keys)


def test_a_network_is_initialised_whole_and_alone():
    config = tiny_config("rekd")
    spec = make_recipe(config, 64).specs["teacher"]
    variables = jax.eval_shape(lambda: init_network(spec, jax.random.key(0), config.image_size))
    assert set(variables) == {"params", "batch_stats"}
    assert set(variables["params"]) == {"backbone", "head"}
