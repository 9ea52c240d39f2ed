"""Every config builds; every impossible one ends in one sentence that names the key."""

import importlib
from pathlib import Path

import jax
import pytest
from conftest import tiny_config

from ssl_kd.errors import UserError
from ssl_kd.methods import METHODS
from ssl_kd.models import Networks, init_network
from ssl_kd.recipe import FREE_KEYS, WEIGHT_SOURCES, flatten, identity, make_recipe
from ssl_kd.state import create_state

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base"))


def load(name, preset):
    return importlib.import_module(f"configs.{name}").get_config(preset)


@pytest.mark.parametrize("preset", ["", "smoke", "cifar10", "imagenet"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name, preset):
    config = load(name, preset)
    assert (config.name, config.preset) == (name, preset)
    recipe = make_recipe(config, 1_281_167)

    state = jax.eval_shape(lambda: create_state(recipe))
    assert set(state.trained) == set(recipe.method.trained)
    nets = Networks(recipe.specs)
    for role in recipe.method.trained:
        variables = {"params": state.trained, "batch_stats": state.batch_stats}
        images = jax.ShapeDtypeStruct((config.batch_size, config.image_size, config.image_size, 3), "float32")

        def embed(variables, images, role=role):
            apply = nets.apply(variables, images, method=lambda n, x: getattr(n, role).embed(x, norm="running"))
            return apply

        assert jax.eval_shape(embed, variables, images).shape == (config.batch_size, recipe.specs[role].dim)


def test_the_imagenet_preset_is_the_papers_setting():
    c = load("rekd_alexnet", "imagenet")
    assert (c.image_size, c.method.queue, c.epochs, c.batch_size) == (224, 65536, 200, 256)
    assert (c.data.source, c.student.width, c.teacher.name) == ("tfds:imagenet2012", 1.0, "resnet50")
    assert (c.method.prototypes, c.optim.lr, c.optim.weight_decay) == (3000, 0.03, 1e-4)


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
        assert set(config.method) - {"name"} == set(method.__dataclass_fields__)


BAD = [
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": 48}, "method.queue=40 is smaller than batch_size=48"),
    ({"batch_size": 128, "method.queue": 400}, "larger than the training set of 64"),
    ({"optim.accum": 3}, "not divisible by optim.accum=3"),
    ({"bn_groups": 3}, "bn_groups=3"),
    ({"image_size": 2}, "image_size=2 is smaller than"),
    ({"epochs": 0.0}, "epochs"),
    ({"optim.name": "adam"}, "optim.name='adam'"),
    ({"optim.decay": "none"}, "optim.decay='none'"),
    ({"optim.lr": -1.0}, "optim.lr"),
    ({"optim.weight_decay": -1.0}, "optim.weight_decay"),
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
    ({"epochs": float("inf")}, "epochs=inf"),
    ({"optim.warmup_epochs": float("nan")}, "optim.warmup_epochs"),
    ({"probe.knn": ()}, "probe.knn"),
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


def test_identity_leaves_out_exactly_the_free_keys():
    config = tiny_config("rekd")
    keys = set(flatten(config)) - set(identity(config))
    assert keys == {k for k in flatten(config) if any(f"{k}.".startswith(f"{f}.") for f in FREE_KEYS + WEIGHT_SOURCES)}
    assert {"log_every", "data.workers", "probe.linear", "student.source"} <= keys
    assert {"seed", "batch_size", "optim.lr", "method.miner", "data.train"}.isdisjoint(keys)


def test_a_network_is_initialised_whole_and_alone():
    config = tiny_config("rekd")
    spec = make_recipe(config, 64).specs["teacher"]
    variables = init_network(spec, jax.random.key(0), config.image_size)
    assert set(variables) == {"params", "batch_stats"}
    assert set(variables["params"]) == {"backbone", "head"}
