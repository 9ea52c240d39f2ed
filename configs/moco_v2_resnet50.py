"""MoCo-v2 with ResNet-50: makes a teacher for `teacher.source=workdir:PATH` of other recipes (arXiv 2003.04297).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]

Published (ImageNet linear): 67.4 (200 epochs). Embedded, 2 CPU cores: 147 images/s, so 12 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "moco_v2_resnet50"
    del c.teacher
    c.student = base.network("resnet50")
    c.bn_groups = 8
    base.apply_preset(c, preset)
    return c
