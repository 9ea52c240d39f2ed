"""MOKD's and SimReg's heads and losses against the authors' own numbers."""

import math
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_golden import Check, Fixed, precisions

from ssl_kd.losses import dino_loss, soft_cross_entropy
from ssl_kd.methods import Context
from ssl_kd.methods.mokd import MOKD
from ssl_kd.methods.simreg import SimReg
from ssl_kd.models.heads import DINOHead, RegressionHead, THead, TokenReduce
from ssl_kd.models.vit import interpolate_positions

# The references' names of layers, as regular expressions, and ours.
REGRESSION = {
    4: {"0": "fc1", "1": "bn1", "3": "fc2", "4": "fc3", "5": "bn2", "7": "fc4"},
    2: {"0": "fc1", "1": "fc2"},
}
MOKD_LAYERS = {
    r"mlp\.0": "fc1",
    r"mlp\.2": "fc2",
    r"mlp\.4": "fc3",
    "last_layer": "last",
    r"blocks\.(\d)": r"blocks_\1",
}
LEAVES = {"weight_v": "v", "weight_g": "g", "running_mean": "mean", "running_var": "var"}


def our_path(name, layers, ndim):
    """'blocks.0.norm1.weight' -> ('blocks_0', 'norm1', 'scale')."""
    *module, leaf = name.split(".")
    module = ".".join(module)
    for theirs, ours in layers.items():
        renamed = re.sub(rf"^{theirs}(?=\.|$)", ours, module)
        if renamed != module:
            module = renamed
            break
    leaf = {**LEAVES, "weight": "scale" if ndim == 1 else "kernel"}.get(leaf, leaf)
    return (*filter(None, module.split(".")), leaf)


def our_layout(array):
    """Linear weights and 1×1 convolutions as (in, out), weight_g as (1, out); vectors and positions as they are."""
    return array.reshape(len(array), -1).T if array.ndim in (2, 4) else array


class HeadCheck(Check):
    """Also whole heads, stored as one array a parameter."""

    def tree(self, prefix, layers):
        """Every array whose name starts with `prefix`, named and laid out as our parameters are."""
        names = [name for name in self.fixture.files if name.startswith(prefix) and "num_batches" not in name]
        arrays = {name[len(prefix) :]: self.fixture[name] for name in names}
        return unflatten_dict({our_path(name, layers, a.ndim): our_layout(a) for name, a in arrays.items()})

    def parameters(self, prefix, layers):
        return jax.tree.map(lambda array: jnp.asarray(array, self.dtype), self.tree(prefix, layers))

    def equal_tree(self, ours, prefix, layers, atol=2e-6):
        """Parameters' gradients or buffers; what is stored in float32 alone is compared as float32 at any precision."""
        stored = self.tree(f"f64_{prefix}", layers) if self.exact else {}
        rtol, atol = (1e-9, 1e-11) if stored else (2e-5 if prefix.startswith("grad") else 1e-5, atol)
        reference = flatten_dict(stored or self.tree(prefix, layers))
        for path, array in flatten_dict(ours).items():
            assert array.shape == reference[path].shape, path
            difference = np.abs(np.asarray(array) - reference[path]).max()
            assert difference <= atol + rtol * np.abs(reference[path]).max(), path


@precisions
def test_positions(golden, exact):
    with jax.enable_x64(exact):
        check = Check(golden("mokd_pos_embed"), exact)
        cls, grid = jnp.split(check.array("in_pos_cls_4x4"), [1], axis=1)
        sides = {"7": (2, 3, 5, 6, 7, 10), "4": (2, 3, 4, 6)}
        interpolated = jax.jit(
            lambda positions: {n: [interpolate_positions(positions[n], (g, g)) for g in sides[n]] for n in sides}
        )({"7": check.array("in_pos_7x7"), "4": grid})
        for g, ours in zip(sides["7"], interpolated["7"], strict=True):
            check.equal(ours, f"out_pos_7to{g}")
        for g, ours in zip(sides["4"], interpolated["4"], strict=True):
            check.equal(jnp.concatenate([cls, ours], axis=1), f"out_vitpos_4to{g}")


