"""Methods against the authors' own numbers: stand-in networks hand the stored embeddings to the method itself."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_kd.losses import angle_relations, contrast_logits, distance_relations, normalize
from ssl_kd.memory import Queue
from ssl_kd.methods import Context
from ssl_kd.methods.compress import CompRess
from ssl_kd.methods.disco import DisCo
from ssl_kd.methods.moco import MoCo
from ssl_kd.methods.ressl import ReSSL
from ssl_kd.methods.seed import SEED

precisions = pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])


class Check:
    """A fixture read at one precision, and comparison at the tolerances of shared references."""

    def __init__(self, fixture, exact: bool):
        self.fixture, self.exact = fixture, exact
        self.dtype = jnp.float64 if exact else jnp.float32

    def array(self, name, *index):
        return jnp.asarray(self.fixture[name][index], self.dtype)

    def equal(self, ours, name, *index):
        stored = name if not self.exact or f"f64_{name}" not in self.fixture else f"f64_{name}"
        reference = self.fixture[stored][index]
        if self.exact:
            rtol, atol = 1e-9, 1e-11
        elif name.startswith("grad"):
            rtol, atol = 2e-5, 2e-6
        else:
            rtol, atol = 1e-5, 0 if "loss" in name else 2e-6
        assert np.shape(ours) == reference.shape, name
        assert np.abs(np.asarray(ours) - reference).max() <= atol + rtol * np.abs(reference).max(), name


class Fixed:
    """Embeds a view, named by a string, as the given rows, in the one batch-norm mode that it may be asked for."""

    def __init__(self, norm, **views):
        self.norm, self.views = norm, views

    def embed(self, view, *, norm):
        assert norm == self.norm
        return self.views[view]

    def features(self, view, *, norm):
        return types.SimpleNamespace(pooled=self.embed(view, norm=norm))


def run(method, memory, raw, networks):
    """Loss, push and metrics, gradients by `raw`, and the memory after; networks(raw) gives role → Fixed."""
    rows = jnp.arange(8)
    context = Context(step=0, epoch=0.0, progress=0.0, key=None, index=rows, label=rows)
    views = {name: name for name in method.views}

    def loss(raw, memory):
        value, aux = method.loss(types.SimpleNamespace(**networks(raw)), views, memory, context)
        return value, (aux.push, aux.metrics)

    @jax.jit  # hundreds of small operations otherwise
    def step(raw, memory):
        (value, (push, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(raw, memory)
        return value, metrics, grads, method.update(memory, push, context)

    return step(raw, memory)


def queue_of(check, name, row):
    return Queue(rows={row: check.array(name).T}, ptr=jnp.asarray(check.fixture["in_ptr"][0], jnp.int32))


def moco_networks(raw):
    return {"student": Fixed("batch", query=raw["q"]), "student_momentum": Fixed("batch", key=raw["k"])}


@precisions
def test_moco(golden, exact):
    with jax.enable_x64(exact):
        check = Check(golden("moco_infonce"), exact)
        method = MoCo(temperature=float(check.fixture["hp_T"]), queue=64)
        memory = queue_of(check, "in_queue", "key")
        for call in range(3):
            raw = {name: check.array(f"in_{name}_raw", call) for name in "qk"}
            logits = contrast_logits(*map(normalize, raw.values()), memory.rows["key"], method.temperature)
            check.equal(logits, "out_logits", call)
            value, _, grads, memory = run(method, memory, raw, moco_networks)
            check.equal(value, "out_loss", call)
            check.equal(grads["q"], "grad_q_raw", call)
            check.equal(memory.rows["key"].T, "out_queue_after", call)
            assert int(memory.ptr) == check.fixture["out_ptr_after"][call, 0]


def disco_rows(check, call):
    return {name: check.array(f"in_{name}_raw", call) for name in ("s_q", "s_k", "mean_k", "t_q", "t_k")}


def disco_networks(raw, teacher_norm="running"):
    return {
        "student": Fixed("batch", query=raw["s_q"], key=raw["s_k"]),
        "student_momentum": Fixed("batch", key=raw["mean_k"]),
        "teacher": Fixed(teacher_norm, query=raw["t_q"], key=raw["t_k"]),
    }


@precisions
@pytest.mark.parametrize(
    ("total", "grad", "contrast", "consistency"),
    [
        ("total", "grad", 1.0, 8.0),
        ("total_only_mse", "grad_only_mse", 0.0, 8.0),
        ("contrast", "grad_contrast", 1.0, 0.0),
    ],
    ids=["total", "only_mse", "only_contrast"],
)
def test_disco(golden, exact, total, grad, contrast, consistency):
    """The authors sum the squared distances over their batch of 8 here: weight 8 on our mean."""
    with jax.enable_x64(exact):
        check = Check(golden("disco_loss"), exact)
        method = DisCo(temperature=float(check.fixture["hp_T"]), queue=64, consistency=consistency, contrast=contrast)
        memory = queue_of(check, "in_queue", "key")
        for call in range(2):
            value, metrics, grads, memory = run(method, memory, disco_rows(check, call), disco_networks)
            check.equal(value, f"out_loss_{total}", call)
            check.equal(metrics["contrast"], "out_loss_contrast", call)
            both = sum(check.fixture[f"f64_out_loss_mse_{view}"][call] for view in "qk")
            np.testing.assert_allclose(8 * metrics["consistency"], both, rtol=1e-9 if exact else 1e-5)
            check.equal(grads["s_q"], f"{grad}_s_q_raw", call)
            if consistency:
                check.equal(grads["s_k"], f"{grad}_s_k_raw", call)
            else:  # the contrast is between one view's query and the other's momentum key
                np.testing.assert_array_equal(grads["s_k"], 0)
            check.equal(memory.rows["key"].T, "out_queue_after", call)
            assert int(memory.ptr) == check.fixture["out_ptr_after"][call, 0]


@pytest.mark.parametrize("teacher_norm", ["running", "batch"])
def test_disco_adds_weighted_relations_of_both_views(golden, teacher_norm):
    """Student and teacher meet in the same view; `teacher_norm` is the batch-norm mode of the teacher alone."""
    with jax.enable_x64(True):
        check = Check(golden("disco_loss"), exact=True)
        fields = {"consistency": 8.0, "distance": 3.0, "angle": 7.0, "teacher_norm": teacher_norm}
        method = DisCo(temperature=float(check.fixture["hp_T"]), queue=64, **fields)

        @jax.jit
        @jax.value_and_grad
        def relations(raw):
            pairs = [(normalize(raw[f"s_{view}"]), normalize(raw[f"t_{view}"])) for view in "qk"]
            return sum(3 * distance_relations(*pair) + 7 * angle_relations(*pair) for pair in pairs)

        raw = disco_rows(check, 0)
        networks = partial(disco_networks, teacher_norm=teacher_norm)
        value, _, grads, _ = run(method, queue_of(check, "in_queue", "key"), raw, networks)
        added, added_grads = relations(raw)
        check.equal(value - added, "out_loss_total", 0)
        for name in ("s_q", "s_k"):
            check.equal(grads[name] - added_grads[name], f"grad_{name}_raw", 0)


@precisions
@pytest.mark.parametrize(("term", "name"), [(distance_relations, "dist"), (angle_relations, "angle")])
def test_relations_of_disco(golden, exact, term, name):
    with jax.enable_x64(exact):
        check = Check(golden("disco_rkd"), exact)
        value, grad = jax.jit(jax.value_and_grad(term))(check.array("in_student"), check.array("in_teacher"))
        check.equal(value, f"out_loss_{name}")
        check.equal(grad, f"grad_student_{name}")


@precisions
@pytest.mark.parametrize("number", range(3), ids=lambda n: f"temperature{n}")
def test_seed(golden, exact, number):
    with jax.enable_x64(exact):
        check = Check(golden("seed_loss"), exact)
        method = SEED(
            temperature=float(check.fixture["hp_T_student"]),
            teacher_temperature=float(check.fixture["hp_T_teacher"][number]),
            queue=96,
        )
        memory = queue_of(check, "in_queue", "teacher")
        for call in range(2):
            raw = {name: check.array(f"in_{name}_raw", call) for name in "st"}
            value, _, grads, memory = run(
                method,
                memory,
                raw,
                lambda raw: {"student": Fixed("batch", image=raw["s"]), "teacher": Fixed("running", image=raw["t"])},
            )
            check.equal(value, "out_loss", number, call)
            check.equal(grads["s"], "grad_s_raw", number, call)
            check.equal(memory.rows["teacher"].T, "out_queue_after", number, call)
            assert int(memory.ptr) == check.fixture["out_ptr_after"][number, call, 0]


@precisions
def test_ressl(golden, exact):
    with jax.enable_x64(exact):
        check = Check(golden("ressl_loss"), exact)
        temperatures = {"temperature": "hp_T_student", "key_temperature": "hp_T_teacher"}
        method = ReSSL(queue=128, **{field: float(check.fixture[name]) for field, name in temperatures.items()})
        memory = queue_of(check, "in_queue", "key")
        for call in range(2):
            raw = {name: check.array(f"in_{name}_raw", call) for name in "qk"}
            value, _, grads, memory = run(method, memory, raw, moco_networks)
            check.equal(value, "out_loss", call)
            check.equal(grads["q"], "grad_q_raw", call)
            check.equal(memory.rows["key"].T, "out_queue_after", call)
            assert int(memory.ptr) == check.fixture["out_ptr_after"][call, 0]


@precisions
@pytest.mark.parametrize("variant", ["1q", "2q", "2q, filled by the student"])
def test_compress(golden, exact, variant):
    with jax.enable_x64(exact):
        queues = int(variant[0])
        check = Check(golden(f"compress_{queues}q"), exact)
        averages = variant == "2q"
        method = CompRess(
            temperature=float(check.fixture["hp_T"]),
            queue=100,
            queues=queues,
            keys="momentum" if averages else "student",
        )
        kept = {"teacher": "queue_t", "student": "queue_s"} if queues == 2 else {"teacher": "queue_t"}
        memory = Queue(
            rows={row: check.array(f"in_{name}") for row, name in kept.items()},
            ptr=jnp.asarray(check.fixture["in_index"], jnp.int32),
        )
        theirs = "nomom_" if queues == 2 and not averages else ""
        for call in range(2):
            names = ("student", "teacher", *(["student_key"] if averages else []))
            value, _, grads, memory = run(
                method,
                memory,
                {name: check.array(f"in_{name}", call) for name in names},
                lambda raw: {
                    "student": Fixed("batch", image=raw["student"]),
                    "teacher": Fixed("running", image=raw["teacher"]),
                    "student_momentum": Fixed("batch", image=raw.get("student_key")),
                },
            )
            check.equal(value, f"out_{theirs}loss", call)
            check.equal(grads["student"], f"grad_{theirs}student", call)
            for row, name in kept.items():
                check.equal(memory.rows[row], f"out_{theirs}{name}_after", call)
            assert int(memory.ptr) == check.fixture[f"out_{theirs}index_after"][call]
