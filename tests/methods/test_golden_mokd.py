"""MOKD's and SimReg's heads and losses against the authors' own numbers."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_golden import Check, precisions

from ssl_kd.losses import dino_loss, normalize, soft_cross_entropy, squared_distance
from ssl_kd.models.heads import DINOHead, RegressionHead, THead, TokenReduce
from ssl_kd.models.vit import interpolate_positions

# The references' names of layers, as regular expressions, and ours.
REGRESSION = {
    4: {"0": "fc1", "1": "bn1", "3": "fc2", "4": "fc3", "5": "bn2", "7": "fc4"},
    2: {"0": "fc1", "1": "fc2"},
}
MOKD = {r"mlp\.0": "fc1", r"mlp\.2": "fc2", r"mlp\.4": "fc3", "last_layer": "last", r"blocks\.(\d)": r"blocks_\1"}
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
        rtol, atol = (1e-9, 1e-11) if stored else (2e-5, atol)
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
            value = squared_distance(normalize(prediction), normalize(teacher))
            return value, (prediction, updates.get("batch_stats", {}))

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, (prediction, buffers)), (grads, grad_x) = run(params, check.array("in_student_feat"))
        check.equal(value, f"out_loss{layers}")
        check.equal(prediction, f"out_mlp{layers}_pred_raw")
        check.equal(grad_x, f"grad_mlp{layers}_student_feat")
        check.equal_tree(grads, f"grad_mlp{layers}/", REGRESSION[layers])
        check.equal_tree(buffers, f"out_mlp{layers}_after/", REGRESSION[layers])


@precisions
@pytest.mark.parametrize("kind", ["fixed_g", "free_g"])
def test_mlp_head(golden, exact, kind):
    with jax.enable_x64(exact):
        check = HeadCheck(golden("mokd_mlp_head"), exact)
        head = DINOHead(fixed_norm=kind == "fixed_g", hidden=40, bottleneck=16, out=48, dtype=check.dtype)
        params = check.parameters(f"{kind}/", MOKD)
        if kind == "fixed_g":
            np.testing.assert_array_equal(params["last"].pop("g"), 1)

        @jax.jit
        def run(params, x, cotangent):
            y, pull = jax.vjp(lambda params, x: head.apply({"params": params}, x, norm="batch"), params, x)
            return y, *pull(cotangent)

        y, grads, grad_x = run(params, check.array("in_x"), check.array("in_cotangent"))
        check.equal(y, f"out_{kind}")
        check.equal(grad_x, f"grad_{kind}_x")
        check.equal_tree(grads, f"grad_{kind}/", MOKD)


def channels_last(maps):
    return maps.transpose(0, 2, 3, 1)


@precisions
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_thead(golden, exact, kind):
    """Both grids, the 2×2 one by interpolated positions; with a query and, where computed exactly, also without."""
    with jax.enable_x64(exact):
        check = HeadCheck(golden(f"mokd_thead_{kind}"), exact)
        head, reduce = THead(dim=24, heads=3, out=48, dtype=check.dtype), TokenReduce(24, dtype=check.dtype)
        params = check.parameters("w/", MOKD)
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
        for size, side in (("full", 3), ("small", 2)):
            x = check.array(f"in_x_{size}")
            check.equal(interpolate_positions(params["pos_embed"], (side, side)), f"out_pos_embed_{size}")
            for asked in (None, query) if exact else (query,):
                suffix = size if asked is None else f"{size}_query"
                (_, (y, pool)), (grads, grad_x, grad_query) = run(params, x, asked, side)
                check.equal(y, f"out_{suffix}")
                check.equal(grad_x, f"grad_x_{suffix}")
                if asked is not None:
                    check.equal(grad_query, f"grad_query_{size}")
                if kind == "cnn":
                    check.equal(pool, f"out_pool_{size}")
                if size == "full":
                    check.equal_tree(grads, "grad_w/" if asked is None else "grad_w_query/", MOKD, atol=2e-5)
                    # One vector added to all keys moves all logits of a query alike: other than 0 is rounding.
                    key_bias = grads["blocks_0"]["attn"]["qkv"]["bias"][24:48]
                    assert np.abs(key_bias).max() < (1e-13 if exact else 1e-5)


def teacher_temperature(hp, warmup_epochs):
    """Linear from the first epoch of the warm-up to its last, then constant."""
    warmup = np.linspace(hp("warmup_teacher_temp"), hp("teacher_temp"), int(warmup_epochs))
    return [*warmup, *[hp("teacher_temp")] * int(hp("nepochs") - warmup_epochs)][int(hp("epoch"))]


@jax.jit
def search_loss(student, teacher, student_temperature, teacher_temperature):
    return soft_cross_entropy(student / student_temperature, jax.nn.softmax(teacher / teacher_temperature))


@precisions
def test_dino_loss(golden, exact):
    with jax.enable_x64(exact):
        check = Check(golden("mokd_dino_loss"), exact)

        def hp(name):
            return float(check.fixture[f"hp_{name}"])

        temperatures = hp("student_temp"), teacher_temperature(hp, hp("warmup_teacher_temp_epochs"))
        centre = check.array("in_center")[0]
        run = jax.jit(jax.value_and_grad(dino_loss))
        for call in range(2):
            student = check.array("in_student", call).reshape(5, 4, 48)
            teacher = check.array("in_teacher", call).reshape(2, 4, 48)
            value, grad = run(student, teacher, centre, *temperatures)
            check.equal(value, "out_loss", call)
            check.equal(grad.reshape(20, 48), "grad_student", call)
            centre = hp("center_momentum") * centre + (1 - hp("center_momentum")) * teacher.mean((0, 1))
            check.equal(centre[None], "out_center_after", call)

        rows = check.array("in_search_student"), check.array("in_search_teacher")
        value, grad = jax.value_and_grad(search_loss)(*rows, *temperatures)
        check.equal(value, "out_search_loss")
        check.equal(grad, "grad_search_student")


def test_mokd_total(golden):
    """Every term of both models, with their heads, from what the backbones return; float32 is for the parts, above."""
    with jax.enable_x64(True):
        check = HeadCheck(golden("mokd_total"), exact=True)

        def hp(name):
            return float(check.fixture[f"hp_{name}"])

        batch, local = int(hp("batch")), int(hp("n_local"))
        other = {"cnn": "vit", "vit": "cnn"}
        # "cnn_s_head" and so on: s the student, t the momentum model.
        params = {
            name: check.parameters(f"w_{name}/", MOKD)
            for name in (f"{model}_{role}_{part}" for model in other for role in "st" for part in ("head", "thead"))
        }
        inputs = {name[3:]: check.array(name) for name in check.fixture.files if name.startswith("in_")}
        centre = {name[7:]: inputs[name][0] for name in inputs if name.startswith("center_")}
        tau = hp("student_temp")
        tau_t = {model: teacher_temperature(hp, hp(f"warmup_epochs_{model}")) for model in other}

        # Every part is compiled once for all models that call it with one shape.
        sizes = {"hidden": 40, "bottleneck": 16, "out": 48}
        heads = {model: DINOHead(fixed_norm=model == "cnn", **sizes, dtype=check.dtype) for model in other}
        thead, reduce = THead(dim=24, heads=3, out=48, dtype=check.dtype), TokenReduce(24, dtype=check.dtype)
        apply_head = jax.jit(
            lambda model, params, x: heads[model].apply({"params": params}, x, norm="batch"), static_argnums=0
        )
        apply_reduce = jax.jit(lambda params, maps: reduce.apply({"params": params}, channels_last(maps)))
        apply_thead = jax.jit(
            lambda params, tokens, query=None: thead.apply(
                {"params": params}, tokens, (math.isqrt(tokens.shape[1]),) * 2, query
            )
        )
        dino, search = jax.jit(dino_loss), search_loss

        def read(inputs, name, size):
            """Pooled feature, tokens, and the query offered to the other model."""
            if name.startswith("vit"):
                tokens = inputs[f"{name}_tok_{size}"]
                return tokens[:, 0], tokens[:, 1:], tokens[:, 0]
            tokens = apply_reduce(params[f"{name}_thead"], inputs[f"{name}_map_{size}"])
            return inputs[f"{name}_feat_{size}"], tokens, tokens.mean(1)

        def crops(rows):
            return rows.reshape(-1, batch, rows.shape[-1])

        def total(students):
            out, losses = {}, {}
            for model in other:
                seen = [read(students, f"{model}_s", size) for size in "gl"]
                head, theads = params[f"{model}_s_head"], params[f"{model}_s_thead"]
                out[f"{model}_s_mlp"] = jnp.concatenate([apply_head(model, head, feature) for feature, _, _ in seen])
                out[f"{model}_s_t"] = jnp.concatenate([apply_thead(theads, tokens) for _, tokens, _ in seen])
                out[f"{model}_s_token_l"] = seen[1][2]
            for model in other:
                feature, tokens, _ = read(inputs, f"{model}_t", "g")
                head, theads = params[f"{model}_t_head"], params[f"{model}_t_thead"]
                out[f"{model}_t_mlp"] = apply_head(model, head, feature)
                out[f"{model}_t_t"] = apply_thead(theads, tokens)
                # Global crop 1 once for every local crop, in the order of the queries: all images of the first, …
                first = jnp.tile(tokens[:batch], (local, 1, 1))
                query = jax.lax.stop_gradient(out[f"{other[model]}_s_token_l"])
                out[f"{model}_t_search_l"] = apply_thead(theads, first, query)
            for model, guide in other.items():
                mlp, t = crops(out[f"{model}_s_mlp"]), crops(out[f"{model}_s_t"])
                own_mlp, own_t, guide_mlp = (
                    crops(out[name]) for name in (f"{model}_t_mlp", f"{model}_t_t", f"{guide}_t_mlp")
                )
                terms = {
                    "sm": dino(mlp, own_mlp, centre[f"{model}_self_mlp"], tau, tau_t[model]),
                    "st": dino(t, own_t, centre[f"{model}_self_t"], tau, tau_t[model]),
                    "cm": dino(mlp, guide_mlp, centre[f"{model}_cross_mlp"], tau, tau_t["vit"]),
                    "ct": search(out[f"{model}_s_t"][2 * batch :], out[f"{guide}_t_search_l"], tau, tau_t["vit"]),
                }
                terms["total"] = terms["sm"] + terms["st"] + hp(f"lambda_{model}") * (terms["cm"] + terms["ct"])
                losses |= {f"{term}_{model}": value for term, value in terms.items()}
            return losses["total_cnn"] + losses["total_vit"], (losses, out)

        students = {name: array for name, array in inputs.items() if "_s_" in name}
        (_, (losses, out)), grads = jax.value_and_grad(total, has_aux=True)(students)
        for name, value in losses.items():
            check.equal(value, f"out_loss_{name}")
        for name, rows in out.items():
            check.equal(rows, f"out_{name}")
        for name, grad in grads.items():
            check.equal(grad, f"grad_{name}")
        for model, guide in other.items():
            for term, rows in {
                "self_mlp": out[f"{model}_t_mlp"],
                "self_t": out[f"{model}_t_t"],
                "cross_mlp": out[f"{guide}_t_mlp"],
            }.items():
                check.equal(
                    0.9 * centre[f"{model}_{term}"][None] + 0.1 * rows.mean(0), f"out_center_after_{model}_{term}"
                )