@precisions
@pytest.mark.parametrize("layers", [4, 2])
def test_simreg(golden, exact, layers):
    with jax.enable_x64(exact):
        check = HeadCheck(golden("simreg_loss"), exact)
        head = RegressionHead(out=32, layers=layers, dtype=check.dtype)
        params = check.parameters(f"mlp{layers}/", REGRESSION[layers])
        buffers = {bn: {name: params[bn].pop(name) for name in ("mean", "var")} for bn in params if bn.startswith("bn")}
        teacher = check.array("in_teacher_feat")

        def loss(params, student):
            variables = {"params": params, "batch_stats": buffers}
            prediction, updates = head.apply(variables, student, norm="batch", mutable=["batch_stats"])
            networks = {"student": Fixed("batch", image=prediction), "teacher": Fixed("running", image=teacher)}
            value, _ = SimReg().loss(types.SimpleNamespace(**networks), {"image": "image"}, (), None)
            return value, (prediction, updates.get("batch_stats", {}))

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, (prediction, buffers)), (grads, grad_x) = run(params, check.array("in_student_feat"))
        check.equal(prediction, f"out_mlp{layers}_pred_raw")
        for option in ("", "_nonorm"):  # the authors' option for targets that are not normalised normalises them too
            check.equal(value, f"out_loss{layers}{option}")
            check.equal(grad_x, f"grad_mlp{layers}{option}_student_feat")
        check.equal_tree(grads, f"grad_mlp{layers}/", REGRESSION[layers])
        check.equal_tree(buffers, f"out_mlp{layers}_after/", REGRESSION[layers])


@precisions
@pytest.mark.parametrize("kind", ["fixed_g", "free_g"])
def test_mlp_head(golden, exact, kind):
    with jax.enable_x64(exact):
        check = HeadCheck(golden("mokd_mlp_head"), exact)
        head = DINOHead(fixed_norm=kind == "fixed_g", hidden=40, bottleneck=16, out=48, dtype=check.dtype)
        params = check.parameters(f"{kind}/", MOKD_LAYERS)
        if kind == "fixed_g":
            np.testing.assert_array_equal(params["last"].pop("g"), 1)

        @jax.jit
        def run(params, x, cotangent):
            y, pull = jax.vjp(lambda params, x: head.apply({"params": params}, x, norm="batch"), params, x)
            return y, *pull(cotangent)

        y, grads, grad_x = run(params, check.array("in_x"), check.array("in_cotangent"))
        check.equal(y, f"out_{kind}")
        check.equal(grad_x, f"grad_{kind}_x")
        check.equal_tree(grads, f"grad_{kind}/", MOKD_LAYERS)


def channels_last(maps):
    return maps.transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("kind", "exact"), [("cnn", True), ("vit", True), ("vit", False)])
