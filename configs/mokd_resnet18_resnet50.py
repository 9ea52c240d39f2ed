"""MOKD with two CNNs: ResNet-18 and ResNet-50 teach each other, both from scratch (CVPR 2023, arXiv 2304.06461).

    python launch/main.py --config=configs/mokd_resnet18_resnet50.py[:smoke|:cifar10|:imagenet]

Published (ImageNet linear): ResNet-18 61.2 -> 63.6; not measured here. In small (600 steps on CIFAR-10,
benchmarks/methods.md): 30.6 and 23.8, alone 33.1 and 22.9. Embedded, 2 CPU cores: 37 images/s, so 18 min.
"""

from configs import base, mokd_resnet50_vit_small


def get_config(preset: str = ""):
    c = mokd_resnet50_vit_small.get_config(preset)
    c.name = "mokd_resnet18_resnet50"
    c.student.name = "resnet18"
    c.teacher = base.network("resnet50", **{key: c.student[key] for key in ("head", "head_hidden", "dim", "thead")})
    c.teacher.update(width=c.student.width, stem=c.student.stem)
    # Both are CNNs.
    c.method.update(teacher_cross=c.method.student_cross, temperature_epochs=c.method.self_temperature_epochs)
    del c.optim.groups.teacher
    c.optim.groups.thead.paths += ("teacher/thead", "teacher/reduce")
    return c
