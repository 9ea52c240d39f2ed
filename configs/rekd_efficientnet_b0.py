"""ReKD: EfficientNet-B0 with an online heterogeneous teacher (AAAI 2022, arXiv 2112.04174), a reconstruction.

    python launch/main.py --config=configs/rekd_efficientnet_b0.py[:smoke|:cifar10|:imagenet]

Published gain over the instance-wise baseline (ImageNet linear): 24.8 points; not measured here.
Embedded, 2 CPU cores: 92 images/s, so 20 min.
"""

from configs import rekd_alexnet


def get_config(preset: str = ""):
    c = rekd_alexnet.get_config(preset)
    c.name = "rekd_efficientnet_b0"
    c.student.update(name="efficientnet_b0", stem="auto" if preset == "imagenet" else "small_s2")
    return c
