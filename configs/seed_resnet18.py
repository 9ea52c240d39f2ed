"""SEED: ResNet-18 repeats a frozen ResNet-50's similarities to a queue (ICLR 2021, arXiv 2101.04731).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/seed_resnet18.py[:…] --config.teacher.source=workdir:runs/moco_v2_resnet50

Published (ImageNet linear, teacher 67.4): 57.6, MoCo-v2 alone 52.5; not measured here. In small (CIFAR-10, a public
teacher, benchmarks/methods.md): 41.9, MoCo-v2 alone 40.0. Embedded, 2 CPU cores: 134 images/s, so 14 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "seed_resnet18"
    c.student = base.network("resnet18")
    c.teacher = base.network("resnet50")
    c.method = base.method("seed")
    base.apply_preset(c, preset)
    if preset == "imagenet":
        c.optim.update(warmup_epochs=5.0, ramp="from_base")  # as the authors' code
    return c
