"""CompRess: AlexNet ranks anchor images as a frozen ResNet-50 does (NeurIPS 2020, arXiv 2010.14713).

    python launch/main.py --config=configs/moco_v2_resnet50.py[:smoke|:cifar10|:imagenet]          makes the teacher
    python launch/main.py --config=configs/compress_alexnet.py[:…] --config.teacher.source=workdir:runs/moco_v2_resnet50

The teacher's features of ten fixed views of every image, computed once: --config.teacher.cache_views=10. With one
queue, and the student mapped to the teacher's width: --config.method.queues=1 --config.student.head=linear
--config.student.dim=0. Published (ImageNet fc7 linear): 57.5, MoCo-v2 alone 45.7; not measured here. In small with
ResNet-18 (CIFAR-10, a public teacher, benchmarks/methods.md): 44.9, MoCo-v2 alone 40.0.
Embedded, 2 CPU cores: 146 images/s, so 12 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "compress_alexnet"
    c.student = base.network("alexnet", head="none")
    c.teacher = base.network("resnet50")
    c.method = base.method("compress")
    c.epochs = 130.0
    c.optim.update(lr=0.01, schedule="stairs", milestones=(90 / 130, 120 / 130), factor=0.2)
    base.apply_preset(c, preset)
    return c
