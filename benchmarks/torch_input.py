"""The input pipelines that input.py compares with, in plain PyTorch and torchvision: run by it, not by hand.

Both read with Pillow in the DataLoader's own process: workers would only add the copying of batches.

'two views' is MoCo-v2's augmentation, with Pillow's blur as in its own code; ssl_kd makes views on the device, inside
the step. 'one centre crop' is what is left without them: decode, shrink to 256, cut 224.
"""

import contextlib
import itertools
import json
import random
import sys
import time

import torch
from PIL import ImageFilter

with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers, and timm may print when it is imported
    from torch_models import torchvision

transforms = torchvision.transforms

NORMALIZE = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
VIEW = transforms.Compose(
    [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], p=0.5),
        transforms.RandomHorizontalFlip(),
        *NORMALIZE,
    ]
)
PIPELINES = {
    "two views": lambda image: (VIEW(image), VIEW(image)),
    "one centre crop": transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *NORMALIZE]),
}


def main() -> None:
    torch.set_num_threads(1)
    folder, batch_size = sys.argv[1], int(sys.argv[2])
    batches = {}
    for name, pipeline in PIPELINES.items():
        images = torchvision.datasets.ImageFolder(folder, pipeline)
        loader = torch.utils.data.DataLoader(images, batch_size, shuffle=True, drop_last=True)
        batches[name] = itertools.chain.from_iterable(itertools.repeat(loader))
    for line in sys.stdin:
        name, budget = json.loads(line)
        next(batches[name])
        began, worked, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < budget:
            next(batches[name])
            count += batch_size
        print(count / (time.process_time() - worked), flush=True)


if __name__ == "__main__":
    main()
