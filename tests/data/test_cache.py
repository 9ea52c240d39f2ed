"""A teacher's features on disk: what is read is what the teacher would say, and a stopped command goes on."""

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import Rig, source_of, tiny_config, worst
from pictures import encode, noise

from ssl_kd import run as run_module
from ssl_kd.data import cache as module
from ssl_kd.data.cache import FeatureCache
from ssl_kd.data.sources import open_source
from ssl_kd.errors import UserError
from ssl_kd.images import Images
from ssl_kd.models import Network
from ssl_kd.run import SAMPLED, fingerprint, prepare
from ssl_kd.step import TrainStep
from ssl_kd.train import fit


def cached_config(method, views=2, **fields):
    c = tiny_config(method, **fields)
    c.teacher.cache_views = views
    c.bn_groups = 2  # shuffles the keys
    return c


def features_of(rig, step):
    """What a cache would bring along for a batch, computed by hand."""
    train_step = TrainStep(rig.recipe, rig.mesh)
    spec, frozen = rig.recipe.specs["teacher"], rig.frozen["teacher"]
    index = rig.batch(step)["index"]
    batch = {"index": index, "image": rig.data.image[index]}
    views = train_step.views(step, batch, index, None)
    seen = {name: Network(spec).apply(frozen, view, norm="running", method="features") for name, view in views.items()}
    return {name: features.pooled.astype(module.FEATURE_DTYPE) for name, features in seen.items()}


def test_features_of_a_cache_stand_in_for_the_teacher():
    """DisCo's teacher sees two views, one of them shuffled."""
    rig = Rig(cached_config("disco"))
    batch, cached = rig.batch(0), jax.jit(lambda: features_of(rig, 0))()
    looked, looked_at = rig.step(rig.create(), rig.frozen, batch, rig.data)
    read, read_at = rig.step(rig.create(), rig.frozen, {**batch, "cached": cached}, rig.data)
    assert abs(read_at["loss"] - looked_at["loss"]) < 2e-4 * looked_at["loss"]
    assert worst(looked.trained, read.trained) < 2e-3
    for other in (jnp.negative, lambda rows: rows[::-1]):  # signs, and whose they are, matter
        _, others = rig.step(rig.create(), rig.frozen, {**batch, "cached": jax.tree.map(other, cached)}, rig.data)
        assert abs(others["loss"] - looked_at["loss"]) > 1e-3 * looked_at["loss"]


def test_an_images_views_repeat_after_as_many_epochs_wherever_it_stands():
    rig = Rig(cached_config("simreg"))
    step, per_epoch = TrainStep(rig.recipe, rig.mesh), rig.recipe.steps_per_epoch
    index = np.arange(8, dtype=np.int32)

    @jax.jit
    def views(number, index):
        return step.views(number, {"index": index, "image": rig.data.image[index]}, index, None)["image"]

    first = views(1, index)
    np.testing.assert_array_equal(first, views(2 * per_epoch, index))
    np.testing.assert_array_equal(first, views(1, index[::-1])[::-1])
    assert np.abs(first - views(per_epoch, index)).max(axis=(1, 2, 3)).min() > 0.01


NUMBERS, IMAGES, WIDTH = 2, 10, 3


def values(index, number):
    return {"image": (10 * number + index[:, None] + np.arange(WIDTH) / 8).astype(np.float32)}


def filled(directory, compute=values, identity=None, **changes):
    cache = FeatureCache(directory, ("image",), NUMBERS, IMAGES, WIDTH)
    dataclasses.replace(cache, **changes).fill(compute, identity or {"data": "these"}, batch_size=4)
    return cache


def test_rows_are_the_features_of_the_epochs_views(tmp_path):
    cache = filled(tmp_path / "new")
    index = np.array([7, 0, 9], np.int32)
    for epoch in range(4):
        rows = cache.rows(index, epoch)["image"]
        assert rows.dtype == np.float16 and type(rows) is np.ndarray
        np.testing.assert_array_equal(rows, values(index, epoch % 2)["image"])


