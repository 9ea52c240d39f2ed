"""The networks. MODELS is the table of backbones; to add one, write its file and a line here.

Only this package and one `nn.apply` in `step.py` know flax.linen.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_kd.models import alexnet, efficientnet, mobilenet, resnet, shufflenet, vit
from ssl_kd.models.convolution import plain_convolutions
from ssl_kd.models.heads import DINOHead, LinearHead, MLPHead, RegressionHead, THead, TokenReduce
from ssl_kd.models.layers import Features

MODELS: dict[str, Callable[..., Any]] = {
    "alexnet": alexnet.AlexNet,
    "alexnet_tv": alexnet.AlexNetTV,
    "efficientnet_b0": efficientnet.EfficientNetB0,
    "efficientnet_b1": efficientnet.EfficientNetB1,
    "efficientnet_lite0": efficientnet.EfficientNetLite0,
    "mobilenet_v2": mobilenet.MobileNetV2,
    "mobilenet_v3_large": mobilenet.MobileNetV3Large,
    "mobilenet_v3_large_tv": mobilenet.MobileNetV3LargeTV,
    "mobilenet_v3_small": mobilenet.MobileNetV3Small,
    "mobilenet_v3_small_tv": mobilenet.MobileNetV3SmallTV,
    "resnet18": resnet.ResNet18,
    "resnet34": resnet.ResNet34,
    "resnet50": resnet.ResNet50,
    "resnet50w2": resnet.ResNet50w2,
    "resnet101": resnet.ResNet101,
    "resnet152": resnet.ResNet152,
    "shufflenet_v2_x0_5": shufflenet.ShuffleNetV2x0_5,
    "shufflenet_v2_x1_0": shufflenet.ShuffleNetV2x1_0,
    "tf_efficientnet_b0": efficientnet.TFEfficientNetB0,
    "tf_efficientnet_b1": efficientnet.TFEfficientNetB1,
    "tf_efficientnet_lite0": efficientnet.TFEfficientNetLite0,
    "vit_tiny": vit.ViTTiny,
    "vit_small": vit.ViTSmall,
    "vit_base": vit.ViTBase,
    "vit_small_dinov2": vit.ViTSmallDINOv2,
    "vit_base_dinov2": vit.ViTBaseDINOv2,
    "vit_small_reg4_dinov2": vit.ViTSmallReg4DINOv2,
    "vit_base_reg4_dinov2": vit.ViTBaseReg4DINOv2,
}

HEADS: dict[str, Callable[["NetworkSpec"], nn.Module]] = {
    "mlp": lambda s: MLPHead(hidden=s.head_hidden or s.feature_dim, out=s.dim, dtype=s.dtype),
    "mlp_bn": lambda s: MLPHead(
        hidden=s.head_hidden or s.feature_dim, out=s.dim, batch_norm=True, bn_groups=s.bn_groups, dtype=s.dtype
    ),
    "linear": lambda s: LinearHead(out=s.dim, dtype=s.dtype),
    "regression": lambda s: RegressionHead(out=s.dim, layers=4, bn_groups=s.bn_groups, dtype=s.dtype),
    "regression_linear": lambda s: RegressionHead(out=s.dim, layers=2, bn_groups=s.bn_groups, dtype=s.dtype),
    "dino": lambda s: DINOHead(
        hidden=s.head_hidden or 2048, out=s.dim, fixed_norm=not s.backbone().transformer, dtype=s.dtype
    ),
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """Everything that decides the shape and the arithmetic of one network.

    Attributes:
      name: a key of MODELS.
      width: multiplies every channel count.
      stem: the backbone's entry, 'imagenet' or one for small images.
      head: a key of HEADS, or 'none', where the embedding is the pooled feature.
      head_hidden: hidden width of the head; 0 = the backbone's feature width (MoCo-v2), 2048 in DINO's.
      dim: embedding width.
      thead: width of the tokens of MOKD's T-Head; 0 = it has none.
      drop_path: stochastic depth, the probability at the last block, of backbones that have it.
      classes: outputs of the backbone's own classifier, which no loss uses; 0 = it has none.
      mean, std: of the RGB values in [0, 1] that the network takes, subtracted and divided by at its entry.
      resize: side that its entry resizes images to, pixels; 0 = it takes them as they come.
      interpolation: of what resizes images for it, its entry included: a key of `ssl_kd.images.INTERPOLATIONS`.
      crop_fraction: side of the centre that it is evaluated on, over an image's shorter side.
      bn_groups: independent batch-norm groups of a batch.
      remat: recompute residual blocks in the backward pass: less memory, about a forward more time.
      dtype: compute dtype; parameters, statistics and embeddings stay float32.
    """

    name: str
    width: float = 1.0
    stem: str = "imagenet"
    head: str = "mlp"
    head_hidden: int = 0
    dim: int = 128
    thead: int = 0
    drop_path: float = 0.0
    classes: int = 0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: int = 0
    interpolation: str = "bilinear"
    crop_fraction: float = 7 / 8
    bn_groups: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def thead_heads(self) -> int:
        """Attention heads of the T-Head, of 64 channels."""
        return max(1, self.thead // 64)

    def backbone(self) -> Any:
        """The backbone's module."""
        options = {"width": self.width, "stem": self.stem, "bn_groups": self.bn_groups, "remat": self.remat}
        options["classes"] = self.classes
        if self.drop_path:
            options["drop_path"] = self.drop_path
        return MODELS[self.name](**options, dtype=self.dtype)

    @property
    def feature_dim(self) -> int:
        """Width of the backbone's pooled feature."""
        return self.backbone().pooled_dim


