"""MOKD with two ViTs: ViT-Ti and ViT-S teach each other, both from scratch (CVPR 2023, arXiv 2304.06461).

    python launch/main.py --config=configs/mokd_vit_tiny_vit_small.py[:smoke|:cifar10|:imagenet]

No published number is known to us; not measured here. The small presets give them one and two attention heads.
Embedded, 2 CPU cores: 14 images/s, so 51 min.
"""

from configs import mokd_resnet50_vit_small


def get_config(preset: str = ""):
    c = mokd_resnet50_vit_small.get_config(preset)
    c.name = "mokd_vit_tiny_vit_small"
    c.student = c.teacher.copy_and_resolve_references()
    c.student.name, c.teacher.name = "vit_tiny", "vit_small"
    c.optim.update({key: value for key, value in c.optim.groups.teacher.items() if key != "paths"})
    c.method.self_temperature_epochs = c.method.temperature_epochs
    del c.optim.groups.teacher, c.optim.groups.thead
    return c
