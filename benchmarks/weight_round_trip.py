"""Every network of timm and torchvision into ssl_kd and back, bit for bit: `python benchmarks/weight_round_trip.py`.

A model of theirs with random weights is saved by torch, read here, written under their names and loaded into a second
model of theirs, strictly; all weights and statistics must be equal. Needs torch, timm and torchvision. It records the
outcome in weight_round_trip.json, and what the names and shapes were in tests/golden/weight_names.json, for the suite.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch_models import timm, torchvision

from ssl_kd.checkpoint import session
from ssl_kd.weights.commands import names_for
from ssl_kd.weights.files import read_network, write_network
from ssl_kd.weights.layouts import TIMM_MODELS
from ssl_kd.workdir import write_json

TORCHVISION_MODELS = {
    "alexnet_tv": "alexnet",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3_large_tv": "mobilenet_v3_large",
    "mobilenet_v3_small_tv": "mobilenet_v3_small",
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    "shufflenet_v2_x0_5": "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0": "shufflenet_v2_x1_0",
}
PROGRAMS = {
    "timm": (TIMM_MODELS, lambda name: timm.create_model(name)),
    "torchvision": (TORCHVISION_MODELS, lambda name: getattr(torchvision.models, name)()),
}


def names_digest(shapes: dict[str, tuple[int, ...]]) -> dict:
    """How many weights there are, and a digest of their names and shapes."""
    counted = {name: list(shape) for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    lines = sorted(f"{name} {shape}" for name, shape in counted.items())
    return {"count": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def round_trip(model: str, program: str, theirs: str, build, folder: Path) -> dict:
    there = build(theirs)
    original = there.state_dict()
    generator = torch.Generator().manual_seed(0)
    for tensor in original.values():  # also of what starts as zeros and ones
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    torch.save(original, folder / "there.pth")
    found = read_network(folder / "there.pth", model, classifier=True)
    assert found.spec.name == model and not found.aside, (found.spec, found.aside)
    layout = names_for(program, model)
    write_network(folder / "back.safetensors", found.spec, found.variables, found.image_size, {}, layout)
    back = safetensors.torch.load_file(folder / "back.safetensors")
    second = build(theirs)
    second.load_state_dict(back, strict=True)
    weights = {name: tensor for name, tensor in second.state_dict().items() if tensor.is_floating_point()}
    different = [name for name, tensor in weights.items() if not torch.equal(tensor, original[name])]
    parameters = sum(p.numel() for p in there.parameters())
    read = {"theirs": theirs, "read as": found.layout, "parameters": parameters}
    return read | {"weights": len(weights), "different": different}


def main() -> None:
    results: dict[str, dict[str, Any]] = {}
    names: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for program, (models, build) in PROGRAMS.items():
            for model, theirs in models.items():
                row = round_trip(model, program, theirs, build, Path(folder))
                results.setdefault(program, {})[model] = row
                shapes = {name: tuple(tensor.shape) for name, tensor in build(theirs).state_dict().items()}
                names.setdefault(program, {})[model] = names_digest(shapes)
                print(program, model, row, flush=True)
    versions = {module.__name__: module.__version__ for module in (torch, timm, torchvision)}
    here = Path(__file__)
    write_json(here.with_suffix(".json"), results | {"session": session() | {"torch": versions}})
    write_json(here.parents[1] / "tests" / "golden" / "weight_names.json", names)
    if failed := [model for rows in results.values() for model, row in rows.items() if row["different"]]:
        raise SystemExit(f"not equal: {', '.join(failed)}")


if __name__ == "__main__":
    main()
