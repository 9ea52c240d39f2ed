"""SimReg (Navaneet et al., BMVC 2021; arXiv 2201.05131): the student regresses the teacher's features."""

import dataclasses
from collections.abc import Mapping

import jax

from ssl_kd.losses import normalize, squared_distance
from ssl_kd.methods.protocol import Aux, Context, Schedule, View
from ssl_kd.models import NetworkSpec


@dataclasses.dataclass(frozen=True)
class SimReg:
    """2 − 2 cos(MLP(s), t), t the frozen teacher's feature of the same weak view.

    The prediction head is the key `student.head`: 'regression' (4 layers), or 'regression_linear' (the authors' 2).
    Probes use the backbone, without it.
    """

    queue = 0
    trained = ("student",)
    frozen = ("teacher",)
    evaluated = ("student",)

    @property
    def averaged(self) -> Mapping[str, tuple[str, Schedule]]:
        return {}

    @property
    def views(self) -> Mapping[str, View]:
        return {"image": View(preset="weak")}

    def init(self, key: jax.Array, specs: Mapping[str, NetworkSpec]) -> tuple[()]:
        width, wanted = specs["student"].dim, specs["teacher"].feature_dim
        if width != wanted:
            raise ValueError(
                f"method.name='simreg' compares the student's {width} outputs with the teacher's {wanted} features: "
                "set student.dim=0, which takes the teacher's width, and student.head='regression'"
            )
        return ()

    def loss(self, nets, views, memory: tuple[()], ctx: Context) -> tuple[jax.Array, Aux]:
        p = normalize(nets.student.embed(views["image"], norm="batch"))
        t = normalize(nets.teacher.features(views["image"], norm="running").pooled)
        return squared_distance(p, t), Aux(push={}, metrics={})

    def update(self, memory: tuple[()], push: dict[str, jax.Array], ctx: Context) -> tuple[()]:
        return memory
