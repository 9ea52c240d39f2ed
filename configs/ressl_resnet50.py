"""ReSSL with ResNet-50: relations instead of instances, without a teacher (NeurIPS 2021, arXiv 2107.09282).

    python launch/main.py --config=configs/ressl_resnet50.py[:smoke|:cifar10|:imagenet]

Its network is a teacher for other recipes. Not measured on ImageNet here. In small with ResNet-18 (CIFAR-10,
benchmarks/methods.md): 34.0, MoCo-v2 40.0. Embedded, 2 CPU cores: 152 images/s, so 11 min.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "ressl_resnet50"
    del c.teacher
    c.student = base.network("resnet50", dim=512)
    c.method = base.method("ressl")
    c.bn_groups = 8
    c.optim.update(lr=0.05, warmup_epochs=5.0, decay="weights")
    base.apply_preset(c, preset)
    if preset != "imagenet":
        c.student.dim = 128
    return c
