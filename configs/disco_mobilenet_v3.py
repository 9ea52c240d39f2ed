"""DisCo: MobileNetV3-Large distilled from a frozen self-supervised ResNet-50 (ECCV 2022, arXiv 2104.09124).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/disco_mobilenet_v3.py[:…] \
        --config.teacher.source=workdir:runs/moco_v2_resnet50

Published (ImageNet linear, teacher 67.4): 64.4, MoCo-v2 alone 36.3; not measured here.
Embedded, 2 CPU cores: 92 images/s, so 20 min.
"""

from configs import disco_resnet18


def get_config(preset: str = ""):
    c = disco_resnet18.get_config(preset)
    c.name = "disco_mobilenet_v3"
    c.student.name = "mobilenet_v3_large"
    return c