@pytest.mark.parametrize("stopped_after", [1, 2, 4])
def test_a_stopped_command_goes_on_behind_what_is_written(tmp_path, stopped_after):
    whole = filled(tmp_path / "whole")
    computed = []

    def dies(index, number):
        if len(computed) == stopped_after:
            raise KeyboardInterrupt
        computed.append((number, index[0]))
        return values(index, number)

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "stopped", dies)
    with (tmp_path / "stopped" / "image-0.float16").open("ab") as file:
        file.write(b"x")  # half a row
    filled(tmp_path / "stopped", lambda index, number: computed.append((number, index[0])) or values(index, number))
    blocks = {(number, start) for number in range(NUMBERS) for start in (0, 4, 8)}
    assert set(computed) == blocks and len(computed) <= len(blocks) + 1  # the one in flight was lost
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "stopped" / file.name).read_bytes()
    filled(tmp_path / "stopped", lambda *_: pytest.fail("it is whole"))
    assert whole.rows(np.arange(2), 0)["image"].shape == (2, WIDTH)


def test_other_features_are_refused_by_what_differs(tmp_path):
    filled(tmp_path)
    with pytest.raises(UserError, match=r"holds other features: data \('these' there, 'those' now\)\. Delete it"):
        filled(tmp_path, identity={"data": "those"})
    with pytest.raises(UserError, match=r"numbers \(2 there, 3 now\)"):
        filled(tmp_path, numbers=3)
    with pytest.raises(UserError, match=r"images \(10 there, 9 now\)"):
        filled(tmp_path, images=9)
    for text in ("{", "[1]", "7"):
        (tmp_path / module.IDENTITY).write_text(text)
        with pytest.raises(UserError, match=r"features\.json is damaged"):
            filled(tmp_path)


@pytest.mark.parametrize("process", [0, 1])
def test_a_directory_that_cannot_be_written_is_known_to_every_process_at_once(process, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file.below .*set teacher\.cache_path"):
        filled(tmp_path / "file" / "below", lambda *_: pytest.fail("it cannot be kept"))


def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"features of images 0 to 3 are not finite in 16 bits"):
        filled(tmp_path / "large", lambda index, number: {"image": np.full((4, WIDTH), 1e6)})
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(7))
    with pytest.raises(UserError, match=r"has no room for 0 MiB of features.*lower teacher\.cache_views"):
        filled(tmp_path / "full")


def test_a_run_with_a_cache_ends_and_another_shares_it(tmp_path, monkeypatch):
    def run(name):
        c = runs.config()
        tiny = cached_config("simreg")
        c.method, c.student, c.teacher, c.epochs = tiny.method, tiny.student, tiny.teacher, 2.0
        c.teacher.cache_path = str(tmp_path / "features")
        return runs.prepared(c, tmp_path / name, untrained=True)

    first = run("one")
    assert first.cached_views == ("image",)
    one = fit(first)
    index = json.loads((tmp_path / "features" / module.IDENTITY).read_text())
    assert index["numbers"] == 2 and (tmp_path / "features" / "image-1.float16").stat().st_size == 96 * 32 * 2
    monkeypatch.setattr(FeatureCache, "_look", lambda *_: pytest.fail("it is whole"))
    two = fit(run("two"))
    assert one["student"] == two["student"]


# --- of which images


SIDE, COUNT = 28, 20


def pictures(folder: Path, seed: int) -> Path:
    folder.mkdir()
    for i, image in enumerate(noise(COUNT, SIDE, SIDE, seed)):
        (folder / f"{i:02}.png").write_bytes(encode(image))
    return folder


