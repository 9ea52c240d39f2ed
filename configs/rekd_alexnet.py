"""ReKD: an AlexNet student learns from the relations that an online ResNet teacher mines (AAAI 2022, arXiv 2112.04174).

    python launch/main.py --config=configs/rekd_alexnet.py             embedded images, a laptop
    python launch/main.py --config=configs/rekd_alexnet.py:smoke       the same in miniature, a minute or two
    python launch/main.py --config=configs/rekd_alexnet.py:cifar10 --config.data.source=hf:DIRECTORY
    python launch/main.py --config=configs/rekd_alexnet.py:imagenet    the paper's setting, TFDS imagenet2012

The equations are a reconstruction (ssl_kd/methods/rekd.py). Published: 50.1 % conv5 linear on ImageNet, against 44.7
before; ours there is not measured. The README has what the small presets reach.
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "rekd_alexnet"
    c.student = base.network("alexnet")
    c.teacher = base.network("resnet50")
    c.method = base.method("rekd")
    c.bn_groups = 8  # of 32 images, with shuffled keys, as the 8-GPU references
    base.apply_preset(c, preset)
    if preset != "imagenet":
        c.teacher = base.network("resnet18", width=c.student.width, stem="small_s2")
        c.method.prototypes = 100
    return c
