"""DisCo: EfficientNet-B0 distilled from a frozen self-supervised ResNet-50 (ECCV 2022, arXiv 2104.09124).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/disco_efficientnet_b0.py[:…] \
        --config.teacher.source=workdir:runs/moco_v2_resnet50

Published (ImageNet linear, teacher 67.4): 66.5, MoCo-v2 alone 46.8 there; 68.9 with a ResNet-101. Not measured here.
Embedded, 2 CPU cores: 52 images/s, so 34 min.
"""

from configs import disco_resnet18


def get_config(preset: str = ""):
    c = disco_resnet18.get_config(preset)
    c.name = "disco_efficientnet_b0"
    c.student.name = "efficientnet_b0"
    return c
