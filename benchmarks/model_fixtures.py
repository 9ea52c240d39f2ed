"""What torch computes with every backbone: `python benchmarks/model_fixtures.py [NAME …]`; torch, timm, torchvision.

Writes tests/golden/models/NAME.npz, which tests/models/test_against_torch.py compares with. Weights and images are
formulas of numpy alone, so that both sides make the same ones. Recorded with torch 2.13, timm 1.0.31, torchvision 0.28.
"""

import dataclasses
import functools
import math
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parents[1] / "tests" / "golden" / "models"
CLASSES = 1000
SAMPLES = 46


def noise(name: str, count: int) -> np.ndarray:
    """`count` numbers in [−1, 1) that look independent and uniform: a hash of name and index (MurmurHash3's finish)."""
    x: np.ndarray = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1)
    x += np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return (x ^ (x >> 16)) * 2.0**-31 - 1


def parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 parameter or running statistic by its torch name and shape. Activations stay of order 1."""
    x, leaf = noise(name, math.prod(shape)).reshape(shape), name.rpartition(".")[2]
    if leaf == "weight" and len(shape) > 1:
        x *= (4 / math.prod(shape[1:])) ** 0.5
    elif leaf in ("weight", "gamma"):
        x = 1 + 0.2 * x
    elif leaf == "running_var":
        x = 1.5 + x
    elif leaf in ("bias", "running_mean"):
        x *= 0.2
    return x.astype(np.float32)


def images(size: int) -> np.ndarray:
    """(4, size, size, 3) float32 of order 1: waves of another length and colour in each image, and noise."""
    b, y, x, c = np.ogrid[:4, :size, :size, :3]
    waves = np.sin((b + 2) * (y * (c + 1) - x * (b - 1)) / size + 2.5 * c * b)
    return (waves + 0.5 * noise("images", waves.size).reshape(waves.shape)).astype(np.float32)


def digest(x: np.ndarray) -> np.ndarray:
    """(2 + SAMPLES,) float32 of an array: its largest magnitude, its mean, and values from all over it."""
    flat = np.asarray(x, np.float64).ravel()
    chosen = flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]
    return np.array([np.abs(flat).max(), flat.mean(), *chosen], np.float32)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A backbone as torch has it.

    Attributes:
      build: makes it for images of a side, with CLASSES classes and without dropout.
      stages: names of the modules whose outputs the stages are.
      size: side of the images, pixels.
      native: side that it is published for.
    """

    build: Callable[[int], Any]
    stages: tuple[str, ...]
    size: int = 64
    native: int = 224


