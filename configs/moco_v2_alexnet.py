"""MoCo-v2 with AlexNet: the instance-wise baseline of ReKD, same student, images and optimizer (arXiv 2003.04297).

    python launch/main.py --config=configs/moco_v2_alexnet.py[:smoke|:cifar10|:imagenet]

Published (ImageNet, fc7 linear): 45.7. Embedded, 2 CPU cores: 580 images/s, so 4 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "moco_v2_alexnet"
    del c.teacher
    c.student = base.network("alexnet")
    c.bn_groups = 8
    base.apply_preset(c, preset)
    return c
