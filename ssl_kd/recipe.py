"""From a config to the objects of a run: checks first, then method, networks, optimizer and step constants."""

import dataclasses
import hashlib
import json
import math
import typing
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ssl_kd.augment import PRESETS, Augmentation
from ssl_kd.data.bags import require_neighbours
from ssl_kd.data.sources import SHORT_OVER_VIEW
from ssl_kd.errors import UserError
from ssl_kd.images import INTERPOLATIONS
from ssl_kd.mesh import Sharding
from ssl_kd.methods import METHODS, Method, View
from ssl_kd.models import HEADS, IMAGENET_MEAN, IMAGENET_STD, MODELS, NetworkSpec, init_network
from ssl_kd.optim import Group, Ramp, make_optimizer, warmup_cosine, warmup_stairs

FREE_KEYS = (
    "name",
    "preset",
    "log_every",
    "checkpoint",
    "probe",
    "data.test",
    "data.resident",
    "data.workers",
    "data.max_bad",
    "max_nonfinite",
    "sharding",
    "method.bag_path",
    "student.cache_path",
    "teacher.cache_path",
)
"""Keys that change no number of the training run: a checkpoint may be resumed with other values."""

WEIGHT_SOURCES = ("student.source", "teacher.source")
"""Where weights lie is free as well; their digest is not."""

SMALL_IMAGE = 64
"""Images up to this side, pixels, take a network's small stem when `stem` is 'auto'."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A config made into objects; everything but the images and the state.

    Attributes:
      specs: architecture of every network, averaged ones included.
      rate: learning rate of a step, of the parameters in no group of their own.
      augmentations: views' presets by name.
      seed: of all random streams.
      image_size: side of every view, pixels.
      steps_per_epoch, total_steps: lengths of an epoch and of the run.
      accum: micro-batches an optimizer step is split into.
      shuffled_groups: batch-norm groups of a micro-batch over which views that ask for it are shuffled; 1 = not at all.
      max_nonfinite: refused steps tolerated before the state halts; see `ssl_kd.step.TrainStep`.
      sharding: how the state and the frozen networks lie on the devices.
      cache_views: fixed views of every image that the frozen teacher sees, epoch by epoch; 0 = new ones every time.
    """

    method: Method
    specs: Mapping[str, NetworkSpec]
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    augmentations: Mapping[str, Augmentation]
    seed: int
    image_size: int
    steps_per_epoch: int
    total_steps: int
    accum: int
    shuffled_groups: int
    max_nonfinite: int
    sharding: Sharding
    cache_views: int

    def initial(self, name: str) -> dict[str, Any]:
        """Variables of a network from its own initialisers: a function of the seed and its name."""
        return init_network(self.specs[name], stream(self.seed, f"init/{name}"), self.image_size)

    def augmentation(self, view: View) -> Augmentation:
        """What may happen to an image of a view."""
        preset = self.augmentations[view.preset]
        return preset if view.scale is None else dataclasses.replace(preset, crop_scale=view.scale)


def stream(seed: int, name: str, step: jax.Array | int = 0) -> jax.Array:
    """The key of a named random stream at a step: a function of its arguments alone, the same in every process."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())), step)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{'optim.lr': 0.03, …} with JSON-able values."""
    plain = json.loads(config.to_json_best_effort())

    def walk(prefix: str, value: Any):
        if isinstance(value, dict):
            for key in sorted(value):
                yield from walk(f"{prefix}{key}.", value[key])
        else:
            yield prefix[:-1], value

    return dict(walk("", plain))


def identity(config: ConfigDict) -> dict[str, Any]:
    """The keys that change the mathematics of the training run."""
    free = tuple(f"{key}." for key in FREE_KEYS + WEIGHT_SOURCES)
    return {key: value for key, value in flatten(config).items() if not f"{key}.".startswith(free)}