@functools.cache
def references() -> dict[str, Reference]:
    """Every backbone by its key in MODELS."""
    import timm
    import torchvision

    def from_timm(name: str, *stages: str) -> Reference:
        return Reference(lambda size: timm.create_model(name, num_classes=CLASSES), stages)

    def vit(name: str, **options: int) -> Reference:
        def build(size: int) -> Any:
            return timm.create_model(name, num_classes=CLASSES, img_size=size)

        return Reference(build, ("blocks.2", "blocks.5", "blocks.8", "norm"), **options)

    def from_torchvision(name: str, *stages: str, **options: Any) -> Reference:
        return Reference(lambda size: getattr(torchvision.models, name)(num_classes=CLASSES, **options), stages)

    mobile = ("blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6")

    def mobile_tv(name: str, *features: int) -> Reference:
        return from_torchvision(name, *(f"features.{i}" for i in features), dropout=0)

    small = ("bn1", "blocks.0", "blocks.1", "blocks.3", "blocks.5")
    layers = ("layer1", "layer2", "layer3", "layer4")
    shuffle = ("stage2", "stage3", "stage4", "conv5")
    dinov2 = {"size": 56, "native": 518}
    return {
        "alexnet": Reference(_alexnet, tuple(f"relu{i}" for i in range(1, 6))),
        "alexnet_tv": from_torchvision("alexnet", *(f"features.{i}" for i in (1, 4, 7, 9, 11)), dropout=0),
        "efficientnet_b0": from_timm("efficientnet_b0", *mobile),
        "efficientnet_b1": from_timm("efficientnet_b1", *mobile),
        "efficientnet_lite0": from_timm("efficientnet_lite0", *mobile),
        "mobilenet_v2": mobile_tv("mobilenet_v2", 1, 3, 6, 13, 17),
        "mobilenet_v3_large": from_timm("mobilenetv3_large_100", *mobile),
        "mobilenet_v3_large_tv": mobile_tv("mobilenet_v3_large", 1, 3, 6, 12, 16),
        "mobilenet_v3_small": from_timm("mobilenetv3_small_100", *small),
        "mobilenet_v3_small_tv": mobile_tv("mobilenet_v3_small", 0, 1, 3, 8, 12),
        "resnet18": from_torchvision("resnet18", *layers),
        "resnet34": from_torchvision("resnet34", *layers),
        "resnet50": from_torchvision("resnet50", *layers),
        "resnet50w2": Reference(_resnet50w2, layers),
        "resnet101": from_torchvision("resnet101", *layers),
        "resnet152": from_torchvision("resnet152", *layers),
        "shufflenet_v2_x0_5": from_torchvision("shufflenet_v2_x0_5", *shuffle),
        "shufflenet_v2_x1_0": from_torchvision("shufflenet_v2_x1_0", *shuffle),
        "tf_efficientnet_b0": from_timm("tf_efficientnet_b0", *mobile),
        "tf_efficientnet_b1": from_timm("tf_efficientnet_b1", *mobile),
        "tf_efficientnet_lite0": from_timm("tf_efficientnet_lite0", *mobile),
        "vit_tiny": vit("vit_tiny_patch16_224"),
        "vit_small": vit("vit_small_patch16_224"),
        "vit_base": vit("vit_base_patch16_224"),
        "vit_small_dinov2": vit("vit_small_patch14_dinov2", **dinov2),
        "vit_base_dinov2": vit("vit_base_patch14_dinov2", **dinov2),
        "vit_small_reg4_dinov2": vit("vit_small_patch14_reg4_dinov2", **dinov2),
        "vit_base_reg4_dinov2": vit("vit_base_patch14_reg4_dinov2", **dinov2),
    }


def _alexnet(size: int) -> Any:
    """The batch-norm variant, which no library has."""
    import torch
    from torch import nn

    layers: OrderedDict[str, Any] = OrderedDict()
    channels, kernels = (3, 96, 256, 384, 384, 256), (11, 5, 3, 3, 3)
    for i, (given, features, kernel) in enumerate(zip(channels, channels[1:], kernels, strict=False), 1):
        stride, padding = (4, 2) if i == 1 else (1, kernel // 2)
        layers[f"conv{i}"] = nn.Conv2d(given, features, kernel, stride, padding, bias=False)
        layers[f"bn{i}"], layers[f"relu{i}"] = nn.BatchNorm2d(features), nn.ReLU()
        if i in (1, 2, 5):
            layers[f"pool{i}"] = nn.MaxPool2d(3, 2)
    layers["flatten"] = nn.Flatten()
    width = nn.Sequential(layers).eval()(torch.zeros(1, 3, size, size)).shape[1]
    layers["fc6"], layers["relu6"] = nn.Linear(width, 4096), nn.ReLU()
    layers["fc7"], layers["relu7"] = nn.Linear(4096, 4096), nn.ReLU()
    layers["fc8"] = nn.Linear(4096, CLASSES)
    return nn.Sequential(layers)


def _resnet50w2(size: int) -> Any:
    """SwAV's; what torchvision calls wide is wide inside the blocks alone."""
    from torch import nn
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=CLASSES)
    model.inplanes = 128
    model.conv1, model.bn1 = nn.Conv2d(3, 128, 7, 2, 3, bias=False), nn.BatchNorm2d(128)
    for i, blocks in enumerate([3, 4, 6, 3]):
        setattr(model, f"layer{i + 1}", model._make_layer(Bottleneck, 128 * 2**i, blocks, stride=2 if i else 1))
    model.fc = nn.Linear(4096, CLASSES)
    return model


