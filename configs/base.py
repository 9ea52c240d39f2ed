"""Every key of a recipe with its default, unit and meaning. A recipe changes what differs and says why.

Override on the command line: --config.batch_size=128 --config.optim.lr=0.06 --config.data.source=hf:/data/cifar10
"""

import dataclasses

from ml_collections import ConfigDict, config_dict

from ssl_kd.augment import PRESETS
from ssl_kd.methods import METHODS


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = ""  # recipe name; with the preset it names the default work directory
    c.preset = ""  # '' is the embedded data set
    c.seed = 0  # of every random stream
    c.batch_size = 256  # images an optimizer step, over all devices
    c.epochs = 200.0  # passes over data.train
    c.image_size = 224  # side of a training view, pixels

    # Images. source: 'embedded' | 'folder:PATH' (a directory, a glob or a .txt list) | 'hf:DIRECTORY' (Hugging Face
    # parquet) | 'tfds:NAME' | 'tar:PATTERN' (WebDataset) | 'arrayrecord:DIRECTORY' (by launch/prepare.py) |
    # 'synthetic:SIDExCOUNT' (noise).
    c.data = ConfigDict()
    c.data.source = "embedded"
    c.data.train = "train"  # split, or a part: 'train[:10000]', 'train[:10%]', 'train[balanced 1%]' of every class
    c.data.test = "test"
    c.data.canvas = 0  # pixels that are enough for an image's shorter side, on the host; 0 = 8/7 of the largest view
    c.data.resident = "auto"  # hold the set on the device: 'auto' (if it fits) | 'on' | 'off'
    c.data.workers = 0  # processes that decode; 0 = threads only
    c.data.max_bad = 0.01  # share of a set that cannot be read, 10 images or more, at which the run stops

    # Networks. source: 'init'; the evaluated network of an earlier run, 'workdir:PATH'; or weights of others,
    # 'file:PATH' and 'hf:OWNER/REPOSITORY/FILE', with '#KEY' behind to choose one of several state dicts.
    c.student = network("alexnet")
    c.teacher = network("resnet50")
    c.bn_groups = 1  # independent batch-norm groups of a batch; above 1 the key views are shuffled across them
    c.sharding = "replicated"  # of state and frozen networks: whole on every device | 'fsdp': split over the devices
    c.remat = False  # recompute residual blocks in the backward pass: less memory, more time
    c.compute_dtype = "float32"  # of activations: 'float32' | 'bfloat16'

    # The method's own keys are the fields of its dataclass in ssl_kd/methods/, with unit and meaning there.
    c.method = method("moco_v2")
    c.augment = augmentation("mocov2")

    c.optim = optimizer()
    c.optim.accum = 1  # micro-batches an optimizer step is split into; unrolled on a CPU: compile time grows with it
    c.optim.groups = ConfigDict()  # name → optimizer(…) of the parameters under its paths; the others follow c.optim
    c.max_nonfinite = 0  # steps with a non-finite loss or gradient that may be skipped before the run stops

    # What follows changes no number of the training run.
    c.log_every = 20  # steps between lines of metrics.jsonl
    c.checkpoint = ConfigDict()
    c.checkpoint.every_epochs = 5.0  # between checkpoints; there is always one at the end
    c.checkpoint.keep = 2  # newest checkpoints kept
    c.probe = ConfigDict()
    c.probe.every_epochs = 5.0  # between quick probes while training; 0 = only at the end
    c.probe.knn = (10, 20, 200)  # k of weighted kNN
    c.probe.knn_bank = 2000  # training (and test) images of the kNN probe while training, chosen at random
    c.probe.train_images = 128_000  # training images of the final probes, chosen at random; all, if there are fewer
    c.probe.linear = True  # linear probe at the end
    c.probe.batch_size = 256  # images a forward
    # Under one of these floors a quick probe warns of collapse; 0 = never. Healthy runs measured here stay above 0.08
    # and 5 (tests' tiny networks above 2.8) from the first probe on; a collapsed one falls below 0.001 and to 1.0.
    c.probe.min_feature_std = 0.03  # of unit features over images: 1 = evenly spread, 0 = all alike
    c.probe.min_effective_rank = 2.0  # directions that the features take
    return c