def digest(values: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name a set of key-value pairs."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def network_spec(config: ConfigDict, role: str) -> NetworkSpec:
    """The architecture of `config.<role>`. Raises UserError for the first impossible value."""
    if role not in config:
        raise UserError(f"the method as it is set needs a {role}, and this recipe has none: choose a recipe with one.")
    c = config[role]
    one_of(f"{role}.name", c.name, MODELS)
    one_of(f"{role}.head", c.head, ("none", *HEADS))
    one_of("compute_dtype", config.compute_dtype, ("float32", "bfloat16"))
    positive(config, f"{role}.width", "image_size")
    not_negative(config, *(f"{role}.{key}" for key in ("dim", "head_hidden", "thead", "resize", "cache_views")))
    mean, std = tuple(c.mean or IMAGENET_MEAN), tuple(c.std or IMAGENET_STD)
    if len(mean) != 3 or len(std) != 3 or not all(x > 0 for x in std):
        raise UserError(f"{role}.mean and {role}.std must hold three numbers, of std above 0: see configs/base.py.")
    interpolation = c.interpolation or NetworkSpec.interpolation
    one_of(f"{role}.interpolation", interpolation, INTERPOLATIONS)
    crop_fraction = NetworkSpec.crop_fraction if c.crop_fraction is None else c.crop_fraction
    if not 0 < crop_fraction <= 1:
        raise UserError(f"{role}.crop_fraction={crop_fraction} must be above 0 and at most 1, the whole image.")
    if not 0 <= c.drop_path < 1:
        raise UserError(f"{role}.drop_path={c.drop_path} must be a probability below 1.")
    image_size = c.resize or config.image_size
    stem = ("small" if image_size <= SMALL_IMAGE else "imagenet") if c.stem == "auto" else c.stem
    spec = NetworkSpec(
        name=c.name,
        width=c.width,
        stem=stem,
        head=c.head,
        head_hidden=c.head_hidden,
        dim=c.dim,
        thead=c.thead,
        drop_path=c.drop_path,
        mean=mean,
        std=std,
        resize=c.resize,
        interpolation=interpolation,
        crop_fraction=crop_fraction,
        bn_groups=config.bn_groups,
        remat=config.remat,
        dtype=jnp.dtype(config.compute_dtype),
    )
    if spec.thead % spec.thead_heads:
        raise UserError(
            f"{role}.thead={c.thead} does not split into {spec.thead_heads} attention heads: use a multiple of 64."
        )
    backbone = dataclasses.replace(spec, drop_path=0.0).backbone()  # not every backbone takes a drop_path
    if c.drop_path and not backbone.stochastic_depth:
        raise UserError(
            f"{role}.drop_path={c.drop_path} is stochastic depth, which {role}.name={c.name!r} has not: set it to 0."
        )
    try:
        least = backbone.min_size
    except UserError as error:
        raise UserError(f"{role}.{error}") from error
    if image_size < least:
        key = f"{role}.resize" if c.resize else "image_size"
        raise UserError(
            f"{key}={image_size} is smaller than {role}.name={c.name!r} with the {stem} stem takes: use {least} or "
            f"more, {role}.resize={least}, or, without weights, a smaller stem."
        )
    if spec.head == "none":
        return dataclasses.replace(spec, dim=spec.feature_dim)
    if spec.dim == 0:
        if role == "teacher" or "teacher" not in config:
            raise UserError(
                f"{role}.dim=0 takes the feature width of the {role}'s teacher, which it does not have: set a width."
            )
        return dataclasses.replace(spec, dim=network_spec(config, "teacher").feature_dim)
    return spec


def optimizer_group(config: ConfigDict, key: str, steps_per_epoch: int, total_steps: int) -> Group:
    """The optimizer at `key` of the config. Raises UserError for the first impossible value."""
    c = config
    for name in key.split("."):
        c = c[name]
    if not isinstance(c, ConfigDict) or not set(config.optim) - {"accum", "groups"} <= set(c):
        raise UserError(f"{key} is not an optimizer: give it `optimizer(…)` of configs/base.py.")
    if key != "optim" and not c.paths:
        raise UserError(f"{key}.paths is empty: name the parameters it takes, as ('teacher',) or ('student/thead',).")
    positive(config, f"{key}.lr", f"{key}.factor")
    not_negative(config, *(f"{key}.{name}" for name in ("weight_decay", "warmup_epochs", "final_lr")))
    not_negative(config, f"{key}.clip", f"{key}.last_layer_epochs")
    if c.final_weight_decay is not None:
        not_negative(config, f"{key}.final_weight_decay")
    if not 0 <= c.momentum < 1:
        raise UserError(f"{key}.momentum={c.momentum} must be 0 or more, and below 1.")
    one_of(f"{key}.name", c.name, ("sgd", "adamw"))
    one_of(f"{key}.decay", c.decay, ("all", "weights"))
    one_of(f"{key}.schedule", c.schedule, ("cosine", "stairs"))
    one_of(f"{key}.ramp", c.ramp, typing.get_args(Ramp))
    if not all(isinstance(milestone, float) and 0 < milestone < 1 for milestone in c.milestones):
        raise UserError(f"{key}.milestones={tuple(c.milestones)} must be shares of the run, between 0 and 1.")
    peak, warmup = c.lr * config.batch_size / 256, round(c.warmup_epochs * steps_per_epoch)
    if c.schedule == "cosine":
        rate = warmup_cosine(peak, total_steps, warmup, c.final_lr, c.ramp, base=c.lr)
    else:
        rate = warmup_stairs(peak, total_steps, warmup, c.milestones, c.factor)
    final_decay = c.weight_decay if c.final_weight_decay is None else c.final_weight_decay
    return Group(
        paths=tuple(c.paths),
        name=c.name,
        rate=rate,
        weight_decay=warmup_cosine(c.weight_decay, total_steps, 0, final_decay),
        decay=c.decay,
        momentum=c.momentum,
        clip=c.clip,
        last_layer_steps=round(c.last_layer_epochs * steps_per_epoch),
    )


def make_method(config: ConfigDict) -> Method:
    """The method's dataclass from `config.method`. Raises UserError on unknown names, wrong types and values."""
    fields = dict(config.method)
    name = fields.pop("name")
    one_of("method.name", name, METHODS)
    if set(fields) != {field.name for field in dataclasses.fields(METHODS[name])}:
        raise UserError(
            f"method.name={name!r} does not fit the other method keys of this recipe: choose its own recipe."
        )
    hints = typing.get_type_hints(METHODS[name])
    for key, value in fields.items():
        kind, allowed = typing.get_origin(hints[key]), typing.get_args(hints[key])
        if kind is Literal:
            one_of(f"method.{key}", value, allowed)
        if kind is tuple:
            fields[key] = tuple(value)  # a list, where the config was read from a run.json
            if len(value) != len(allowed) or not all(isinstance(x, int | float) for x in value):
                raise UserError(f"method.{key}={fields[key]} must hold {len(allowed)} numbers.")
    try:
        return METHODS[name](**fields)
    except ValueError as error:
        raise UserError(f"{error}.") from error


def make_recipe(config: ConfigDict, images: int) -> Recipe:
    """Checks a config whole and builds its objects.

    Args:
      images: size of the training set; an epoch is its whole batches.

    Raises:
      UserError: for the first impossible value or combination.
    """
    check_run(config)
    method = make_method(config)
    check_batch(config, method, images)
    specs = network_specs(config, method)
    per_epoch = images // config.batch_size
    total = max(1, round(config.epochs * per_epoch))
    keys = ("optim", *(f"optim.groups.{name}" for name in config.optim.groups))
    groups = [optimizer_group(config, key, per_epoch, total) for key in keys]
    try:
        lists = {key: tuple(value) for key, value in config.augment.items() if isinstance(value, list)}  # of a run.json
        default = Augmentation(**{**config.augment, **lists})
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"augment: {error}; configs/base.py and ssl_kd/augment.py say what its keys hold.") from error
    recipe = Recipe(
        method=method,
        specs=specs,
        optimizer=make_optimizer(groups),
        rate=groups[0].rate,
        augmentations={**PRESETS, "default": default},
        seed=config.seed,
        image_size=config.image_size,
        steps_per_epoch=per_epoch,
        total_steps=total,
        accum=config.optim.accum,
        shuffled_groups=config.bn_groups,
        max_nonfinite=config.max_nonfinite,
        sharding=config.sharding,
        cache_views=config.teacher.cache_views if "teacher" in method.frozen else 0,
    )
    check_views(recipe)
    if any(group.paths for group in groups):
        try:
            jax.eval_shape(lambda: recipe.optimizer.init({n: recipe.initial(n)["params"] for n in method.trained}))
        except ValueError as error:
            raise UserError(
                f"paths of optim.groups or optim: {error}; 'student/head' is a path, for example."
            ) from error
    return recipe