class Network(nn.Module):
    """A backbone and its heads, with its own preprocessing at the entry."""

    spec: NetworkSpec

    def setup(self) -> None:
        spec = self.spec
        self.backbone = spec.backbone()
        self.head = HEADS[spec.head](spec) if spec.head != "none" else None
        if spec.thead:
            if not self._native_tokens:
                self.reduce = TokenReduce(spec.thead, dtype=spec.dtype)
            self.thead = THead(dim=spec.thead, heads=spec.thead_heads, out=spec.dim, dtype=spec.dtype)

    def features(self, images: jax.Array, *, norm: str, dropout: bool = False) -> Features:
        """Images (B, H, W, 3) in [0, 1] → stages and pooled feature; `norm` is 'batch' or 'running' statistics."""
        if side := self.spec.resize:
            images = jax.image.resize(images, (images.shape[0], side, side, 3), self.spec.interpolation)
            images = jnp.clip(images, 0, 1)  # a cubic overshoots
        x = (images - jnp.array(self.spec.mean, images.dtype)) / jnp.array(self.spec.std, images.dtype)
        return self.backbone(x.astype(self.spec.dtype), norm=norm, dropout=dropout)

    def project(self, features: Features, *, norm: str) -> jax.Array:
        """Pooled feature → embedding (B, dim) float32, not normalised."""
        return features.pooled if self.head is None else self.head(features.pooled, norm=norm)

    def embed(self, images: jax.Array, *, norm: str, dropout: bool = False) -> jax.Array:
        """`project(features(images))`."""
        return self.project(self.features(images, norm=norm, dropout=dropout), norm=norm)

    @property
    def _native_tokens(self) -> bool:
        """Whether the T-Head takes the backbone's tokens as they are."""
        return self.backbone.transformer and self.spec.thead == self.backbone.pooled_dim

    def _tokens(self, maps: jax.Array) -> jax.Array:
        """(B, h, w, C) → (B, h · w, thead)."""
        return maps.reshape(maps.shape[0], -1, maps.shape[3]) if self._native_tokens else self.reduce(maps)

    def query(self, features: Features) -> jax.Array:
        """What another network's T-Head is asked with (MOKD): (B, thead), the mean token, or a ViT's class token."""
        asked = features.pooled[:, None, None] if self.backbone.transformer else features.map
        return jnp.mean(self._tokens(asked), axis=1)

    def search(self, features: Features, query: jax.Array | None = None) -> jax.Array:
        """T-Head's output (B, dim) float32 over the tokens of the last map.

        Args:
          query: (B · n, thead) of another network, n in a row of each image: MOKD's feature search, (B · n, dim).
        """
        batch, height, width, _ = features.map.shape
        tokens = self._tokens(features.map)
        if query is not None:
            tokens = jnp.repeat(tokens, query.shape[0] // batch, axis=0)
        return self.thead(tokens, (height, width), query)

    def everything(self, images: jax.Array) -> None:
        """Calls every part once, for initialisation."""
        features = self.features(images, norm="batch")
        self.project(features, norm="batch")
        if self.spec.thead:
            self.search(features)


class Networks(nn.Module):
    """Binds several networks by name, so that a loss can say `nets.student.embed(...)`."""

    specs: Mapping[str, NetworkSpec]

    def setup(self) -> None:
        for name, spec in self.specs.items():
            setattr(self, name, Network(spec))


@dataclasses.dataclass(frozen=True)
class BackboneCall:
    """One forward of a backbone within a loss: whose, on what, with which statistics, and what came out."""

    network: str
    images: jax.Array
    norm: str
    features: Features


@contextlib.contextmanager
def backbone_calls(features: Sequence[Features] | None = None) -> Generator[list[BackboneCall]]:
    """Lists the backbone calls of `Networks` made inside, in order; with `features` they stand in for the calls."""
    calls: list[BackboneCall] = []

    def intercept(function, args, kwargs, context):
        # A property of an unbound module comes here too, and has no path.
        path = context.module.path if context.method_name == "__call__" else ()
        if len(path) != 2 or path[1] != "backbone":
            return function(*args, **kwargs)
        out = function(*args, **kwargs) if features is None else features[len(calls)]
        calls.append(BackboneCall(path[0], args[0], kwargs["norm"], out))
        return out

    with nn.intercept_methods(intercept):
        yield calls


@contextlib.contextmanager
def features_of_views(
    network: str, views: Mapping[str, jax.Array], pooled: Mapping[str, jax.Array] | None = None
) -> Generator[list[tuple[str | None, str]]]:
    """Lists which views a network of `Networks` looks at inside, None for what is no view, and its kind of statistics;
    with `pooled`, a view → (B, D), these stand in for what its backbone would make of them."""
    looks: list[tuple[str | None, str]] = []

    def intercept(function, args, kwargs, context):
        if context.method_name != "features" or context.module.path != (network,):
            return function(*args, **kwargs)
        name = next((name for name, view in views.items() if view is args[0]), None)
        looks.append((name, kwargs["norm"]))
        if pooled is None or name is None:
            return function(*args, **kwargs)
        return Features(stages=(), pooled=pooled[name])

    with nn.intercept_methods(intercept):
        yield looks


def backbone_forward(
    spec: NetworkSpec, variables: Mapping[str, Any], images: jax.Array, *, norm: str
) -> tuple[Features, Mapping[str, Any]]:
    """A backbone alone, on images it takes as they are: its features, and 'batch_stats' as the forward leaves them.

    Args:
      variables: 'params' and 'batch_stats' of the backbone, without the head's.
    """
    return spec.backbone().apply(variables, images, norm=norm, mutable=["batch_stats"])


def init_network(spec: NetworkSpec, key: jax.Array, image_size: int) -> dict[str, Any]:
    """Variables {'params', 'batch_stats'} of one network by its own initialisers, whatever a loss would touch."""
    images = jnp.zeros((spec.bn_groups, image_size, image_size, 3))
    with plain_convolutions():  # what no variable depends on is dropped by the compiler, but traced first
        return {"batch_stats": {}, **Network(spec).init(key, images, method="everything")}
