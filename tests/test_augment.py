import colorsys
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_kd import augment as module
from ssl_kd.augment import PRESETS, Augmentation, augment, blur_matrix, crop_box, cutmix
from ssl_kd.errors import UserError
from ssl_kd.images import Images

GOLDEN = np.load(Path(__file__).parent / "golden" / "augment.npz")
EIGHT_BIT = 1.5 / 255  # Pillow truncates each blend to 8 bits and rounds its grays
ORDER = jax.random.key(99)
STILL = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)  # a square image comes back as it is

QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of this file's time

jitted = jax.jit(augment, static_argnames=("spec", "size"), compiler_options=QUICK)


def views(images, spec, size, seed=0, order_key=ORDER):
    images = images if isinstance(images, Images) else Images.whole(images)
    return np.asarray(jitted(images, keys(len(images), seed), order_key, spec=spec, size=size))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def noise(*shape):
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def golden_planes():
    return np.moveaxis(GOLDEN["image"], -1, 0).astype(np.float32) / 255


# --- the whole view


@pytest.mark.parametrize(
    ("preset", "shape", "size"), [("grey", (28, 28), 28), *((preset, (40, 60), 32) for preset in PRESETS)]
)
def test_a_view_is_float32_in_the_unit_range(preset, shape, size):
    out = views(noise(6, *shape, 3), PRESETS[preset], size)
    assert out.shape == (6, size, size, 3) and out.dtype == np.float32
    assert out.min() >= 0 and out.max() <= 1 and np.isfinite(out).all()
    assert out.std(axis=(1, 2)).min() > 0.02  # no image is lost


def test_images_that_are_not_uint8_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        augment(Images.whole(jnp.zeros((1, 8, 8, 3))), keys(1), ORDER, STILL, 8)


def test_a_still_augmentation_is_the_image_over_255():
    images = noise(3, 20, 20, 3)
    np.testing.assert_allclose(views(images, STILL, 20), images / 255, atol=1e-6)


def test_a_view_depends_on_its_image_and_key_alone():
    images, spec = noise(6, 40, 60, 3), PRESETS["mocov2"]
    together = views(images, spec, 32)
    turned = jitted(Images.whole(images[::-1]), keys(6)[::-1], ORDER, spec=spec, size=32)
    np.testing.assert_allclose(turned[::-1], together, atol=1e-6)
    two = jitted(Images.whole(images[3:5]), keys(6)[3:5], ORDER, spec=spec, size=32)
    np.testing.assert_allclose(two, together[3:5], atol=1e-6)
    assert np.abs(views(images, spec, 32, seed=1) - together).mean(axis=(1, 2, 3)).min() > 0.01


