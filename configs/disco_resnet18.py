"""DisCo: ResNet-18 distilled from a frozen self-supervised ResNet-50 (ECCV 2022, arXiv 2104.09124).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/disco_resnet18.py[:…] --config.teacher.source=workdir:runs/moco_v2_resnet50

The wide hidden layer of the student's head is the paper's remedy for the distilling bottleneck: compare
--config.student.head_hidden=512.

Published (ImageNet linear, teacher 67.4): 60.6, MoCo-v2 alone 52.5; not measured here. In small (CIFAR-10, a public
teacher, benchmarks/methods.md): 46.8, MoCo-v2 alone 40.0. Embedded, 2 CPU cores: 74 images/s, so 25 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "disco_resnet18"
    c.student = base.network("resnet18", head_hidden=2048)
    c.teacher = base.network("resnet50")
    c.method = base.method("disco")
    c.bn_groups = 8
    base.apply_preset(c, preset)
    return c
