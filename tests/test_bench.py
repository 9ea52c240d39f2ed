"""The bench: its parts are the step's, nothing missing and nothing twice."""

import json

import jax
import numpy as np
import pytest
import runs
from conftest import rig_of

from ssl_kd.bench import bench, listed_calls
from ssl_kd.models import backbone_calls
from ssl_kd.state import abstract
from ssl_kd.step import TrainStep


@pytest.mark.parametrize("variant", ["moco_v2", "rekd", "rekd-frozen", "rekd-self"])
def test_every_network_of_the_method_is_called_once(variant):
    rig = rig_of(variant)
    step, method = TrainStep(rig.recipe, rig.mesh), rig.recipe.method
    state = jax.eval_shape(rig.create)
    batch = {"index": np.arange(16, dtype=np.int32), "label": np.zeros(16, np.int32)}
    views = {name: jax.ShapeDtypeStruct((16, 12, 12, 3), np.float32) for name in method.views}
    calls = listed_calls(step, state, rig.frozen, views, batch, None)
    assert sorted(call[0] for call in calls) == sorted((*method.trained, *method.averaged, *method.frozen))
    assert {call[1] for call in calls if call[0] in method.frozen} <= {"running"}


def test_stand_in_features_give_the_loss_of_the_backbones_they_came_from():
    rig = rig_of("rekd")
    step = TrainStep(rig.recipe, rig.mesh)

    @jax.jit
    def both(state, images):
        rows = np.arange(16, dtype=np.int32)
        views = step.views(state.step, images, rows, None)
        context = step.context(state, {"index": rows, "label": rows}, 0)
        with backbone_calls() as calls:
            loss, _ = step.loss(state.trained, state, rig.frozen, views, context)
        with backbone_calls([call.features for call in calls]):
            again, _ = step.loss(state.trained, state, rig.frozen, views, context)
        with backbone_calls([jax.tree.map(lambda x: -x, call.features) for call in calls]):
            other, _ = step.loss(state.trained, state, rig.frozen, views, context)
        return loss, again, other

    loss, again, other = both(rig.create(), rig.data["image"][:16])
    assert loss == again != other


def test_parts_add_up_to_the_operations_of_the_step(tmp_path):
    run = runs.prepared(runs.config(), tmp_path)
    figures = json.loads(json.dumps(bench(run, budget=0.5)))
    batch, data = run.abstract_inputs()
    lowered = run.train_step().lower(abstract(run.create, run.replicated), run.frozen(), batch, data)
    np.testing.assert_allclose(figures["whole"]["flops"], lowered.cost_analysis()["flops"], rtol=0.05)
    parts = figures["parts"]
    assert {"augmentation", "student forward + backward", "teacher forward + backward", "teacher_momentum forward"} <= {
        name for name, part in parts.items() if part["counted"]
    }
    assert figures["limit"] in parts and all(part["seconds"] > 0 for part in parts.values())
    np.testing.assert_allclose(figures["hours"], 12 * figures["whole"]["seconds"] / 3600)
    np.testing.assert_allclose(figures["images_per_second"], 16 / figures["whole"]["seconds"])
    assert list(tmp_path.iterdir()) == []
