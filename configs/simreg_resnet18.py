"""SimReg: ResNet-18 regresses a frozen ResNet-50's features through a 4-layer head (BMVC 2021, arXiv 2201.05131).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/simreg_resnet18.py[:…] --config.teacher.source=workdir:runs/moco_v2_resnet50

The teacher's features of ten fixed views of every image, computed once: --config.teacher.cache_views=10. The authors'
linear head: --config.student.head=regression_linear. Published (ImageNet linear, a teacher of about 71):
65.1, with SwAV's 65.8; not measured here. In small (CIFAR-10, a public teacher, benchmarks/methods.md): 32.4, MoCo-v2
alone 40.0. Embedded, 2 CPU cores: 171 images/s, so 10 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "simreg_resnet18"
    c.student = base.network("resnet18", head="regression", dim=0)
    c.teacher = base.network("resnet50")
    c.method = base.method("simreg")
    c.epochs = 130.0
    c.optim.lr = 0.05
    base.apply_preset(c, preset)
    return c
