import math
from functools import partial

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import apply, branch_rates, normal, parameter_count, shapes
from jax.flatten_util import ravel_pytree

from ssl_kd.errors import UserError
from ssl_kd.models.vit import (
    Attention,
    Block,
    PatchEmbed,
    ViT,
    ViTBase,
    ViTSmall,
    ViTSmallDINOv2,
    ViTSmallReg4DINOv2,
    ViTTiny,
    gelu,
    interpolate_positions,
)


def tiny(**fields):
    return ViT(**{"embed_dim": 8, "depth": 2, "heads": 2, "stem": "small", **fields})


def variables_of(module, *args, **kwargs):
    """Drawn by numpy: compiling jax's generator for every shape would take most of this file's time."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(module.init, **kwargs), jax.random.key(0), *args)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


@pytest.mark.parametrize(("network", "count"), [(ViTTiny, 5_524_416), (ViTSmall, 21_665_664), (ViTBase, 85_798_656)])
def test_parameter_counts_are_dinos(network, count):
    assert parameter_count(shapes(network(), 224)[1]) == count


@pytest.mark.parametrize(
    ("stem", "size", "side"),
    [("imagenet", 224, 14), ("imagenet", 16, 1), ("small", 32, 8), ("small", 4, 1), ("small_s2", 64, 8)],
)
def test_stages_are_maps_of_the_patches(stem, size, side):
    model = tiny(stem=stem, depth=4)
    features, _ = shapes(model, size)
    assert [f.shape for f in features.stages] == 4 * [(2, side, side, 8)]
    assert features.pooled.shape == (2, model.pooled_dim) == (2, 8)
    assert model.min_size * side == size


@pytest.mark.parametrize(("width", "dim"), [(1.0, 384), (0.5, 192), (0.6, 256), (0.01, 64)])
def test_width_scales_the_number_of_heads_of_64_features(width, dim):
    model = ViTSmall(width=width)
    qkv = shapes(model, 16)[1]["params"]["blocks_0"]["attn"]["qkv"]["kernel"]
    assert model.pooled_dim == dim
    assert qkv.shape == (dim, 3 * dim)


def test_last_stage_and_pooled_follow_the_final_layer_norm():
    model, x = tiny(), normal((2, 8, 8, 3))
    variables = variables_of(model, x, norm="running")
    variables["params"]["norm"] = {"scale": jnp.full(8, 2.0), "bias": jnp.full(8, 3.0)}
    features = apply(model, variables, x, "running")
    for tokens in (features.map, features.pooled):
        np.testing.assert_allclose(tokens.mean(-1), 3, rtol=1e-5)
        np.testing.assert_allclose(tokens.std(-1), 2, rtol=1e-3)
    assert np.abs(features.stages[0].mean(-1) - 3).max() > 0.1


def test_patches_are_embedded_by_a_strided_convolution():
    x = normal((2, 11, 9, 3))
    model = PatchEmbed(patch=4, dim=5)
    params = variables_of(model, x)["params"]
    reference = jax.lax.conv_general_dilated(
        x, params["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    out = jax.jit(model.apply)({"params": params}, x)
    assert out.shape == (2, 2, 2, 5)
    np.testing.assert_allclose(out, reference + params["bias"], rtol=1e-4, atol=1e-5)


def test_patch_embedding_starts_as_a_torch_convolution():
    params = PatchEmbed(patch=8, dim=64).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    bound = (8 * 8 * 3) ** -0.5
    for name in ("kernel", "bias"):
        assert np.abs(params[name]).max() <= bound
        np.testing.assert_allclose(params[name].std(), bound / 3**0.5, rtol=0.15)


def test_transformer_starts_as_dinos():
    """Normal with deviation .02, no biases, LayerNorms that do nothing."""
    model = tiny(embed_dim=128)
    params = jax.jit(partial(model.init, norm="batch"))(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    block = params["blocks_0"]
    kernels = (block["attn"]["qkv"], block["attn"]["proj"], block["mlp"]["fc1"], block["mlp"]["fc2"])
    for values in (params["pos_embed"], params["cls_token"], *(layer["kernel"] for layer in kernels)):
        np.testing.assert_allclose(values.std(), 0.02, rtol=0.2)
    for layer in (*kernels, block["norm1"], block["norm2"], params["norm"]):
        np.testing.assert_array_equal(layer["bias"], 0)
    for name in ("norm1", "norm2"):
        np.testing.assert_array_equal(block[name]["scale"], 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
def test_gelu_is_exact(dtype, tolerance):
    x = jnp.linspace(-6, 6, 200).astype(dtype)
    out = gelu(x)
    assert out.dtype == dtype
    reference = [float(a) * (1 + math.erf(float(a) / 2**0.5)) / 2 for a in x]
    np.testing.assert_allclose(out.astype(jnp.float32), reference, rtol=tolerance, atol=1e-6)


def test_another_image_size_gets_interpolated_positions():
    """Those of the patches: the class token keeps its own."""
    model, small = tiny(), normal((2, 8, 12, 3))
    variables = variables_of(model, jnp.zeros((1, 16, 16, 3)), norm="running")
    positions, x = variables["params"]["pos_embed"], normal((2, 2, 3, 8))
    assert positions.shape == (1, 1 + 4 * 4, 8)

    @jax.jit
    def found_and_expected(variables):
        first_inputs = []

        def intercept(function, args, kwargs, context):
            if isinstance(context.module, PatchEmbed):
                return x
            if isinstance(context.module, Block) and context.module.name == "blocks_0":
                first_inputs.append(args[0])
            return function(*args, **kwargs)

        with nn.intercept_methods(intercept):
            features = model.apply(variables, small, norm="running")
        cls = jnp.broadcast_to(variables["params"]["cls_token"], (2, 1, 8))
        as_they_are = jnp.concatenate([positions[:, :1], interpolate_positions(positions[:, 1:], (2, 3))], axis=1)
        return first_inputs[0], jnp.concatenate([cls, x.reshape(2, 6, 8)], 1) + as_they_are, features.map

    found, expected, last = found_and_expected(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert last.shape == (2, 2, 3, 8)


def test_interpolation_leaves_an_equal_grid_alone_and_a_constant_constant():
    positions = normal((1, 9, 4))
    assert interpolate_positions(positions, (3, 3)) is positions
    np.testing.assert_allclose(interpolate_positions(jnp.ones((1, 9, 4)), (5, 2)), 1, rtol=1e-6)


def test_interpolation_of_a_grid_is_by_rows_and_columns():
    """A ramp along one axis stays constant along the other."""
    ramp = jnp.broadcast_to(jnp.arange(4.0)[:, None], (4, 4)).reshape(1, 16, 1)
    out = interpolate_positions(ramp, (6, 3)).reshape(6, 3)
    assert (np.diff(out, axis=0) > 0).all()
    np.testing.assert_allclose(out, out[:, :1].repeat(3, axis=1), rtol=1e-6, atol=1e-6)


def test_antialiased_interpolation_keeps_a_constant_and_averages_when_it_shrinks():
    np.testing.assert_allclose(interpolate_positions(jnp.ones((1, 36, 4)), (2, 9), antialias=True), 1, rtol=1e-6)
    checkered = jnp.where(jnp.indices((6, 6)).sum(0) % 2, 1.0, -1.0).reshape(1, 36, 1)
    assert np.abs(interpolate_positions(checkered, (2, 2), antialias=True)).max() < 0.05
    assert np.abs(interpolate_positions(checkered, (2, 2))).max() > 0.5


@pytest.mark.parametrize(("network", "positions", "before"), [(ViTSmallDINOv2, 1370, 1), (ViTSmallReg4DINOv2, 1369, 5)])
def test_dinov2s_tokens(network, positions, before):
    """14-px patches; with registers the class token has no position."""
    features, variables = shapes(network(), 518)
    params = variables["params"]
    assert params["pos_embed"].shape == (1, positions, 384)
    assert params.get("reg_token", jnp.zeros((1, 0, 384))).shape == (1, before - 1, 384)
    assert params["patch_embed"]["kernel"].shape == (14, 14, 3, 384)
    assert [f.shape for f in features.stages] == 4 * [(2, 37, 37, 384)]
    assert features.pooled.shape == (2, 384)
    assert network().min_size == 14
    assert network(stem="small").min_size == 4


def test_registers_get_no_positions_and_stand_between_class_and_patches():
    model, x = tiny(registers=2, depth=1), normal((2, 8, 8, 3))
    variables = variables_of(model, x, norm="running")
    params = variables["params"]
    assert params["pos_embed"].shape == (1, 4, 8)
    seen = []

    def intercept(function, args, kwargs, context):
        if isinstance(context.module, Block):
            seen.append(args[0])
        return function(*args, **kwargs)

    with nn.intercept_methods(intercept):
        features = model.apply(variables, x, norm="running")
    np.testing.assert_array_equal(seen[0][:, :1], jnp.broadcast_to(params["cls_token"], (2, 1, 8)))
    np.testing.assert_array_equal(seen[0][:, 1:3], jnp.broadcast_to(params["reg_token"], (2, 2, 8)))
    patches = PatchEmbed(patch=4, dim=8).apply({"params": params["patch_embed"]}, x).reshape(2, 4, 8)
    np.testing.assert_allclose(seen[0][:, 3:], patches + params["pos_embed"], rtol=1e-5, atol=1e-5)
    assert features.map.shape == (2, 2, 2, 8)


def test_layer_scale_multiplies_both_branches():
    block, x = Block(heads=1, layer_scale=0.5), normal((3, 2, 4))
    apply = jax.jit(lambda block, variables, *args: block.apply(variables, *args), static_argnums=0)
    variables = variables_of(block, x)
    started = jax.jit(block.init)(jax.random.key(0), x)["params"]
    for name in ("ls1", "ls2"):
        np.testing.assert_array_equal(started[name]["gamma"], jnp.full(4, 0.5))
        variables["params"][name]["gamma"] = jnp.ones(4)
    plain = {name: layer for name, layer in variables["params"].items() if not name.startswith("ls")}
    np.testing.assert_array_equal(apply(block, variables, x), apply(Block(heads=1), {"params": plain}, x))
    variables["params"]["ls2"]["gamma"] = jnp.zeros(4)
    without_mlp = apply(Block(heads=1), {"params": plain}, x, jnp.array([[1.0] * 3, [0.0] * 3]))
    np.testing.assert_array_equal(apply(block, variables, x), without_mlp)
    variables["params"]["ls1"]["gamma"] = jnp.zeros(4)
    np.testing.assert_array_equal(apply(block, variables, x), x)


def test_classes_add_a_classifier_of_the_class_token():
    model, x = tiny(classes=3), normal((2, 8, 8, 3))
    variables = variables_of(model, x, norm="running")
    features = apply(model, variables, x, "running")
    layer = variables["params"]["head"]
    np.testing.assert_allclose(features.logits, features.pooled @ layer["kernel"] + layer["bias"], rtol=1e-4, atol=1e-5)
    assert shapes(tiny(classes=3, dtype=jnp.bfloat16), 8)[0].logits.dtype == jnp.float32


def test_branches_are_scaled_row_by_row():
    block = Block(heads=1, mlp_ratio=1)
    x = normal((3, 2, 4))
    variables = variables_of(block, x)
    whole = block.apply(variables, x)
    np.testing.assert_array_equal(block.apply(variables, x, jnp.zeros((2, 3))), x)
    np.testing.assert_array_equal(block.apply(variables, x, jnp.ones((2, 3))), whole)
    mixed = block.apply(variables, x, jnp.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(mixed[0], whole[0])
    np.testing.assert_array_equal(mixed[1], x[1])
    without_mlp = jax.tree.map(jnp.zeros_like, variables["params"]["mlp"]["fc2"])
    variables["params"]["mlp"]["fc2"] = without_mlp
    np.testing.assert_array_equal(mixed[2], block.apply(variables, x)[2])


def test_drop_path_rises_linearly_over_the_blocks():
    rates = branch_rates(tiny(depth=3, drop_path=0.25), Block)
    np.testing.assert_allclose(rates, [[0.0, 0.0], [0.125, 0.125], [0.25, 0.25]], atol=0.03)


def test_nothing_is_dropped_unless_asked():
    model, x = tiny(drop_path=0.5), normal((8, 4, 4, 3))
    variables = variables_of(model, x, norm="batch")

    @partial(jax.jit, static_argnums=(0, 1))
    def pooled(model, asked, **rngs):
        return model.apply(variables, x, norm="batch", dropout=asked, rngs=rngs).pooled

    still = pooled(model, False)
    np.testing.assert_array_equal(pooled(tiny(), True), still)
    dropped = pooled(model, True, dropout=jax.random.key(0))
    assert np.abs(dropped - still).max() > 1e-3
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):  # the stream it would need
        model.apply(variables, x, norm="batch", dropout=True)


def test_bfloat16_computes_narrow_and_pools_wide():
    x = normal((2, 8, 8, 3))
    features, variables = shapes(tiny(dtype=jnp.bfloat16), 8)
    assert {f.dtype for f in features.stages} == {jnp.dtype(jnp.bfloat16)}
    assert features.pooled.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}

    variables = variables_of(tiny(), x, norm="batch")

    def grad(dtype):
        def loss(params):
            return jnp.mean(tiny(dtype=dtype).apply({"params": params}, x, norm="batch").pooled[:, 0])

        return jax.jit(jax.grad(loss))(variables["params"])

    narrow, wide = (ravel_pytree(grad(dtype))[0] for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow.dtype == jnp.float32
    assert jnp.linalg.norm(narrow - wide) < 0.1 * jnp.linalg.norm(wide)


def test_remat_computes_more_and_the_same():
    """Also the same drops: the recomputation draws them again."""
    x = normal((2, 8, 8, 3))
    variables = variables_of(tiny(), x, norm="batch")

    def compiled(model):
        def loss(params):
            rngs = {"dropout": jax.random.key(5)}
            return jnp.sum(model.apply({"params": params}, x, norm="batch", dropout=True, rngs=rngs).pooled ** 2)

        return jax.jit(jax.value_and_grad(loss)).lower(variables["params"]).compile()

    plain, remat = compiled(tiny(drop_path=0.5)), compiled(tiny(drop_path=0.5, remat=True))
    assert plain.cost_analysis()["flops"] < remat.cost_analysis()["flops"]
    for a, b in zip(*(jax.tree.leaves(step(variables["params"])) for step in (plain, remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (tiny(stem="cifar"), (1, 8, 8, 3), "imagenet, small, small_s2"),
        (tiny(), (1, 8, 4, 3), "2 patches do not fill a square"),
    ],
)
def test_mistakes_are_user_errors(model, x, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(partial(model.init, norm="batch"), jax.random.key(0), jnp.zeros(x))


def test_heads_that_do_not_divide_the_width_are_a_user_error():
    with pytest.raises(UserError, match="3 attention heads do not divide 8"):
        jax.eval_shape(Attention(heads=3).init, jax.random.key(0), jnp.zeros((1, 2, 8)))
