"""What the eight devices of a compiled step exchange: exactly this, and nothing else."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Rig, rig_of, tiny_config
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssl_kd.collectives import exchanges, totals

DEVICES = 8


def whole_bytes(tree) -> int:
    """Of all leaves, as if none were split."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Case:
    """What a variant exchanges, for 16 images of 12 px and embeddings of 8.

    Attributes:
      calls: how often a trained network is called. XLA's CPU compiler exchanges a gradient once a call.
      rest: what belongs to no network, and how many there are.
      apart: network → bytes by which its backward pass differs from `calls` times its parameters and statistics.
      changes: of the variant's recipe.
    """

    calls: int
    rest: Mapping[str, int]
    apart: Mapping[str, int] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, int] = dataclasses.field(default_factory=dict)


WRITTEN = "all-gather s32[16,1]"  # places in a queue
KEY = "all-gather f32[16,8]"  # embeddings
ROWS = "all-gather s32[16]"
SUM = "all-reduce f32[]"  # of a loss or a metric
FINITE = "all-reduce pred[]"
SHUFFLED = ROWS  # numbers of images, which every device then finds in its own set
PROTOTYPES, USE = "all-reduce f32[4,8]", "all-reduce f32[4]"

CASES = {
    # The key is gathered twice: out of the shuffled order, and into the queue.
    "moco_v2": Case(1, {SHUFFLED: 1, KEY: 2, WRITTEN: 1, FINITE: 1, SUM: 1}, changes={"bn_groups": 8}),
    "rekd-balanced": Case(
        1,
        {
            **{KEY: 4, FINITE: 2, PROTOTYPES: 2},
            WRITTEN: 5,  # key, teacher's key, label, prototype, whether filled
            **{ROWS: 3, "all-gather f32[16]": 1},  # shuffled, label, prototype, and how well it fits
            USE: 3 + 1,  # three turns of Sinkhorn; images of each prototype
            SUM: 6,  # a loss of each network, the largest score, three metrics
        },
    ),
    # Distances between all pairs and angles in all triples of the batch, each device those of its rows.
    "disco": Case(
        2,
        {
            **{WRITTEN: 1, FINITE: 1, KEY: 8, SUM: 13},
            **{"all-gather f32[8,16]": 4, "all-gather f32[16]": 4, SHUFFLED: 1},
            **{"all-reduce f32[16,8]": 5, "all-reduce f32[16]": 2},
        },
    ),
    "seed": Case(1, {KEY: 1, WRITTEN: 1, FINITE: 1, SUM: 1}),
    "ressl": Case(1, {SHUFFLED: 1, KEY: 2, WRITTEN: 1, FINITE: 1, SUM: 1}),
    # Two queues, of features as wide as the networks.
    "compress": Case(1, {"all-gather f32[16,32]": 1, "all-gather f32[16,16]": 1, WRITTEN: 2, FINITE: 2, SUM: 1}),
    "simreg": Case(1, {SUM: 1}),
    # Mates are shuffled as well.
    "bingo": Case(3, {SHUFFLED: 2, KEY: 3, WRITTEN: 1, FINITE: 1, "all-reduce f32[2]": 3}),
    "mokd": Case(
        2,
        # Means of the averages' outputs, for centres; losses.
        {"all-reduce f32[24]": 4, SUM: 26},
        # Local crops use 5 of 10 positions of a ViT, 4 of 9 of its T-Head and 16 of 36 of a CNN's; the lengths g of a
        # normalised last layer follow from the gradient of its directions; the CPU takes the stem's gradient of global
        # crops in two parts.
        apart={"student": 4 * (432 - 20 * 16 - 2 * 24), "teacher": -4 * (5 * 16 + 5 * 16 + 2 * 24 + 2 * 24)},
    ),
}


def found_in_step(variant: str, **changes):
    """(a rig, what its compiled step exchanges)."""
    rig = rig_of(variant, DEVICES, **CASES[variant].changes, **changes)
    return rig, exchanges(rig.text())


def in_networks(found) -> dict[tuple[str, bool], int]:
    """(network, whether backward) → bytes."""
    total: Counter[tuple[str, bool]] = Counter()
    for e in found:
        if e.network:
            total[e.network, e.backward] += e.bytes
    return dict(total)


