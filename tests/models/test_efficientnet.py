import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import normal, shapes

from ssl_kd.models.efficientnet import EfficientNetB0, EfficientNetB1, EfficientNetLite0
from ssl_kd.models.layers import Conv


@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("imagenet", 224, (112, 56, 28, 14, 7)),
        ("small", 32, (32, 32, 16, 8, 4)),
        ("small_s2", 17, (9, 9, 5, 3, 2)),
    ],
)
def test_stages_and_pooled(stem, size, sides):
    model = EfficientNetB0(stem=stem)
    features, variables = shapes(model, size)
    channels = (16, 24, 40, 112, 320)
    assert [f.shape for f in features.stages] == [(2, n, n, c) for n, c in zip(sides, channels, strict=True)]
    assert features.pooled.shape == (2, model.pooled_dim) == (2, 1280)
    squeezed = [block["se"]["conv_reduce"]["kernel"].shape for block in variables["params"].values() if "se" in block]
    assert len(squeezed) == 16
    assert squeezed[:3] == [(1, 1, 32, 8), (1, 1, 96, 4), (1, 1, 144, 6)]  # a quarter of what enters the block


def test_b1_is_deeper_by_a_tenth_rounded_up():
    blocks = [[*network().architecture.blocks] for network in (EfficientNetB0, EfficientNetB1)]
    counts = [[sum(name.startswith(f"blocks_{i}_") for name in names) for i in range(7)] for names in blocks]
    assert counts == [[1, 2, 2, 3, 3, 4, 1], [2, 3, 3, 4, 4, 5, 2]]


def test_lite_has_no_squeeze_excite():
    assert not any("se" in block for block in shapes(EfficientNetLite0(), 32)[1]["params"].values())


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (7, 10), (1, 2)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("groups", [1, 4])
def test_same_padding_is_tensorflows(size, kernel, stride, groups):
    """XLA's 'SAME' is defined by TensorFlow's rule."""
    x = normal((2, *size, 4))
    params = {"kernel": normal((kernel, kernel, 4 // groups, 4), seed=1)}

    @jax.jit
    def both(x):
        want = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return want, Conv(4, kernel, stride, padding="SAME", groups=groups).apply({"params": params}, x)

    want, got = both(x)
    assert got.shape[1:3] == tuple(-(-n // stride) for n in size)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tensorflows_flavour_sees_other_pixels_at_even_sizes():
    """Stride 2 pads an even side at its end alone: the first output of a 3×3 meets pixels 0, 1, 2, not −1, 0, 1."""
    x = jnp.zeros((1, 4, 4, 1)).at[0, 2, 2].set(1)
    params = {"kernel": jnp.ones((3, 3, 1, 1))}
    same, torch = (Conv(1, 3, 2, padding=padding).apply({"params": params}, x) for padding in ("SAME", None))
    assert same[0, 0, 0, 0] == 1
    assert torch[0, 0, 0, 0] == 0
