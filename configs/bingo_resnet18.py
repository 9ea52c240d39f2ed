"""BINGO: ResNet-18 gathers the bags of similar images that a frozen ResNet-50 sees (ICLR 2022, arXiv 2107.01691).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/bingo_resnet18.py[:…] --config.teacher.source=workdir:runs/moco_v2_resnet50

The bags are mined before the first step and kept in the work directory (method.bag_path shares them between runs).
Published (ImageNet linear, teacher 67.4): 61.4, MoCo-v2 alone 52.5; not measured here. In small (CIFAR-10, a public
teacher, benchmarks/methods.md): 43.1, MoCo-v2 alone 40.0. Embedded, 2 CPU cores: 81 images/s, so 21 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "bingo_resnet18"
    c.student = base.network("resnet18", head_hidden=2048)
    c.teacher = base.network("resnet50")
    c.method = base.method("bingo")
    c.bn_groups = 8
    base.apply_preset(c, preset)
    if preset != "imagenet":
        c.method.single_epochs = 1.0
    return c