def test_thead(golden, kind, exact):
    """Both grids, the 2×2 one by interpolated positions; without a query and with one.

    float32, the same code for both kinds and grids, is shown by one.
    """
    with jax.enable_x64(exact):
        check = HeadCheck(golden(f"mokd_thead_{kind}"), exact)
        head, reduce = THead(dim=24, heads=3, out=48, dtype=check.dtype), TokenReduce(24, dtype=check.dtype)
        params = check.parameters("w/", MOKD_LAYERS)
        query, cotangent = check.array("in_query_token"), check.array("in_cotangent")

        def loss(params, x, query, side):
            """Σ y · cotangent, and for the CNN + Σ pool · its cotangent."""
            pool, value = None, 0.0
            if kind == "cnn":
                x = reduce.apply({"params": params}, channels_last(x))
                pool = x.mean(1)
                value = jnp.sum(pool * check.array("in_cotangent_pool"))
            y = head.apply({"params": params}, x, (side, side), query)
            return value + jnp.sum(y * cotangent), (y, pool)

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        for size, side in (("full", 3), ("small", 2))[: 2 if exact else 1]:
            x = check.array(f"in_x_{size}")
            check.equal(interpolate_positions(params["pos_embed"], (side, side)), f"out_pos_embed_{size}")
            for asked in (None, query):
                suffix = size if asked is None else f"{size}_query"
                (_, (y, pool)), (grads, grad_x, grad_query) = run(params, x, asked, side)
                check.equal(y, f"out_{suffix}")
                check.equal(grad_x, f"grad_x_{suffix}")
                if asked is not None:
                    check.equal(grad_query, f"grad_query_{size}")
                if kind == "cnn":
                    check.equal(pool, f"out_pool_{size}")
                if size == "full":
                    check.equal_tree(grads, "grad_w/" if asked is None else "grad_w_query/", MOKD_LAYERS, atol=2e-5)
                    # One vector added to all keys moves all logits of a query alike: other than 0 is rounding.
                    key_bias = grads["blocks_0"]["attn"]["qkv"]["bias"][24:48]
                    assert np.abs(key_bias).max() < (1e-13 if exact else 1e-5)


def search_loss(student, teacher, student_temperature, teacher_temperature):
    return soft_cross_entropy(student / student_temperature, jax.nn.softmax(teacher / teacher_temperature))


@precisions
def test_dino_loss(golden, exact):
    with jax.enable_x64(exact):
        check = Check(golden("mokd_dino_loss"), exact)

        def hp(name):
            return float(check.fixture[f"hp_{name}"])

        method = MOKD(
            temperature=hp("student_temp"),
            first_teacher_temperature=hp("warmup_teacher_temp"),
            teacher_temperature=hp("teacher_temp"),
            temperature_epochs=int(hp("warmup_teacher_temp_epochs")),
            centre_momentum=hp("center_momentum"),
        )
        epochs = jnp.arange(hp("nepochs"), dtype=check.dtype)
        for epoch in (epochs, epochs + 0.75):  # constant within an epoch
            schedule = method.teacher_temperature_at(epoch, method.temperature_epochs)
            check.equal(schedule, "out_teacher_temp_schedule")
        temperatures = method.temperature, schedule[int(hp("epoch"))]
        centre = check.array("in_center")[0]
        run = jax.jit(jax.value_and_grad(dino_loss))
        for call in range(2):
            student = check.array("in_student", call).reshape(5, 4, 48)
            teacher = check.array("in_teacher", call).reshape(2, 4, 48)
            value, grad = run(student, teacher, centre, *temperatures)
            check.equal(value, "out_loss", call)
            check.equal(grad.reshape(20, 48), "grad_student", call)
            centre = method.update({"mlp": centre}, {"mlp": teacher.mean((0, 1))[None]}, None)["mlp"]
            check.equal(centre[None], "out_center_after", call)

        rows = check.array("in_search_student"), check.array("in_search_teacher")
        value, grad = jax.jit(jax.value_and_grad(search_loss))(*rows, *temperatures)
        check.equal(value, "out_search_loss")
        check.equal(grad, "grad_search_student")


