"""MOKD: ResNet-50 and ViT-S teach each other, both from scratch (CVPR 2023, arXiv 2304.06461).

    python launch/main.py --config=configs/mokd_resnet50_vit_small.py[:smoke|:cifar10|:imagenet]
    python launch/evaluate.py --workdir=runs/mokd_resnet50_vit_small --network=teacher_momentum            the ViT

Small presets: ResNet-18 with ViT-Ti, 2 + 4 crops, 1024 outputs. Embedded, 2 CPU cores: 38 images/s, 18 min; after 600
steps of CIFAR-10: 33.0, 32.8 (alone 33.1, 31.7). Published (ImageNet linear): ResNet-50, ViT-B 75.6, 78.0 (72.1, 77.0).
"""

from configs import base


def get_config(preset: str = ""):
    c = base.get_config()
    c.name = "mokd_resnet50_vit_small"
    c.student = base.network("resnet50", head="dino", dim=65536, thead=384)
    c.teacher = base.network("vit_small", head="dino", dim=65536, thead=384, drop_path=0.1)
    c.method = base.method("mokd", teacher_cross=0.1)
    c.epochs = 100.0
    base.apply_preset(c, preset)
    if preset != "imagenet":
        small = {"head_hidden": 512, "dim": 256 if preset == "smoke" else 1024, "thead": 64}
        c.student.update(name="resnet18", stem="small_s2", **small)
        c.teacher.update(name="vit_tiny", width=1 / 3, stem="small", **small)
        c.method.update(local_crops=4, local_size=16, augmentation="default", momentum=0.99)
        # With the paper's values of what follows 600 steps teach nothing: "MOKD in small", benchmarks/README.md.
        c.method.update(first_teacher_temperature=0.02, teacher_temperature=0.02, student_cross=0.1)
        c.method.update(global_scale=(0.4, 1.0), local_scale=(0.15, 0.5))
        c.epochs = min(c.epochs, 4.0)
    if preset == "smoke":
        c.data.train, c.method.local_crops, c.method.momentum = "train[:512]", 2, 0.9
    warmup = {"warmup_epochs": 10.0 if preset == "imagenet" else 1.0, "ramp": "through_peak", "clip": 3.0}
    c.optim.update(lr=0.1, final_lr=0.0048, weight_decay=1e-4, decay="weights", last_layer_epochs=1.0, **warmup)
    vit = {"lr": 3e-4, "final_lr": 1e-5, "weight_decay": 0.04, "final_weight_decay": 0.4, "last_layer_epochs": 1.0}
    c.optim.groups.teacher = base.optimizer("adamw", paths=("teacher",), decay="weights", **vit, **warmup)
    c.optim.groups.thead = base.optimizer("sgd", paths=("student/thead", "student/reduce"), **vit, **warmup)
    if preset != "imagenet":
        # At a ViT's rate under SGD the features collapse (there too, with two CNNs).
        c.optim.groups.thead.update(lr=0.1, final_lr=1e-3)
    return c
