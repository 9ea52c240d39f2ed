"""Makes the checkpoints beside it: `python tests/golden/torch/make.py`. Recorded with torch 2.13.0."""

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn


def dtypes() -> dict:
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
    return {name: torch.arange(3).to(getattr(torch, name)) for name in names.split()}


def views() -> dict:
    matrix = torch.arange(12.0).reshape(3, 4)
    tagged = nn.Parameter(torch.ones(2))
    tagged.tag = "an attribute"
    return {
        "matrix": matrix,
        "row": matrix[1],
        "transposed": matrix.t(),
        "strided": matrix[:, 1::2],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "tagged": tagged,
        "storage": torch.arange(3, dtype=torch.uint8)._typed_storage(),
        "leaves": [torch.float16, torch.Size([2, 3]), b"\xff\0", b"", None, True, -1, 1 << 40, 1e-3, "ü", (), (1, [2])],
    }


def checkpoint() -> dict:
    """As training scripts write them: a state dict has `_metadata`, an optimizer keys that are integers."""
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 2), norm=nn.BatchNorm2d(2)))
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(number + torch.arange(parameter.numel()).reshape(parameter.shape))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    sum(parameter.sum() for parameter in net.parameters()).backward()
    optimizer.step()
    return {"epoch": 3, "arch": "tiny", "state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}


def main() -> None:
    folder = Path(__file__).parent
    for tree in (dtypes, views, checkpoint):
        torch.save(tree(), folder / f"{tree.__name__}.pth")
        torch.save(tree(), folder / f"{tree.__name__}_legacy.pth", _use_new_zipfile_serialization=False)
        torch.save(tree(), folder / f"{tree.__name__}_protocol4.pth", pickle_protocol=4)


if __name__ == "__main__":
    main()
