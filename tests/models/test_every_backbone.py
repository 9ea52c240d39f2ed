"""What every backbone of MODELS promises, so that a recipe can name any of them."""

import jax
import jax.numpy as jnp
import pytest
from backbones import shapes

from ssl_kd.models import MODELS, NetworkSpec

FAMILIES = (
    "alexnet",
    "alexnet_tv",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "resnet18",
    "resnet50w2",
    "shufflenet_v2_x0_5",
    "tf_efficientnet_lite0",
    "vit_tiny",
    "vit_small_reg4_dinov2",
)


@pytest.mark.parametrize("name", MODELS)
def test_it_says_what_it_is(name):
    model = MODELS[name]()
    assert {type(getattr(model, key)) for key in ("transformer", "fixed_size", "stochastic_depth")} == {bool}
    assert model.pooled_dim == NetworkSpec(name).feature_dim > 0
    sizes = [MODELS[name](stem=stem).min_size for stem in ("imagenet", "small_s2", "small")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1] > sizes[2] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_it_takes_every_option(name):
    rate = {"drop_path": 0.1} if MODELS[name]().stochastic_depth else {}
    options = {"width": 0.5, "bn_groups": 2, "remat": True, "classes": 3, "dtype": jnp.bfloat16, **rate}
    for stem, reduction in (("small", 8), ("small_s2", 16)):
        model = MODELS[name](stem=stem, **options)
        features, variables = shapes(model, 32)
        stride = model.min_size if model.transformer else reduction
        assert features.map.shape[:3] == (2, 32 // stride, 32 // stride)
        assert features.pooled.shape == (2, model.pooled_dim)
        assert features.logits.shape == (2, 3)
        assert {features.map.dtype, features.pooled.dtype} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert model.pooled_dim in {MODELS[name]().pooled_dim // 2, 64 * round(MODELS[name]().pooled_dim / 128)}