def check_run(config: ConfigDict) -> None:
    """Raises UserError for a value that no method and no data set could take."""
    positive(config, "batch_size", "epochs", "bn_groups", "log_every", "optim.accum", "checkpoint.every_epochs")
    positive(config, "checkpoint.keep", "probe.batch_size", "probe.knn_bank", "probe.train_images")
    not_negative(config, "seed", "data.workers", "max_nonfinite", "probe.every_epochs")
    not_negative(config, "probe.min_feature_std", "probe.min_effective_rank")
    if config.seed >= 2**63:
        raise UserError(f"seed={config.seed} must be below 2**63.")
    one_of("data.resident", config.data.resident, ("auto", "on", "off"))
    one_of("sharding", config.sharding, typing.get_args(Sharding))
    if not config.probe.knn or not all(isinstance(k, int) and k > 0 for k in config.probe.knn):
        raise UserError(f"probe.knn={config.probe.knn} must name at least one k, whole numbers of 1 or more.")


def check_batch(config: ConfigDict, method: Method, images: int) -> None:
    """Raises UserError for a batch that does not split, or that the memory or the set of `images` is too small for."""
    b = config.batch_size
    micro, rest = divmod(b, config.optim.accum)
    if rest:
        raise UserError(f"batch_size={b} is not divisible by optim.accum={config.optim.accum}.")
    if micro % config.bn_groups or micro // config.bn_groups < 2:
        raise UserError(
            f"bn_groups={config.bn_groups} must split the {micro} images of a micro-batch into equal groups of 2 or "
            f"more: change it, batch_size={b} or optim.accum={config.optim.accum}."
        )
    if 0 < method.queue < b:
        raise UserError(f"method.queue={method.queue} is smaller than batch_size={b}: the queue must hold a batch.")
    if images < b:
        raise UserError(f"batch_size={b} is larger than the training set of {images} images: lower it.")
    if any(view.source == "mate" for view in method.views.values()):
        require_neighbours(config.method.neighbours, images)


