"""ReKD: MobileNetV3-Large with an online heterogeneous teacher (AAAI 2022, arXiv 2112.04174), a reconstruction.

    python launch/main.py --config=configs/rekd_mobilenet_v3.py[:smoke|:cifar10|:imagenet]

Published gain over the instance-wise baseline (ImageNet linear): 21.4 points; not measured here.
Embedded, 2 CPU cores: 178 images/s, so 11 min.
"""

from configs import rekd_alexnet


def get_config(preset: str = ""):
    c = rekd_alexnet.get_config(preset)
    c.name = "rekd_mobilenet_v3"
    c.student.update(name="mobilenet_v3_large", stem="auto" if preset == "imagenet" else "small_s2")
    return c
