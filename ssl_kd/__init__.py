"""Self-supervised knowledge distillation of lightweight vision models.

The rooms: `methods` (one paper, one file), `losses`, `memory`, `models`, `images` (of many sizes in one array),
`augment` (views on the device), `data` (uint8 batches by step number), `optim`, `state`, `step` (the one compiled
graph), `recipe` (config → objects), `run` (a recipe with data and devices), `train` (the loop), `mesh` (how arrays lie
on the devices), `processes` (many as one), `checkpoint`, `workdir`, `replay` (a failed step, kept and run again),
`probes` (kNN, linear, health), `trained` (networks of a finished run), `weights` (of others), `log`.

    apply, params = ssl_kd.load("runs/rekd_alexnet")
    features = apply(params, images)  # uint8 (B, H, W, 3) → float32 (B, D)
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`ssl_kd.load` imports jax and orbax only when it is used."""
    if name == "load":
        from ssl_kd.trained import load

        return load
    raise AttributeError(f"module 'ssl_kd' has no attribute {name!r}")