def network_specs(config: ConfigDict, method: Method) -> dict[str, NetworkSpec]:
    """Every network that the method names. Raises UserError where they do not fit the method or each other."""
    specs = {name: network_spec(config, name) for name in (*method.trained, *method.frozen)}
    for role, spec in specs.items() if config.method.name != "mokd" else ():
        for key in ("thead", "drop_path"):
            if role in method.trained and getattr(spec, key):
                raise UserError(f"{role}.{key}={getattr(spec, key)} is for method.name='mokd' alone: set it to 0.")
    for role in ("student", "teacher"):
        if role not in method.frozen and config.get(role, {}).get("cache_views"):
            raise UserError(f"{role}.cache_views={config[role].cache_views} is for a frozen teacher: set it to 0.")
    specs |= {name: specs[source] for name, (source, _) in method.averaged.items()}
    try:
        jax.eval_shape(lambda: method.init(jax.random.key(0), specs))
    except ValueError as error:
        raise UserError(f"{error}.") from error
    return specs


def check_views(recipe: Recipe) -> None:
    """Raises UserError for a crop that a network cannot take, or that cannot be cut."""
    method = recipe.method
    for crop, view in method.views.items():
        try:
            recipe.augmentation(view)
        except UserError as error:
            raise UserError(f"the view {crop!r} of this method: {error}") from error
        for name in (n for n in (*method.trained, *method.frozen) if view.size and not recipe.specs[n].resize):
            backbone = recipe.specs[name].backbone()
            if backbone.fixed_size and view.size != recipe.image_size:
                raise UserError(
                    f"{name}.name={recipe.specs[name].name!r} takes images of one size only, but this method gives it "
                    f"crops of {view.size} and {recipe.image_size} px: choose another network."
                )
            if view.size < backbone.min_size:
                raise UserError(
                    f"crops of {view.size} px, the view {crop!r} of this method, are smaller than "
                    f"{name}.name={recipe.specs[name].name!r} with the {recipe.specs[name].stem} stem takes: use "
                    f"{backbone.min_size} px or more."
                )


def short_side(config: ConfigDict) -> int:
    """Pixels that are enough for an image's shorter side, on the host: `data.canvas`, else 8/7 of the largest view."""
    largest = max(view.size or config.image_size for view in make_method(config).views.values())
    return config.data.canvas or round(SHORT_OVER_VIEW * largest)


def one_of(key: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise UserError(f"{key}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}.")


def positive(config: ConfigDict, *keys: str) -> None:
    values = flatten(config)
    for key in keys:
        if not 0 < values[key] < math.inf:
            raise UserError(f"{key}={values[key]} must be above 0 and finite.")


def not_negative(config: ConfigDict, *keys: str) -> None:
    values = flatten(config)
    for key in keys:
        if not 0 <= values[key] < math.inf:
            raise UserError(f"{key}={values[key]} must be 0 or more, and finite.")