class Given:
    """A network whose heads are the fixture's and whose backbone returns what the fixture gives for a crop's size.

    The method's rows go image by image, the fixture's crop by crop; `outputs` collects the heads' in the latter order.
    """

    spec = types.SimpleNamespace(thead=24)

    def __init__(self, features, batch, apply_head, apply_thead, apply_reduce=None):
        self.given, self.batch = features, batch
        self.project_rows, self.search_tokens, self.reduce = apply_head, apply_thead, apply_reduce
        self.outputs = {"mlp": [], "t": [], "search_l": [], "token_l": []}

    def by_image(self, rows):
        return jnp.moveaxis(rows.reshape(-1, self.batch, *rows.shape[1:]), 0, 1).reshape(rows.shape)

    def note(self, name, rows):
        by_crop = jnp.moveaxis(rows.reshape(self.batch, -1, *rows.shape[1:]), 1, 0).reshape(rows.shape)
        self.outputs[name].append(by_crop)
        return rows

    def features(self, crops, *, norm, dropout=False):
        return jax.tree.map(self.by_image, self.given["gl"[crops.shape[1] == LOCAL]])

    def project(self, features, *, norm):
        return self.note("mlp", self.project_rows(features["feature"]))

    def tokens(self, features):
        return self.reduce(features["map"]) if self.reduce else features["tokens"][:, 1:]

    def query(self, features):
        query = self.tokens(features).mean(1) if self.reduce else features["tokens"][:, 0]
        return self.note("token_l", query)

    def search(self, features, query=None):
        tokens = self.tokens(features)
        if query is not None:
            tokens = jnp.repeat(tokens, len(query) // len(tokens), axis=0)
        return self.note("t" if query is None else "search_l", self.search_tokens(tokens, query))


GLOBAL, LOCAL = 2, 1  # sides of crops that nobody looks at
HEADS = (("mlp", "mlp"), ("thead", "t"))  # our name and the fixture's


def test_mokd_total(golden):
    """The method itself on what the backbones return: every term, total, output and gradient of both models.

    The fixture gives each of its six centred terms a centre of its own; ours has one for each output that teaches,
    which is the same when they start alike. So the loss is taken twice, with the centres of the self-distillation and
    with those of the cross-distillation. float32 is for the parts, above.
    """
    with jax.enable_x64(True):
        check = HeadCheck(golden("mokd_total"), exact=True)

        def hp(name):
            return float(check.fixture[f"hp_{name}"])

        batch, local = int(hp("batch")), int(hp("n_local"))
        method = MOKD(
            temperature=hp("student_temp"),
            first_teacher_temperature=hp("warmup_teacher_temp"),
            teacher_temperature=hp("teacher_temp"),
            self_temperature_epochs=int(hp("warmup_epochs_cnn")),
            temperature_epochs=int(hp("warmup_epochs_vit")),
            student_cross=hp("lambda_cnn"),
            teacher_cross=hp("lambda_vit"),
            local_crops=local,
        )
        roles = {"student": "cnn", "teacher": "vit"}
        # Every part is compiled once for all models that call it with one shape.
        sizes = {"hidden": 40, "bottleneck": 16, "out": 48}
        heads = {m: DINOHead(fixed_norm=m == "cnn", **sizes, dtype=check.dtype) for m in roles.values()}
        thead, reduce = THead(dim=24, heads=3, out=48, dtype=check.dtype), TokenReduce(24, dtype=check.dtype)
        apply_head = jax.jit(lambda m, params, x: heads[m].apply({"params": params}, x, norm="batch"), static_argnums=0)
        apply_reduce = jax.jit(lambda params, maps: reduce.apply({"params": params}, channels_last(maps)))
        apply_thead = jax.jit(
            lambda params, tokens, query: thead.apply(
                {"params": params}, tokens, (math.isqrt(tokens.shape[1]),) * 2, query
            )
        )
        # "cnn_s" and so on: s the student, t the momentum model.
        params = {
            name: [check.parameters(f"w_{name}_{part}/", MOKD_LAYERS) for part in ("head", "thead")]
            for name in (f"{model}_{role}" for model in roles.values() for role in "st")
        }
        inputs = {name[3:]: check.array(name) for name in check.fixture.files if name.startswith("in_")}
        views = {name: jnp.zeros((batch, GLOBAL, GLOBAL, 3)) for name in ("global1", "global2")}
        views["local"] = jnp.zeros((batch, local, LOCAL, LOCAL, 3))
        ctx = Context(step=0, epoch=hp("epoch"), progress=0.0, key=None, index=jnp.arange(batch), label=None)

        def network(name, arrays):
            def given(size):
                if name.startswith("vit"):
                    tokens = arrays[f"{name}_tok_{size}"]
                    return {"tokens": tokens, "feature": tokens[:, 0]}
                return {"map": arrays[f"{name}_map_{size}"], "feature": arrays[f"{name}_feat_{size}"]}

            head, t_head = params[name]
            return Given(
                {size: given(size) for size in ("gl" if name.endswith("s") else "g")},
                batch,
                partial(apply_head, name[:3], head),
                partial(apply_thead, t_head),
                partial(apply_reduce, t_head) if name.startswith("cnn") else None,
            )

        def centres(terms):
            """Centre of each output that teaches, from the fixture's term of that name."""
            return {output: inputs[f"center_{term}"][0] for output, term in terms.items()}

        own = centres({f"{role}/{h}": f"{m}_self_{t}" for role, m in roles.items() for h, t in HEADS})
        cross = {**own, **centres({"student/mlp": "vit_cross_mlp", "teacher/mlp": "cnn_cross_mlp"})}

        def total(students):
            both = {**inputs, **students}
            nets = {role: network(f"{m}_s", both) for role, m in roles.items()}
            nets |= {f"{role}_momentum": network(f"{m}_t", both) for role, m in roles.items()}
            first, aux = method.loss(types.SimpleNamespace(**nets), views, own, ctx)
            outputs = {
                f"{m}_{role[-1]}_{name}": jnp.concatenate(rows)
                for m, pair in ((m, (("s", nets[r]), ("t", nets[f"{r}_momentum"]))) for r, m in roles.items())
                for role, net in pair
                for name, rows in net.outputs.items()
                if rows
            }
            _, aux2 = method.loss(types.SimpleNamespace(**nets), views, cross, ctx)
            losses = {}
            for role, m in roles.items():
                weight = method.student_cross if role == "student" else method.teacher_cross
                terms = aux.metrics[f"{role}_self"], aux2.metrics[f"{role}_cross"], aux.metrics[f"{role}_search"]
                losses[m] = (*terms, terms[0] + weight * (terms[1] + terms[2]))
            # What the method returns is the sum of its terms.
            expected = sum(
                aux.metrics[f"{r}_self"] + w * (aux.metrics[f"{r}_cross"] + aux.metrics[f"{r}_search"])
                for r, w in (("student", method.student_cross), ("teacher", method.teacher_cross))
            )
            return losses["cnn"][-1] + losses["vit"][-1], (losses, outputs, (first, expected), aux.push)

        students = {name: array for name, array in inputs.items() if "_s_" in name}
        (_, (losses, outputs, (first, expected), push)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(
            students
        )
        np.testing.assert_allclose(first, expected, rtol=1e-12)
        for m, (self_terms, cross_term, search_term, whole) in losses.items():
            both = sum(check.fixture[f"f64_out_loss_{term}_{m}"] for term in ("sm", "st"))
            np.testing.assert_allclose(self_terms, both, rtol=1e-9)
            check.equal(cross_term, f"out_loss_cm_{m}")
            check.equal(search_term, f"out_loss_ct_{m}")
            check.equal(whole, f"out_loss_total_{m}")
        assert len(outputs) == 12
        for name, rows in outputs.items():
            check.equal(rows, f"out_{name}")
        for name, grad in grads.items():
            check.equal(grad, f"grad_{name}")
        after = method.update(own, push, ctx)
        for role, m in roles.items():
            for h, t in HEADS:
                check.equal(after[f"{role}/{h}"][None], f"out_center_after_{m}_self_{t}")
        after = method.update(cross, push, ctx)
        check.equal(after["student/mlp"][None], "out_center_after_vit_cross_mlp")
        check.equal(after["teacher/mlp"][None], "out_center_after_cnn_cross_mlp")
