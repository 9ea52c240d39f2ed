"""torchvision and timm beside a torch for the CPU.

PyPI's torchvision belongs to the torch for CUDA. Where torch is the CPU's, importing it fails, because it describes two
operators that it could not load; no classifier uses them, so that names without bodies are enough.
"""

import torch

try:
    import torchvision
except RuntimeError:
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision
import timm

__all__ = ["timm", "torchvision"]
