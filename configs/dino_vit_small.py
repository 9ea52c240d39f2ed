"""DINO: ViT-S learns from its own average, without a partner (arXiv 2104.14294); MOKD with one network.

    python launch/main.py --config=configs/dino_vit_small.py[:smoke|:cifar10|:imagenet]

Its network is a teacher for other recipes. The small presets train a ViT-Ti of one attention head. Published
(ImageNet linear, 800 epochs): 77.0; not measured here. Embedded, 2 CPU cores: 76 images/s, so 10 min.
"""

from configs import mokd_resnet50_vit_small


def get_config(preset: str = ""):
    c = mokd_resnet50_vit_small.get_config(preset)
    c.name = "dino_vit_small"
    c.student = c.teacher
    c.optim.update({key: value for key, value in c.optim.groups.teacher.items() if key != "paths"})
    c.method.update(teacher="none", self_temperature_epochs=c.method.temperature_epochs)
    c.student.thead = 0
    del c.teacher, c.optim.groups.teacher, c.optim.groups.thead
    return c
