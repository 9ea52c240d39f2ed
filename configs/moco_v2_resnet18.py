"""MoCo-v2 with ResNet-18: makes a teacher for `teacher.source=workdir:PATH` of other recipes (arXiv 2003.04297).

    python launch/main.py --config=configs/moco_v2_resnet18.py[:smoke|:cifar10|:imagenet]

Published (ImageNet linear): 52.5; in small (CIFAR-10, benchmarks/methods.md) 40.0. Embedded, 2 CPU cores:
393 images/s, so 5 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "moco_v2_resnet18"
    del c.teacher
    c.student = base.network("resnet18")
    c.bn_groups = 8
    base.apply_preset(c, preset)
    return c