def expected_in_networks(variant: str, rig: Rig) -> dict[tuple[str, bool], int]:
    """Every parameter's gradient, and of every batch norm two vectors forward and two backward."""
    case, state, groups, expected = CASES[variant], rig.shapes, rig.config.bn_groups, {}
    for name, stats in state.batch_stats.items():
        # Where every device holds whole groups, only the running statistics' means over them are exchanged.
        shared = groups % DEVICES != 0
        forward = whole_bytes(stats) * (groups if shared else 1)
        backward = whole_bytes(stats) * (groups if shared else 0)
        if name in state.averaged:
            expected[name, False] = forward
        else:
            expected[name, False] = case.calls * forward
            expected[name, True] = case.calls * (whole_bytes(state.trained[name]) + backward) + case.apart.get(name, 0)
    return {key: size for key, size in expected.items() if size}


def outside_networks(found) -> Counter[str]:
    return Counter(f"{e.kind} {e.dtype}[{','.join(map(str, e.shape))}]" for e in found if not e.network)


@pytest.mark.parametrize("variant", CASES)
def test_a_step_exchanges_gradients_statistics_and_rows_of_the_batch(variant):
    rig, found = found_in_step(variant)
    assert in_networks(found) == expected_in_networks(variant, rig)
    assert outside_networks(found) == CASES[variant].rest
    assert {e.kind for e in found} <= {"all-reduce", "all-gather"}
    assert all(e.times == 1 for e in found)


def test_of_streamed_images_a_device_sends_the_shuffled_ones_that_others_want():
    """One of its two, and the sizes of all, before augmentation."""
    config = tiny_config("moco_v2")
    config.bn_groups = DEVICES
    rig = Rig(config, DEVICES)
    images = jax.device_get(rig.data.image[np.arange(config.batch_size)])
    batch = {**rig.batch(0), "image": images, "label": np.zeros(config.batch_size, np.int32)}
    batch = jax.device_put(batch, NamedSharding(rig.mesh, PartitionSpec("data")))
    found = exchanges(rig.step.lower(rig.create(), rig.frozen, batch, None).compile().as_text())
    streamed = {"all-gather s32[16,2]": 1, "collective-permute u8[1,1,12,12,3]": 1}
    expected = Counter(CASES["moco_v2"].rest) - Counter([SHUFFLED]) + Counter(streamed)
    assert outside_networks(found) == expected


