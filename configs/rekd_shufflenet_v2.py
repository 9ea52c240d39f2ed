"""ReKD: ShuffleNetV2 with an online heterogeneous teacher (AAAI 2022, arXiv 2112.04174), a reconstruction.

    python launch/main.py --config=configs/rekd_shufflenet_v2.py[:smoke|:cifar10|:imagenet]

Published gain over the instance-wise baseline (ImageNet linear): 9.9 points; not measured here.
Embedded, 2 CPU cores: 295 images/s, so 7 min.
"""

from configs import rekd_alexnet


def get_config(preset: str = ""):
    c = rekd_alexnet.get_config(preset)
    c.name = "rekd_shufflenet_v2"
    c.student.update(name="shufflenet_v2_x1_0", stem="auto" if preset == "imagenet" else "small_s2")
    return c