def network(name: str, **changes) -> ConfigDict:
    """One network of a recipe."""
    c = ConfigDict()
    c.name = name  # a key of ssl_kd.models.MODELS
    c.width = 1.0  # multiplies every channel count
    c.stem = "auto"  # the entry: 'auto' (small up to 64 px) | 'imagenet' | 'small' | 'small_s2' (a quarter of the work)
    c.head = "mlp"  # what the loss sees: a key of ssl_kd.models.HEADS, or 'none' = the pooled feature
    c.head_hidden = 0  # hidden width of the projection head; 0 = feature width
    c.dim = 128  # embedding width; 0 = the teacher's feature width
    c.thead = 0  # width of MOKD's T-Head; 0 = none
    c.drop_path = 0.0  # stochastic depth, where there is such: probability of skipping the last block, less for others
    c.source = "init"  # where its weights come from; other sources set name, width and stem, of a frozen one the head
    # What it takes; None = as its source, without one ImageNet's mean and std, bilinear, 7 / 8.
    c.mean = config_dict.placeholder(tuple)  # of RGB in [0, 1], subtracted at its entry
    c.std = config_dict.placeholder(tuple)  # divided by
    c.resize = 0  # side that its entry resizes views to, pixels; 0 = as its source, else as they come
    c.interpolation = config_dict.placeholder(str)  # of that, and of what it is evaluated on: 'bilinear' | 'bicubic'
    c.crop_fraction = config_dict.placeholder(float)  # of an image's shorter side: the centre it is evaluated on
    c.cache_views = 0  # of a frozen teacher: its features of so many fixed views of an image are kept on disk; 0 = none
    c.cache_path = ""  # where, for several runs to share; '' = the work directory
    c.update(changes)
    return c


def optimizer(name: str = "sgd", **changes) -> ConfigDict:
    """How a group of parameters is optimized."""
    c = ConfigDict()
    c.paths = ()  # of a group's parameters, as 'teacher' or 'student/thead'
    c.name = name  # 'sgd' | 'adamw'
    c.lr = 0.03  # peak rate at batch 256; the rate used is lr · batch_size / 256
    c.momentum = 0.9  # of sgd
    c.weight_decay = 1e-4
    c.decay = "all"  # what decays: 'all' | 'weights' (spares biases and norms)
    c.final_weight_decay = config_dict.placeholder(float)  # end of a cosine from weight_decay; None = constant
    c.schedule = "cosine"  # of the rate: 'cosine' to final_lr | 'stairs', times `factor` at each milestone
    c.final_lr = 0.0  # not scaled by the batch size
    c.milestones = ()  # shares of the run
    c.factor = 0.1
    c.warmup_epochs = 0.0  # linear warm-up of the rate
    c.ramp = "from_zero"  # which warm-up, of the cosine: see ssl_kd.optim.warmup_cosine
    c.clip = 0.0  # largest norm of each gradient tensor; 0 = any
    c.last_layer_epochs = 0.0  # first epochs in which the heads' last layers stay as they are
    c.update(changes)
    return c


def method(name: str, **changes) -> ConfigDict:
    """The fields of a method's dataclass as config keys, with the recipe's changes."""
    return ConfigDict({"name": name, **dataclasses.asdict(METHODS[name](**changes))})


def augmentation(preset: str, **changes) -> ConfigDict:
    """The fields of an augmentation preset as config keys, with the recipe's changes."""
    return ConfigDict(dataclasses.asdict(dataclasses.replace(PRESETS[preset], **changes)))


def apply_preset(c: ConfigDict, preset: str) -> None:
    """Sets everything that depends on the data and the machine, not on the method; call it before the differences.

    '' and 'smoke' fit a 2-core laptop, 'cifar10' too (10 000 images; give the full set and epochs where there is an
    accelerator), 'imagenet' is the setting of the papers.
    """
    presets = ("", "smoke", "cifar10", "imagenet")
    if preset not in presets:
        raise ValueError(f"preset {preset!r} is unknown: choose one of {', '.join(p or 'none' for p in presets)}")
    c.preset = preset
    if preset == "imagenet":
        c.data.update(source="tfds:imagenet2012", test="validation", workers=16)
        c.compute_dtype = "bfloat16"
        return
    c.epochs, c.image_size, c.batch_size = 10.0, 28, 128
    c.augment = augmentation("grey", crop_scale=(0.3, 1.0))
    c.student.width = 0.5
    for role in ("student", "teacher"):
        if c.get(role, {}).get("name", "").startswith("resnet"):
            c[role].stem = "small_s2"  # a quarter of the work of 'small'
    c.method.update({key: value for key, value in {"queue": 2048, "momentum": 0.99}.items() if key in c.method})
    c.bn_groups = min(c.bn_groups, 4)
    c.optim.lr = 0.12
    c.optim.weight_decay = 5e-4
    c.optim.warmup_epochs = 1.0
    if preset == "smoke":
        c.data.update(train="train[:1024]", test="test[:500]")
        c.epochs, c.batch_size, c.student.width = 2.0, 64, 0.125
        c.probe.every_epochs, c.log_every = 1.0, 5
        if "queue" in c.method:
            c.method.queue = 256
    if preset == "cifar10":
        c.data.update(source="hf:data/cifar10", train="train[:10000]")
        c.epochs, c.image_size, c.student.width = 16.0, 32, 0.25
        c.augment = augmentation("small")