def test_a_step_that_splits_its_state_gathers_every_split_array_once_besides():
    """On the CPU gradients are still summed whole on every device; accelerators scatter the sums."""
    variant = "ressl"
    rig, found = found_in_step(variant, sharding="fsdp")
    state = rig.create()
    networks = (state.trained, state.averaged)
    split = [x for x in jax.tree.leaves(networks) if not x.sharding.is_fully_replicated]
    assert whole_bytes(split) > 0.6 * whole_bytes(networks)
    assert in_networks(found) == expected_in_networks(variant, rig)
    gathered = Counter(f"all-gather f32[{','.join(map(str, x.shape))}]" for x in split)
    norms = {SUM: len(split) // 2}  # of the gradient's split arrays
    assert outside_networks(found) == Counter(CASES[variant].rest) + gathered + Counter(norms)


TEXT = """HloModule jit_f, is_scheduled=true

%add.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%a.1, %b.1)
}

%body.2 (state.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state.2 = (s32[], f32[4]{0}) parameter(0)
  %count.2 = s32[] get-tuple-element(%state.2), index=0
  %x.2 = f32[4]{0} get-tuple-element(%state.2), index=1
  %all-reduce.2 = f32[4]{0} all-reduce(%x.2), channel_id=1, replica_groups={{0,1}}, to_apply=%add.1
  ROOT %next.2 = (s32[], f32[4]{0}) tuple(%count.2, %all-reduce.2)
}

%condition.3 (state.3: (s32[], f32[4])) -> pred[] {
  %state.3 = (s32[], f32[4]{0}) parameter(0)
  ROOT %less.3 = pred[] constant(false)
}

%spread.4 (param.4: bf16[8,2]) -> bf16[16,2] {
  %param.4 = bf16[8,2]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.4 = bf16[16,2]{1,0:T(8,128)S(1)} all-gather(%param.4), channel_id=2, dimensions={0}
}

%spread.5 (param.5: bf16[8,2]) -> bf16[16,2] {
  %param.5 = bf16[8,2]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.5 = bf16[16,2]{1,0:T(8,128)S(1)} all-gather(%param.5), channel_id=2, dimensions={0}
}

ENTRY %main.9 (w: f32[3], v: pred[8], u: bf16[8,2], s: (s32[], f32[4])) -> f32[3] {
  %w = f32[3]{0} parameter(0), metadata={op_name="w"}
  %v = pred[8]{0} parameter(1)
  %u = bf16[8,2]{1,0} parameter(2)
  %s = (s32[], f32[4]{0}) parameter(3)
  %grad.6 = f32[5,7]{1,0} fusion(%w), kind=kLoop, calls=%add.1, metadata={op_name="jit(f)/transpose(jvp(net.embed))/x"}
  %all-reduce-start.6 = (f32[3]{0}, f32[5,7]{1,0}) all-reduce-start(%w, /*index=1*/%grad.6), channel_id=3
  %all-reduce-done.6 = (f32[3]{0}, f32[5,7]{1,0}) all-reduce-done(%all-reduce-start.6)
  %all-gather-start.7 = (pred[8]{0}, pred[16]{0}) all-gather-start(%v), channel_id=4, dimensions={0}
  %all-gather-done.7 = pred[16]{0} all-gather-done(%all-gather-start.7)
  %fusion.4 = bf16[16,2]{1,0} fusion(%u), kind=kCustom, calls=%spread.4
  %fusion.5 = bf16[16,2]{1,0} fusion(%u), kind=kCustom, calls=%spread.5
  %reduce-scatter.8 = bf16[4,2]{1,0} reduce-scatter(%u), channel_id=5, dimensions={0}, to_apply=%add.1
  %permuted.8 = (pred[8]{0}, pred[8]{0}, u32[], u32[]) collective-permute-start(%v), channel_id=6
  %while.8 = (s32[], f32[4]) while(%s), condition=%condition.3, body=%body.2, x={"known_trip_count":{"n":"5"}}
  ROOT %w.9 = f32[3]{0} copy(%w)
}
"""


def test_reads_asynchronous_combined_spread_and_repeated_collectives():
    found = exchanges(TEXT)
    assert [(e.kind, e.dtype, e.shape, e.times, e.bytes) for e in found] == [
        ("all-reduce", "f32", (3,), 1, 12),
        ("all-reduce", "f32", (5, 7), 1, 140),
        ("all-gather", "pred", (16,), 1, 16),
        ("all-gather", "bf16", (16, 2), 1, 64),
        ("reduce-scatter", "bf16", (8, 2), 1, 32),
        ("collective-permute", "pred", (8,), 1, 8),
        ("all-reduce", "f32", (4,), 5, 80),
    ]
    assert totals(found) == {
        "all-reduce": (6, 232),
        "all-gather": (2, 80),
        "reduce-scatter": (1, 32),
        "collective-permute": (1, 8),
    }
    assert [e.source for e in found[:2]] == ["w", "jit(f)/transpose(jvp(net.embed))/x"]
    assert (found[0].network, found[1].network, found[1].backward) == (None, "net", True)


def test_a_loop_of_unknown_length_that_exchanges_something_is_an_error():
    with pytest.raises(ValueError, match=r"while\.8"):
        exchanges(TEXT.replace('"known_trip_count"', '"else"'))


def test_what_a_compiled_loop_exchanges_is_counted_as_often_as_it_runs():
    mesh = jax.make_mesh((DEVICES,), ("data",), (AxisType.Auto,), devices=jax.devices()[:DEVICES])
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))

    def sums(batches):
        return jax.lax.scan(lambda total, x: (jnp.tanh(total + x.sum(0)), None), jnp.zeros(3), batches)[0]

    batches = jax.ShapeDtypeStruct((7, 16, 3), np.float32, sharding=rows)
    found = exchanges(jax.jit(sums).lower(batches).compile().as_text())
    assert totals(found) == {"all-reduce": (7, 7 * 3 * 4)}
