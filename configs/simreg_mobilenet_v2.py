"""SimReg: MobileNetV2 regresses a frozen ResNet-50's features through a 4-layer head (BMVC 2021, arXiv 2201.05131).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/simreg_mobilenet_v2.py[:…] \
        --config.teacher.source=workdir:runs/moco_v2_resnet50

No published number is known to us; not measured here. Embedded, 2 CPU cores: 323 images/s, so 6 min.
"""

from configs import simreg_resnet18


def get_config(preset: str = ""):
    c = simreg_resnet18.get_config(preset)
    c.name = "simreg_mobilenet_v2"
    c.student.name = "mobilenet_v2"
    return c