def on_a_canvas(image, height, width):
    """The image in its corner, amid noise that nothing may see."""
    canvas = np.random.default_rng(8).integers(0, 256, (height, width, 3), np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return canvas


def test_a_view_of_an_image_on_a_canvas_is_the_view_of_the_image_alone():
    """Upright, lying, tiny and whole: whatever else is on the canvas."""
    shapes, spec, seed = [(60, 40), (25, 64), (1, 1), (64, 64)], Augmentation(jitter=0.8, contrast=0.4), 5
    alone = [noise(*shape, 3) for shape in shapes]
    pixels = np.stack([on_a_canvas(image, 64, 64) for image in alone])
    found = views(Images(pixels, np.int32(shapes)), spec, 24, seed)
    for k, image in enumerate(alone):
        of_one = jitted(Images.whole(image[None]), keys(4, seed)[k : k + 1], ORDER, spec=spec, size=24)
        np.testing.assert_allclose(found[k], of_one[0], atol=1e-5)
    assert found[[0, 1, 3]].std(axis=(1, 2)).min() > 0.02


def test_switching_an_operation_on_leaves_the_draws_of_the_others():
    images = noise(4, 24, 24, 3)
    base = Augmentation(flip=0.0, jitter=0.8, brightness=0.4)
    plain = views(images, base, 16)

    def with_(**change):
        return views(images, dataclasses.replace(base, **change), 16)

    gray = plain @ np.float32([0.2989, 0.587, 0.114])
    np.testing.assert_allclose(with_(grayscale=1.0), np.repeat(gray[..., None], 3, -1), atol=1e-5)
    np.testing.assert_allclose(with_(solarize=1.0), np.where(plain >= 0.5, 1 - plain, plain), atol=1e-5)
    fixed = with_(blur=1.0, blur_sigma=(1.3, 1.3))
    matrix = np.asarray(jax.jit(blur_matrix, static_argnums=(1, 2))(1.3, 1.3, 16))
    np.testing.assert_allclose(fixed, np.einsum("sh,bhwc,tw->bstc", matrix, plain, matrix), atol=1e-5)
    np.testing.assert_allclose(with_(flip=1.0), plain[:, :, ::-1], atol=1e-5)


def test_boxes_and_mirrors_read_back_from_a_ramp():
    """Red counts rows and green columns, so an enlarged view tells its box: slope = length / size, offset = start."""
    height, width, size, count = 40, 60, 64, 400
    row, column = np.mgrid[:height, :width]
    image = np.stack([4 * row, 4 * column, 0 * row], -1).astype(np.uint8)
    pixels = np.broadcast_to(on_a_canvas(image, 64, 64), (count, 64, 64, 3))
    out = views(Images(pixels, np.broadcast_to(np.int32([height, width]), (count, 2))), PRESETS["weak"], size) * 255 / 4
    middle = slice(size // 2 - 4, size // 2 + 4)  # far from the border of the image, where the ramp stops

    def box(line):
        slope = np.diff(line[:, middle], axis=1).mean(axis=1)
        start = line[:, middle].mean(axis=1) + 0.5 - slope * size / 2
        return slope * size, start

    box_height, top = box(out[:, :, size // 2, 0])
    signed_width, left = box(out[:, size // 2, :, 1])
    mirrored = signed_width < 0
    box_width, left = np.abs(signed_width), np.where(mirrored, left + signed_width, left)
    for whole in (box_height, box_width, top, left):
        np.testing.assert_allclose(whole, np.round(whole), atol=5e-3)
    assert top.min() > -0.01 and (top + box_height).max() < height + 0.01
    assert left.min() > -0.01 and (left + box_width).max() < width + 0.01
    assert 0.4 < mirrored.mean() < 0.6  # 4 standard deviations
    assert len({tuple(b) for b in np.round([top, left, box_height, box_width]).T}) > 380


def distance_from_uniform(sample, low, high):
    """Kolmogorov and Smirnov's: the largest difference of the distribution functions."""
    below = (np.sort(sample) - low) / (high - low)
    steps = np.arange(len(sample) + 1) / len(sample)
    return max(np.abs(below - steps[:-1]).max(), np.abs(below - steps[1:]).max())


def chance_bound(count):
    """What a uniform sample exceeds once in a thousand times."""
    return 1.95 / np.sqrt(count)


def hues(colours):
    return np.array([colorsys.rgb_to_hsv(*map(float, colour))[0] for colour in colours])


DARK, LIGHT, RED = (90, 90, 90), (130, 130, 130), (150, 90, 70)
FACTORS = {
    "brightness": (0.4, 1.0, lambda dark, light, red: dark[:, 0] * 255 / 90),
    "contrast": (0.4, 1.0, lambda dark, light, red: (light - dark)[:, 0] * 255 / 40),
    "saturation": (0.4, 1.0, lambda dark, light, red: (red[:, 0] - red[:, 1]) * 255 / 60),
    "hue": (0.1, 0.0, lambda dark, light, red: (hues(red) - hues([np.divide(RED, 255)]) + 0.5) % 1 - 0.5),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_of_the_jitter_are_uniform_about_what_changes_nothing(name):
    """Read back from a picture of four pixels."""
    strength, neutral, factor_of = FACTORS[name]
    pictures = np.broadcast_to(np.uint8([[DARK, LIGHT], [RED, RED]]), (3000, 2, 2, 3))
    out = views(pictures, dataclasses.replace(STILL, jitter=0.8, **{name: strength}), 2)
    factor = factor_of(out[:, 0, 0], out[:, 0, 1], out[:, 1, 0])
    untouched = np.abs(out - pictures / 255).max(axis=(1, 2, 3)) < 1e-6
    assert abs(untouched.mean() - 0.2) < 0.03  # 4 standard deviations
    touched = factor[~untouched]
    assert np.abs(touched - neutral).max() < strength + 1e-4
    assert distance_from_uniform(touched, neutral - strength, neutral + strength) < chance_bound(len(touched))


def test_strengths_above_one_keep_factors_above_zero():
    """A factor in [0, 3] and an image of one gray: a negative factor would clip to black far too often."""
    spec = dataclasses.replace(STILL, jitter=1.0, brightness=2.0)
    out = views(np.full((300, 2, 2, 3), 51, np.uint8), spec, 2)[:, 0, 0, 0] * 5
    assert (out > 0).mean() > 0.99 and out.max() <= 3 + 1e-5 and abs(out.mean() - 1.5) < 0.2


def test_operations_happen_as_often_as_they_should_and_independently():
    images = np.broadcast_to(noise(1, 6, 6, 3), (400, 6, 6, 3))
    base = dataclasses.replace(STILL, brightness=0.4, blur_sigma=(1.0, 2.0))
    happened = []
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        out = views(images, dataclasses.replace(base, **{name: 0.3}), 6)
        happened.append(np.abs(out - images / 255).max(axis=(1, 2, 3)) > 1e-4)
    together = np.array(happened, float) @ np.transpose(happened) / 400  # (5, 5): how often both of a pair
    np.testing.assert_allclose(np.diag(together), 0.3, atol=0.092)  # 4 standard deviations, here and below
    np.testing.assert_allclose(together[~np.eye(5, dtype=bool)], 0.09, atol=0.057)


# --- the order of the jitter


def test_two_operations_have_two_orders_and_the_batch_shares_one():
    images = noise(4, 12, 12, 3) // np.uint8([1, 2, 4])  # reddish: turning the hue moves the mean gray of the contrast
    spec = dataclasses.replace(STILL, jitter=1.0, contrast=0.8, hue=0.4)
    outcomes = np.stack([views(images, spec, 12, order_key=jax.random.key(seed)) for seed in range(12)])
    first = np.abs(outcomes - outcomes[0]).max(axis=(2, 3, 4))  # (order key, image): distance to the first order
    second = first.max(axis=1) > 1e-4
    assert 0 < second.sum() < 12
    assert (first[second] > 1e-4).all() and (first[~second] < 1e-6).all()


def test_the_order_is_a_switch_that_runs_one_branch():
    """Under vmap a switch on a batched index becomes a select of all branches; ours must stay a `cond`."""
    for preset, operations in (("small", 4), ("grey", 2), ("weak", 0)):
        traced = functools.partial(augment, spec=PRESETS[preset], size=8)
        text = str(jax.make_jaxpr(traced)(Images.whole(noise(2, 8, 8, 3)), keys(2), ORDER))
        assert text.count(" cond[") == operations, preset


# --- what costs nothing


@pytest.mark.parametrize(
    ("preset", "absent"),
    [
        ("weak", {"brightness", "contrast", "saturation", "hue", "grayscale", "blur_matrix", "solarize"}),
        ("grey", {"saturation", "hue", "grayscale", "blur_matrix", "solarize"}),
        ("small", {"blur_matrix", "solarize"}),
        ("mocov2", {"solarize"}),
    ],
)
def test_operations_a_preset_does_not_use_are_not_traced(monkeypatch, preset, absent):
    called = set()
    for name in ("brightness", "contrast", "saturation", "hue", "grayscale", "blur_matrix", "solarize"):
        original = getattr(module, name)

        def spy(*arguments, name=name, original=original):
            called.add(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, spy)
    traced = functools.partial(augment, spec=PRESETS[preset], size=8)
    jax.make_jaxpr(traced)(Images.whole(noise(2, 8, 8, 3)), keys(2), ORDER)
    assert absent.isdisjoint(called)
    assert called | absent == {"brightness", "contrast", "saturation", "hue", "grayscale", "blur_matrix", "solarize"}


# --- crop boxes


def boxes(draws, height, width, spec):
    draw = jax.jit(jax.vmap(lambda row: jnp.stack(crop_box(row, height, width, spec))), compiler_options=QUICK)
    return np.asarray(draw(jnp.asarray(draws)))


def uniforms(count):
    return np.random.default_rng(3).random((count, 22), dtype=np.float32)


def torchvision_box(draws, height, width, scale, ratio):
    """RandomResizedCrop.get_params, its random numbers given: ten areas, ten ratios, top and left."""
    for area_draw, ratio_draw in zip(draws[:10], draws[10:20], strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        log_ratio = np.log(ratio)
        aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * ratio_draw)
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (28, 28, (0.2, 1.0), (3 / 4, 4 / 3)),
        (40, 60, (0.2, 1.0), (3 / 4, 4 / 3)),
        (224, 160, (0.05, 0.25), (3 / 4, 4 / 3)),
        (20, 60, (0.3, 1.0), (3 / 4, 4 / 3)),  # most images fall back to the centre
        (60, 20, (0.3, 1.0), (3 / 4, 4 / 3)),
        (40, 50, (1.0, 1.0), (0.5, 1.6)),  # and here to the whole image
    ],
)
def test_boxes_are_torchvisions(height, width, scale, ratio):
    draws = uniforms(500)
    expected = [torchvision_box(row.astype(np.float64), height, width, scale, ratio) for row in draws]
    ours = boxes(draws, height, width, Augmentation(crop_scale=scale, crop_ratio=ratio))
    assert (ours == expected).all(axis=1).mean() > 0.99  # float32 may round a side that ends in one half the other way


@pytest.mark.parametrize(("height", "width"), [(900, 700), (700, 900), (1000, 1000)])
def test_area_ratio_and_place_of_boxes_have_their_laws(height, width):
    """Every candidate fits, and whole pixels of so many are finer than the bound."""
    draws = jax.vmap(lambda key: module._uniform(key, module._CROP, 22))(keys(4000, seed=height))
    top, left, box_height, box_width = boxes(
        draws, float(height), float(width), Augmentation(crop_scale=(0.2, 0.5), crop_ratio=(3 / 4, 4 / 3))
    ).T
    laws = {
        "area": (box_height * box_width / (height * width), 0.2, 0.5),
        "ratio": (np.log(box_width / box_height), np.log(3 / 4), np.log(4 / 3)),
        "top": ((top + 0.5) / (height - box_height + 1), 0.0, 1.0),
        "left": ((left + 0.5) / (width - box_width + 1), 0.0, 1.0),
    }
    for name, (sample, low, high) in laws.items():
        assert distance_from_uniform(sample, low, high) < chance_bound(4000), name
    together = np.corrcoef([sample for sample, _, _ in laws.values()])
    assert np.abs(together[~np.eye(4, dtype=bool)]).max() < 4 / np.sqrt(4000)


def test_the_central_fallback_has_the_nearest_allowed_ratio():
    spec = Augmentation(crop_scale=(0.9, 1.0))  # no candidate fits so long an image
    np.testing.assert_array_equal(boxes(uniforms(20), 10, 100, spec), np.tile((0, 43, 10, 13), (20, 1)))
    np.testing.assert_array_equal(boxes(uniforms(20), 100, 10, spec), np.tile((43, 0, 13, 10), (20, 1)))


# --- blur


@pytest.mark.parametrize(("sigma", "sigma_max", "size"), [(0.1, 2.0, 28), (0.7, 2.0, 9), (2.0, 2.0, 28), (1.5, 2.0, 4)])
def test_blur_is_a_loop_over_a_reflected_neighbourhood(sigma, sigma_max, size):
    image = noise(size, size) / 255
    radius = min(int(np.ceil(3 * sigma_max)), size - 1)
    distances = range(-radius, radius + 1)
    kernel = np.array([np.exp(-(d**2) / (2 * sigma**2)) for d in distances])
    kernel /= kernel.sum()

    def reflect(place):
        return -place if place < 0 else 2 * (size - 1) - place if place >= size else place

    expected = np.zeros_like(image)
    for y in range(size):
        for x in range(size):
            for wy, dy in zip(kernel, distances, strict=True):
                for wx, dx in zip(kernel, distances, strict=True):
                    expected[y, x] += wy * wx * image[reflect(y + dy), reflect(x + dx)]
    matrix = np.asarray(jax.jit(blur_matrix, static_argnums=(1, 2))(sigma, sigma_max, size))
    np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=1e-5)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


# --- colour


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_enhancers_against_pillow_and_the_float_formula(name):
    planes = golden_planes()
    gray = np.tensordot([0.2989, 0.587, 0.114], planes.astype(np.float64), 1)
    other = {"brightness": 0.0, "contrast": gray.mean(), "saturation": gray}[name]
    for factor, pillow in zip(GOLDEN["factors"], GOLDEN[name], strict=True):
        out = np.asarray(getattr(module, name)(planes, float(factor)))
        np.testing.assert_allclose(out, np.clip(factor * planes + (1 - factor) * other, 0, 1), atol=1e-6)
        np.testing.assert_allclose(np.moveaxis(out, 0, -1), pillow / 255, atol=EIGHT_BIT)


def test_grayscale_and_solarize_against_pillow_and_the_float_formula():
    planes = golden_planes()
    gray = np.asarray(module.grayscale(planes))
    np.testing.assert_allclose(gray, np.tile(np.tensordot([0.2989, 0.587, 0.114], planes, 1), (3, 1, 1)), atol=1e-6)
    np.testing.assert_allclose(gray[0], GOLDEN["grayscale"] / 255, atol=EIGHT_BIT)
    solarized = np.moveaxis(np.asarray(module.solarize(planes)), 0, -1)
    np.testing.assert_allclose(solarized, GOLDEN["solarize"] / 255, atol=1e-6)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.07, 0.1, 0.5])
def test_hue_against_colorsys(shift):
    corners = [(r, g, b) for r in (0, 0.5, 1) for g in (0, 0.5, 1) for b in (0, 0.5, 1)]  # grays, primaries, ties
    colours = np.concatenate([corners, np.random.default_rng(2).random((200, 3))]).astype(np.float32)
    expected = []
    for colour in colours:
        h, s, v = colorsys.rgb_to_hsv(*map(float, colour))
        expected.append(colorsys.hsv_to_rgb((h + shift) % 1, s, v))
    out = module.hue(jnp.asarray(colours.T[:, None, :]), shift)
    np.testing.assert_allclose(np.asarray(out)[:, 0].T, expected, atol=2e-6)


# --- what a user can get wrong


@pytest.mark.parametrize(
    "mistake",
    [
        {"flip": 1.2},
        {"blur": -0.1},
        {"jitter": float("nan")},
        {"contrast": -1.0},
        {"hue": 0.6},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.2, 1.1)},
        {"crop_ratio": (2.0, 1.0)},
        {"blur_sigma": (0.0, 2.0)},
    ],
)
def test_a_value_outside_its_range_is_named(mistake):
    with pytest.raises(UserError, match=f"'{next(iter(mistake))}'"):
        Augmentation(**mistake)