def test_the_fingerprint_is_of_the_chosen_images_as_decoded_wherever_they_lie(tmp_path):
    """Also of a set that has an unreadable image among those looked at, the first."""
    folder = pictures(tmp_path / "a", 0)

    def of(folder, split="all", canvas=SIDE):
        return fingerprint(open_source(f"folder:{folder}", split, canvas))

    here = of(folder)
    assert here == of(folder) == of(shutil.copytree(folder, tmp_path / "b")) == of(folder, canvas=SIDE + 1)
    (tmp_path / "b" / "00.png").write_bytes(b"")
    others = [
        of(pictures(tmp_path / "c", 1)),
        of(folder, canvas=SIDE // 2),
        *(of(folder, f"all[{rows}]") for rows in (":10", "10:", ":1", "1:")),
        of(tmp_path / "b"),
    ]
    assert len({here, *others}) == 1 + len(others)
    assert of(tmp_path / "b") == of(shutil.copytree(tmp_path / "b", tmp_path / "d"))


def test_the_fingerprint_looks_at_sixteen_images_pixels_and_sizes_and_at_how_many_there_are():
    pixels = noise(301, 4, 5)
    looked_at = np.arange(SAMPLED) * 20
    here = fingerprint(source := source_of(pixels))
    assert sorted(source.reader.rows_read) == looked_at.tolist()
    for i in (0, 20, 300, 7):
        changed = pixels.copy()
        changed[i, 3, 4, 2] ^= 1
        assert (fingerprint(source_of(changed)) == here) == (i not in looked_at)
    black = np.zeros((301, 4, 5, 3), np.uint8)
    alike = source_of(black)
    smaller = dataclasses.replace(alike, reader=type(alike.reader)(black[:, :3]))
    found = {fingerprint(alike), fingerprint(smaller), fingerprint(source_of(black[:300]))}
    assert len(found | {fingerprint(source_of(black[:, :3]))}) == 4


@pytest.mark.parametrize("method", ["bingo", "simreg"])
def test_bags_and_features_are_used_for_the_same_images_elsewhere_and_for_no_others(method, tmp_path, monkeypatch):
    """What the teacher makes of images is not computed here: rows that tell whether it was asked."""
    asked, fill = [], FeatureCache.fill

    def compute(index, number):
        asked.append(number)
        return {"image": np.zeros((len(index), 32), np.float32)}

    def extract(apply, images: Images, **_):
        asked.append(len(images))
        return noise(len(images), 1, 1)[:, 0, 0].astype(np.float32)

    monkeypatch.setattr(run_module, "extract", extract)
    monkeypatch.setattr(FeatureCache, "fill", lambda self, _, *rest: fill(self, compute, *rest))
    kept, here, moved = tmp_path / "kept", tmp_path / "images", tmp_path / "moved"
    place = {"method.bag_path": str(kept)} if method == "bingo" else {"teacher.cache_path": str(kept)}
    c = runs.config(method, **place, **{"data.source": f"folder:{pictures(here, 0)}", "data.train": "all"})
    c.data.test, c.teacher.cache_views = "all", int(method != "bingo")
    run = prepare(c, tmp_path, untrained=True)

    def use(folder):
        run.config.data.source = f"folder:{folder}"
        run.train = open_source(run.config.data.source, "all", SIDE)
        return run.bags() if method == "bingo" else run.cache()

    use(here)
    assert asked
    asked.clear()
    here.rename(moved)
    use(moved)
    pictures(here, 1)
    remedy = "delete it to have the bags mined anew" if method == "bingo" else "Delete it to have them computed anew"
    with pytest.raises(UserError, match=rf"kept holds other .*images {COUNT} \w{{16}}, .* there, .* now.*{remedy}"):
        use(here)
    old = f"folder:{moved} all, canvas 32, image_size {SIDE}, teacher's entry …"  # as files had it that named the place
    if method == "bingo":
        with np.load(kept) as arrays:
            identity, indices = json.loads(str(arrays["identity"])), arrays["indices"]
        with kept.open("wb") as file:
            np.savez(file, identity=np.array(json.dumps(identity | {"data": old})), indices=indices)
    else:
        identity = json.loads((kept / module.IDENTITY).read_text())
        (kept / module.IDENTITY).write_text(json.dumps(identity | {"data": old}))
    with pytest.raises(UserError, match=rf"kept holds other .*folder:.*there.*{remedy}"):
        use(moved)
    assert not asked


@pytest.mark.parametrize(
    ("method", "fields", "sentence"),
    [
        ("bingo", {}, "mixtures, mates or whole batches: set it to 0"),
        ("disco", {"teacher_norm": "batch"}, "method.name='disco' as it is set shows it mixtures, mates or whole"),
        ("rekd", {}, r"teacher.cache_views=2 is for a frozen teacher"),
    ],
)
def test_methods_it_does_not_fit_refuse_it_at_once(method, fields, sentence, tmp_path):
    config = cached_config(method, **fields)
    config.image_size, config.data.train = 28, "train[:96]"
    with pytest.raises(UserError, match=sentence):
        prepare(config, tmp_path, untrained=True)
