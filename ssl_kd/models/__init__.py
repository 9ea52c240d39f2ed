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

from ssl_kd.models.alexnet import AlexNet
from ssl_kd.models.heads import MLPHead
from ssl_kd.models.layers import Features
from ssl_kd.models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, ResNet152

MODELS: dict[str, Callable[..., Any]] = {
    "alexnet": AlexNet,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "resnet152": ResNet152,
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
      head_hidden: hidden width of the MLP head; 0 = the backbone's feature width (MoCo-v2).
      dim: embedding width.
      bn_groups: independent batch-norm groups of a batch.
      remat: recompute residual blocks in the backward pass: less memory, about a forward more time.
      dtype: compute dtype; parameters, statistics and embeddings stay float32.
    """

    name: str
    width: float = 1.0
    stem: str = "imagenet"
    head_hidden: int = 0
    dim: int = 128
    bn_groups: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    def backbone(self) -> nn.Module:
        make = MODELS[self.name]
        return make(width=self.width, stem=self.stem, bn_groups=self.bn_groups, remat=self.remat, dtype=self.dtype)


class Network(nn.Module):
    """A backbone and a projection head, with its own preprocessing at the entry."""

    spec: NetworkSpec

    def setup(self) -> None:
        self.backbone = self.spec.backbone()
        hidden = self.spec.head_hidden or self.backbone.pooled_dim
        self.head = MLPHead(hidden=hidden, out=self.spec.dim, dtype=self.spec.dtype)

    def features(self, images: jax.Array, *, norm: str, dropout: bool = False) -> Features:
        """Images (B, H, W, 3) in [0, 1] → stages and pooled feature; `norm` is 'batch' or 'running' statistics."""
        x = (images - jnp.array(IMAGENET_MEAN, images.dtype)) / jnp.array(IMAGENET_STD, images.dtype)
        return self.backbone(x.astype(self.spec.dtype), norm=norm, dropout=dropout)

    def project(self, features: Features) -> jax.Array:
        """Pooled feature → embedding (B, dim) float32, not normalised."""
        return self.head(features.pooled)

    def embed(self, images: jax.Array, *, norm: str, dropout: bool = False) -> jax.Array:
        """`project(features(images))`."""
        return self.project(self.features(images, norm=norm, dropout=dropout))


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
        path = context.module.path
        if context.method_name != "__call__" or len(path) != 2 or path[1] != "backbone":
            return function(*args, **kwargs)
        out = function(*args, **kwargs) if features is None else features[len(calls)]
        calls.append(BackboneCall(path[0], args[0], kwargs["norm"], out))
        return out

    with nn.intercept_methods(intercept):
        yield calls


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
    return dict(Network(spec).init(key, images, norm="batch", method="embed"))
