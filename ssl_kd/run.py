"""A run before it starts: a recipe with its data, devices and given weights, checked whole."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ssl_kd.checkpoint import Checkpoints, array_digest
from ssl_kd.data.bags import load_or_mine
from ssl_kd.data.cache import FEATURE_DTYPE, FeatureCache
from ssl_kd.data.loader import Loader
from ssl_kd.data.resident import Residence, Resident, decide_resident
from ssl_kd.data.sources import Source, open_source
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.log import console
from ssl_kd.mesh import REPLICATED, SHARDED, layout, make_mesh, once, own_rows, place, spread
from ssl_kd.models import MODELS, Network, NetworkSpec, features_of_views
from ssl_kd.models.embed import pooled_features
from ssl_kd.probes.features import extract
from ssl_kd.probes.judge import labelled
from ssl_kd.recipe import Recipe, flatten, identity, make_method, make_recipe, one_of, short_side
from ssl_kd.state import State, create_state
from ssl_kd.step import TrainStep
from ssl_kd.trained import BACKBONE, ENTRY, FROM_WORKDIR, HEAD, TrainedNetwork, at_image_size, load_source
from ssl_kd.weights.files import FROM_FILE, FROM_HUB
from ssl_kd.workdir import is_local, read_json

SAMPLED = 16
"""Images by which a set is told from another: `fingerprint`."""


@dataclasses.dataclass
class Run:
    """A checked recipe with its data and devices, ready to be described or trained.

    Attributes:
      pretrained: networks that were read from a source, by role.
      recalled: digests of weights that trained networks started from, where a begun run goes on without their source.
    """

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    recipe: Recipe
    train: Source
    test: Source
    pretrained: Mapping[str, TrainedNetwork]
    recalled: Mapping[str, str]

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, REPLICATED)

    @property
    def record(self) -> dict[str, Any]:
        """What makes this run this run; written to run.json."""
        digests = {**self.recalled, **{role: network.digest for role, network in self.pretrained.items()}}
        weights = {f"{role}.digest": digest for role, digest in digests.items()}
        return {
            "config": self.config.to_dict(),
            "identity": identity(self.config) | {"images": len(self.train)} | weights,
            "images": len(self.train),
        }

    def laid_out(self, tree: Any) -> Any:
        """Where the leaves of a state, or of a frozen network, lie."""
        return layout(tree, self.mesh, self.recipe.sharding)

    @functools.cached_property
    def abstract(self) -> State:
        """Shapes, dtypes and shardings of the state; nothing is computed."""
        shapes = jax.eval_shape(self.create)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, self.laid_out(shapes)
        )

    def create(self) -> State:
        """The state of step 0. Traceable."""
        return create_state(self.recipe, self.started)

    @property
    def started(self) -> dict[str, Any]:
        """On the host, variables of the trained networks that do not start at random."""
        trained = self.recipe.method.trained
        return jax.device_get({role: self.pretrained[role].variables for role in trained if role in self.pretrained})

    def create_now(self) -> State:
        """`create` on the mesh."""
        create = jax.jit(
            functools.partial(create_state, self.recipe),
            out_shardings=self.laid_out(self.abstract),
            compiler_options=once(),
        )
        return create(self.started)

    def frozen(self) -> dict[str, Any]:
        """Variables of the networks that no step writes, on the mesh."""
        variables = {name: self.pretrained[name].variables for name in self.recipe.method.frozen}
        return spread(variables, self.laid_out(variables))

    def train_step(self):
        return TrainStep(self.recipe, self.mesh).jit()

    @functools.cached_property
    def resident(self) -> Residence:
        """Decided once, and said: what is free on the device changes when the data is there."""
        resident, why = decide_resident(self.config.data.resident, self.train.nbytes, self.mesh.size)
        console.print(why)
        return resident

    @property
    def bag_size(self) -> int:
        """Nearest others that every image needs for its mates; 0 where the method has no mates."""
        has_mates = any(view.source == "mate" for view in self.recipe.method.views.values())
        return self.config.method.neighbours if has_mates else 0

    def bags(self) -> np.ndarray:
        """Every image's nearest others in the teacher's features, mined once: int32 (images, bag_size).

        Raises:
          UserError: for a file of other bags, or one that cannot be written.
        """
        if not self.bag_size:
            return np.zeros((len(self.train), 0), np.int32)
        c, teacher = self.config, self.pretrained["teacher"]

        def features() -> np.ndarray:
            console.print("Mining bags: the teacher embeds every image, each finds its nearest others …")
            spec = dataclasses.replace(self.recipe.specs["teacher"], dtype=jnp.float32)
            apply = Partial(pooled_features(spec, c.image_size), teacher.variables)
            return extract(apply, labelled(self.train).images, batch_size=c.probe.batch_size, mesh=self.mesh)

        return load_or_mine(
            Path(c.method.bag_path) if c.method.bag_path else self.workdir / "bags.npz",
            features,
            images=len(self.train),
            neighbours=self.bag_size,
            data=self.seen_by_the_teacher,
            teacher=teacher.digest,
            progress=lambda done, total: console.print(f"mining: {done:,} of {total:,} images"),
        )

    @property
    def seen_by_the_teacher(self) -> str:
        """One line that says which images a frozen teacher sees, as `fingerprint` does, and how."""
        c = self.config
        entry = ", ".join(str(c.teacher[key]) for key in ENTRY)
        return f"images {fingerprint(self.train)}, image_size {c.image_size}, teacher's entry {entry}"

    @functools.cached_property
    def cached_views(self) -> tuple[str, ...]:
        """The views whose features the frozen teacher computes once; none without `teacher.cache_views`.

        Raises:
          UserError: for a method that shows its teacher what is no fixed view of an image.
        """
        if not self.recipe.cache_views:
            return ()
        step, looks = TrainStep(self.recipe, self.mesh), list[tuple[str | None, str]]()

        def loss(state: State, frozen, images: Images) -> jax.Array:
            rows = jnp.arange(self.config.batch_size, dtype=jnp.int32)
            batch = {"index": rows, "label": rows, "image": images, "mate": images}
            views = step.views(state.step, batch, rows)
            with features_of_views("teacher", views) as found:
                value, _ = step.loss(state.trained, state, frozen, views, step.context(state, batch, 0))
            looks.extend(found)
            return value

        pixels = jax.ShapeDtypeStruct((self.config.batch_size, *self.train.canvas, 3), np.uint8)
        images = Images(pixels, jax.ShapeDtypeStruct((self.config.batch_size, 2), np.int32))
        jax.eval_shape(loss, jax.eval_shape(self.create), self.frozen(), images)
        views = self.recipe.method.views
        if any(name is None or views[name].source == "mate" or norm != "running" for name, norm in looks):
            raise UserError(
                f"teacher.cache_views={self.recipe.cache_views} keeps what the teacher makes of single images, but "
                f"method.name={self.config.method.name!r} as it is set shows it mixtures, mates or whole batches: set "
                "it to 0."
            )
        return tuple(dict.fromkeys(name for name, _ in looks if name is not None))

    def cache(self) -> FeatureCache | None:
        """The frozen teacher's features of fixed views, computed where they are not on disk yet.

        Raises:
          UserError: for a directory of other features, or one that cannot be written.
        """
        if not self.cached_views:
            return None
        c, r = self.config, self.recipe
        variables = spread(self.pretrained["teacher"].variables, self.replicated)
        step, network = TrainStep(r, self.mesh), Network(r.specs["teacher"])
        batch_size = c.probe.batch_size + -c.probe.batch_size % self.mesh.size
        mine = own_rows(batch_size, self.mesh)

        @functools.partial(jax.jit, out_shardings=self.replicated)
        def look(variables, batch, number):
            views = step.views(number * r.steps_per_epoch, batch, batch["index"])
            see = functools.partial(network.apply, variables, norm="running", method="features")
            return {name: see(views[name]).pooled for name in self.cached_views}

        def compute(index: np.ndarray, number: int) -> dict[str, jax.Array]:
            batch = {"image": self.train[index[mine]], "index": index[mine]}
            return look(variables, place(batch, self.mesh, SHARDED), number)

        shown = {name: r.method.views[name] for name in self.cached_views}
        identity = {
            "data": self.seen_by_the_teacher,
            "teacher": self.pretrained["teacher"].digest,
            "seed": c.seed,
            "dtype": c.compute_dtype,
            "augment": {name: [view.size, dataclasses.asdict(r.augmentation(view))] for name, view in shown.items()},
        }
        directory = Path(c.teacher.cache_path) if c.teacher.cache_path else self.workdir / "teacher"
        width = r.specs["teacher"].feature_dim
        cache = FeatureCache(directory, self.cached_views, r.cache_views, len(self.train), width)
        cache.fill(compute, identity, batch_size)
        return cache

    def loader(self, bags: np.ndarray, cache: FeatureCache | None = None) -> Loader:
        """The batches of the training set, with mates out of bags as `bags` gives them, and features of a cache."""
        c = self.config
        return Loader(
            self.train,
            batch_size=c.batch_size,
            seed=c.seed,
            mesh=self.mesh,
            resident=self.resident,
            workers=c.data.workers,
            bags=bags,
            cache=cache,
        )

    def abstract_inputs(self) -> tuple[dict[str, Any], Resident | None]:
        """Shapes of a batch and of the resident data, as the loader would give them."""
        sharded, whole = NamedSharding(self.mesh, SHARDED), self.replicated

        def numbers(sharding: NamedSharding, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)

        def images(sharding: NamedSharding, count: int) -> Images:
            pixels = jax.ShapeDtypeStruct((count, *self.train.canvas, 3), np.uint8, sharding=sharding)
            return Images(pixels, numbers(sharding, count, 2))

        count, batch_size = len(self.train), self.config.batch_size
        batch: dict[str, Any] = {"index": numbers(sharded, batch_size)}
        if self.cached_views:
            shape = batch_size, self.recipe.specs["teacher"].feature_dim
            features = jax.ShapeDtypeStruct(shape, FEATURE_DTYPE, sharding=sharded)
            batch["cached"] = dict.fromkeys(self.cached_views, features)
        if self.resident == "streamed":
            names = ("image", "mate") if self.bag_size else ("image",)
            batch |= dict.fromkeys(names, images(sharded, batch_size))
            return batch | {"label": numbers(sharded, batch_size)}, None
        bag = numbers(whole, count, self.bag_size) if self.bag_size else None
        if self.resident == "replicated":
            return batch, Resident(images(whole, count), numbers(whole, count), bag)
        padded = count + -count % self.mesh.size
        return batch, Resident(images(sharded, padded), numbers(whole, count), bag, split_over=self.mesh)


def fingerprint(source: Source) -> str:
    """Which images these are, wherever they lie: their number, and a digest of 16 of them, spread evenly over the set.

    Of those the pixels as decoded, the canvas and the sizes count; of all others nothing but how many they are. In the
    place of an image that cannot be read its stand-in is looked at. Alike in all processes, which all read the same 16.

    Raises: UserError as `Source.__getitem__`.
    """
    last = len(source) - 1
    images = source[np.arange(SAMPLED) * last // (SAMPLED - 1)]
    return f"{len(source)} {array_digest(images)[:16]}"


def prepare(config: ConfigDict, workdir: Path, *, untrained: bool = False) -> Run:
    """Opens the data, reads frozen networks, checks the config whole. Nothing long runs and nothing is written.

    Args:
      untrained: a frozen network that no source is given for takes its initial weights, for timing alone.

    Raises:
      UserError: for every mistake that can be known by now.
    """
    config = config.copy_and_resolve_references()
    mesh = make_mesh()
    train, test = (
        open_source(config.data.source, split, short_side(config), config.data.max_bad)
        for split in (config.data.train, config.data.test)
    )
    if others := getattr(train.reader, "skipped", 0):
        console.print(f"{config.data.source}: {others:,} files that are hidden or not named as images are left out.")
    sources = {role: config.get(role, {}).get("source", "init") for role in ("student", "teacher")}
    if sources["teacher"] != "init" and config.method.name == "rekd" and config.method.teacher == "online":
        config.method.teacher = "frozen"
        console.print("teacher.source is set, so the teacher is used frozen (method.teacher='frozen').")
    trained = make_method(config).trained
    pretrained, recalled = {}, {}
    for role, source in sources.items():
        if source != "init":
            try:
                pretrained[role] = adopt(config, role, source, trained=role in trained)
            except UserError:
                digest = recall(config, role, workdir) if role in trained else ""
                if not digest:
                    raise
                recalled[role] = digest
                console.print(f"{role}: {source} cannot be read; its weights are in the checkpoint of the run.")
    recipe = make_recipe(config, len(train))
    for role in recipe.method.frozen:
        if role not in pretrained and not untrained:
            raise UserError(
                f"the {role} of this recipe is frozen and needs weights: set {role}.source=workdir:PATH to a finished "
                "run, as one of configs/moco_v2_resnet18.py, or file:PATH to weights."
            )
        if role not in pretrained:
            variables = jax.jit(recipe.initial, static_argnums=0)(role)
            pretrained[role] = TrainedNetwork(recipe.specs[role], variables, "untrained", config.image_size, role)
    unused = [role for role in pretrained if role not in (*recipe.method.trained, *recipe.method.frozen)]
    if unused:
        raise UserError(f"{unused[0]}.source is set, but this method has no network {unused[0]!r}: remove the setting.")
    for role, network in pretrained.items():
        expected = jax.eval_shape(lambda role=role: recipe.initial(role))
        spec = recipe.specs[role]
        if not same_heads(spec, expected, network):
            network = pretrained[role] = with_new_heads(network, jax.jit(recipe.initial, static_argnums=0)(role))
            anew = f"its {spec.head} head is not that of the weights, and starts anew"
            console.print(f"{role}: {anew if spec.head != 'none' else 'the head of the weights is not used'}.")
        if jax.tree.map(jnp.shape, network.variables) != jax.tree.map(jnp.shape, expected):
            raise UserError(
                f"{role}.source was trained at image_size={network.image_size}, which fixes the shape of its weights, "
                f"and this run has image_size={config.image_size}: use the same, or {role}.resize={network.image_size}."
            )
    micro = config.batch_size // config.optim.accum
    if micro % mesh.size:
        raise UserError(
            f"batch_size={config.batch_size} over optim.accum={config.optim.accum} gives {micro} images, not divisible "
            f"by the {mesh.size} devices: use a multiple of {mesh.size * config.optim.accum}."
        )
    run = Run(config, workdir, mesh, recipe, train, test, pretrained, recalled)
    for key, wanted in {"method.bag_path": run.bag_size, "teacher.cache_path": run.cached_views}.items():
        if wanted and not is_local(workdir) and not flatten(config)[key]:
            raise UserError(f"{key} must name a place on the local disk where --workdir={workdir} is none.")
    return run


def adopt(config: ConfigDict, role: str, source: str, *, trained: bool) -> TrainedNetwork:
    """Reads the network of a source and makes the config of its role agree with it.

    Args:
      trained: the network goes on training, with the head that the recipe has for it.

    Raises:
      UserError: for a source that is unknown or cannot be read.
    """
    if not source.startswith((FROM_WORKDIR, FROM_FILE, FROM_HUB)):
        raise UserError(
            f"{role}.source={source!r} is unknown: use 'init', workdir:PATH of an earlier run, file:PATH of weights or "
            "hf:OWNER/REPOSITORY/FILE."
        )
    one_of(f"{role}.name", config[role].name, MODELS)
    try:
        found = load_source(source, config[role].name)
    except UserError as error:
        why = "" if trained else ", which a frozen network needs whenever its run goes on"
        raise UserError(f"{role}.source{why}: {error}") from error
    agree(config, role, dataclasses.asdict(found.spec), (*BACKBONE, *(() if trained else HEAD)))
    console.print(f"{role}: {found.description}, from {source}.")
    return at_image_size(found, config[role].resize or config.image_size)


def recall(config: ConfigDict, role: str, workdir: Path) -> str:
    """The digest of the weights that a network of the run in `workdir` started from, and its config made to agree.

    '' unless the run took them from the same source, and has gone on from there to a checkpoint or to results.
    """
    try:
        record = read_json(workdir / "run.json")
        there, digest = record["config"][role], record["identity"][f"{role}.digest"]
        with closing(Checkpoints(workdir)) as checkpoints:
            begun = checkpoints.latest is not None or (workdir / "results.json").exists()
        if not begun or there["source"] != config[role].source:
            return ""
        agree(config, role, there, BACKBONE)
    except (KeyError, TypeError, UserError):
        return ""
    return digest


def agree(config: ConfigDict, role: str, given: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Sets keys of a network to what comes with its weights, and those of its entry that nobody set."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}  # of a run.json
    config[role].update({key: given[key] for key in keys})
    config[role].update({key: given[key] for key in ENTRY if not config[role][key]})


def same_heads(spec: NetworkSpec, expected: dict[str, Any], network: TrainedNetwork) -> bool:
    """Whether a network has the heads of `spec`, whose variables are `expected`. Widths count, as 0 has a meaning."""

    def shapes(variables: dict[str, Any]) -> Any:
        return jax.tree.map(jnp.shape, {name: tree.get("head", {}) for name, tree in variables.items()})

    kinds = (network.spec.head, network.spec.thead) == (spec.head, spec.thead)
    return kinds and shapes(network.variables) == shapes(expected)


def with_new_heads(network: TrainedNetwork, initial: dict[str, Any]) -> TrainedNetwork:
    """The backbone of a network, and initial values for all that stands on it."""
    variables = {
        name: {**tree, **{key: value for key, value in network.variables[name].items() if key == "backbone"}}
        for name, tree in initial.items()
    }
    return dataclasses.replace(network, variables=variables)