def compute(name: str) -> dict[str, Any]:
    """The fixture of one backbone, computed in float64.

    Returns:
      'count' of parameters of the model as published; 'eval' and 'train': digests of stages, pooled feature and logits
      by running and by batch statistics; 'norms': names of a few batch norms; 'moved': digests of their running_mean
      and running_var after the forward of 'train'.
    """
    import torch

    reference = references()[name]
    count = sum(p.numel() for p in reference.build(reference.native).parameters())
    model = reference.build(reference.size)
    state = {
        key: torch.from_numpy(parameter(key, tuple(value.shape)))
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    model.load_state_dict(state, strict=False)
    model = model.double()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.1  # torchvision trains MobileNetV3 with .01: no part of what its weights mean
    *_, classifier = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    found: dict[str, Any] = {}
    for stage in reference.stages:
        model.get_submodule(stage).register_forward_hook(
            lambda _, given, out, stage=stage: found.update({stage: out.clone()})
        )
    classifier.register_forward_pre_hook(lambda _, given: found.update(pooled=given[0]))
    x = torch.from_numpy(images(reference.size)).double().permute(0, 3, 1, 2)

    def outputs(*, train: bool) -> np.ndarray:
        with torch.no_grad():
            found["logits"] = model.train(train)(x)
        tensors = [found[key].numpy() for key in (*reference.stages, "pooled", "logits")]
        return np.stack([digest(_channels_last(t)) for t in tensors])

    fixture = {"count": count, "eval": outputs(train=False), "train": outputs(train=True)}
    after = model.state_dict()
    norms = [key.removesuffix(".running_mean") for key in after if key.endswith(".running_mean")]
    norms = norms[:: max(1, len(norms) // 3)]
    moved = [digest(after[f"{norm}.{leaf}"]) for norm in norms for leaf in ("running_mean", "running_var")]
    return {**fixture, "norms": np.array(norms, "U"), "moved": np.array(moved)}


def positions() -> dict[str, Any]:
    """A 5 × 5 grid of embeddings for 3 × 7 patches, as DINOv2's code samples it without and with registers."""
    import torch
    from torch.nn.functional import interpolate

    side, grid = 5, (3, 7)
    given = parameter("positions", (1, side * side, 3))
    maps = torch.from_numpy(given.reshape(1, side, side, 3)).permute(0, 3, 1, 2)
    plain = interpolate(maps, scale_factor=tuple((n + 0.1) / side for n in grid), mode="bicubic")
    registers = interpolate(maps, size=grid, mode="bicubic", antialias=True)
    sampled = {"plain": plain, "registers": registers}
    return {"given": given, **{key: _channels_last(maps.numpy()).reshape(1, -1, 3) for key, maps in sampled.items()}}


def _channels_last(x: np.ndarray) -> np.ndarray:
    """NHWC of a map, also of a ViT's tokens (B, N, D), of which the last n² are patches."""
    if x.ndim == 3:
        side = math.isqrt(x.shape[1])
        return x[:, -side * side :].reshape(x.shape[0], side, side, -1)
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def main(names: list[str]) -> None:
    FIXTURES.mkdir(parents=True, exist_ok=True)
    for name in names or references():
        fixture = compute(name)
        np.savez_compressed(FIXTURES / f"{name}.npz", **fixture)
        print(f"{name}: {fixture['count']:,} parameters")
    np.savez_compressed(FIXTURES / "positions.npz", **positions())


if __name__ == "__main__":
    import torch_models  # noqa: F401  (makes torchvision and timm importable beside a torch for the CPU)

    main(sys.argv[1:])