# --- CutMix


@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("case", range(3))
def test_cutmix_is_the_authors(golden, exact, case):
    fixture = golden("bingo_loss")
    with jax.enable_x64(exact):
        a, b = (jnp.moveaxis(jnp.asarray(fixture[f"in_cutmix_{name}"]), 1, -1) for name in "ab")
        lam = jnp.asarray(fixture["in_cutmix_lam_drawn"][case], jnp.float64 if exact else jnp.float32)
        mixed, share = jax.jit(cutmix, compiler_options=QUICK)(a, b, lam, fixture["in_cutmix_center"][case])
        np.testing.assert_array_equal(np.moveaxis(mixed, -1, 1), fixture["out_cutmix"][case])
        assert share.dtype == lam.dtype and float(share) == fixture["out_cutmix_lam"][case]  # a sum of eighths


@pytest.mark.parametrize(("height", "width"), [(12, 16), (7, 7), (1, 9)])
def test_cutmix_pastes_one_clipped_box_and_returns_the_share_that_is_left(height, width):
    rng = np.random.default_rng(0)
    a, b = np.zeros((2, height, width, 3), np.float32), np.ones((2, height, width, 3), np.float32)
    compiled = jax.jit(cutmix, compiler_options=QUICK)
    for lam in rng.beta(1, 1, 30).astype(np.float32):
        centre = rng.integers(0, (height, width))
        mixed, share = compiled(a, b, lam, centre)
        expected = a.copy()
        half_y, half_x = (int(side * np.sqrt(1 - lam)) // 2 for side in (height, width))
        for y in range(max(0, centre[0] - half_y), min(height, centre[0] + half_y)):
            for x in range(max(0, centre[1] - half_x), min(width, centre[1] + half_x)):
                expected[:, y, x] = 1
        np.testing.assert_array_equal(mixed, expected)
        np.testing.assert_allclose(share, 1 - expected.mean(), atol=1e-6)


def test_cutmix_at_its_ends():
    a, b = noise(2, 8, 8, 3) / 255, 1 - noise(2, 8, 8, 3) / 255
    for lam, expected in ((1.0, a), (0.0, b)):
        mixed, share = cutmix(a, b, lam, np.array([4, 4]))
        np.testing.assert_array_equal(mixed, np.float32(expected))
        assert share == lam
