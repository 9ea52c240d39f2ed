"""A ReKD or DisCo step in plain PyTorch, as a careful user would write it: the other side of `benchmarks/peer.py`.

The networks, sizes and losses of ssl_kd's online prototype form of ReKD, and of DisCo without its relational terms. It
does less around them: batch norm over the whole batch (no groups, no shuffle), one candidate a crop and no antialiasing
(`grid_sample`), a constant rate, no re-seeding of idle prototypes, no metrics, no guard against what is not finite; and
on a GPU TF32 where ssl_kd's similarities are exact float32. It runs eagerly, without torch.compile. With compute_dtype
bfloat16: autocast; on a GPU channels last. The ResNets are written out because those of libraries take neither our
widths nor our small stems; at width 1 with the imagenet stem they are timm's, layer for layer.
Run by peer.py, which sends the sizes as one line of JSON, reads what work a step is, and then asks for timings; it
answers with seconds a step.
"""

import copy
import json
import sys
import time
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scaled(channels: int, width: float) -> int:
    return max(8, 8 * round(channels * width / 8))


def conv_bn(features_in: int, features: int, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Sequential:
    padding = kernel // 2 if padding is None else padding
    return nn.Sequential(
        nn.Conv2d(features_in, features, kernel, stride, padding, bias=False), nn.BatchNorm2d(features)
    )


class AlexNet(nn.Module):
    def __init__(self, width: float, stem: str, size: int):
        super().__init__()
        kernel, stride, pool, pooled = {"imagenet": (11, 4, 3, (1, 2, 5)), "small": (5, 2, 2, (1, 2))}[stem]
        layers: list[nn.Module] = []
        features_in = 3
        for i, (features, k) in enumerate(((96, kernel), (256, 5), (384, 3), (384, 3), (256, 3)), 1):
            first = {"stride": stride, "padding": 2} if i == 1 else {}
            layers += [conv_bn(features_in, scaled(features, width), k, **first), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(pool, 2)] if i in pooled else []
            features_in = scaled(features, width)
        self.convs = nn.Sequential(*layers)
        with torch.no_grad():
            flat = self.convs(torch.zeros(2, 3, size, size)).flatten(1).shape[1]
        self.pooled_dim = scaled(4096, width)
        self.fc = nn.Sequential(
            nn.Linear(flat, self.pooled_dim),
            nn.ReLU(inplace=True),
            nn.Linear(self.pooled_dim, self.pooled_dim),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.convs(x).flatten(1))


class Block(nn.Module):
    def __init__(self, features_in: int, planes: int, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:
            features = 4 * planes
            layers = [conv_bn(features_in, planes, 1), conv_bn(planes, planes, 3, stride), conv_bn(planes, features, 1)]
        else:
            features = planes
            layers = [conv_bn(features_in, planes, 3, stride), conv_bn(planes, planes, 3)]
        self.layers = nn.ModuleList(layers)
        self.down = (
            conv_bn(features_in, features, 1, stride) if stride > 1 or features_in != features else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers[:-1]:
            y = F.relu(layer(y), inplace=True)
        return F.relu(self.layers[-1](y) + self.down(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self, sizes: tuple[int, ...], bottleneck: bool, width: float, stem: str):
        super().__init__()
        planes = scaled(64, width)
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small_s2": (3, 2)}[stem]
        layers: list[nn.Module] = [conv_bn(3, planes, kernel, stride), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2, 1)] if stem == "imagenet" else []
        features = planes
        for stage, blocks in enumerate(sizes):
            planes = scaled(64 * 2**stage, width)
            for i in range(blocks):
                layers.append(Block(features, planes, 2 if stage and not i else 1, bottleneck))
                features = planes * (4 if bottleneck else 1)
        self.layers, self.pooled_dim = nn.Sequential(*layers), features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


RESNETS = {"resnet18": ((2, 2, 2, 2), False), "resnet34": ((3, 4, 6, 3), False), "resnet50": ((3, 4, 6, 3), True)}


def network(spec: dict, size: int) -> nn.Sequential:
    if spec["name"] == "alexnet":
        backbone: nn.Module = AlexNet(spec["width"], spec["stem"], size)
    else:
        backbone = ResNet(*RESNETS[spec["name"]], spec["width"], spec["stem"])
    d = backbone.pooled_dim
    hidden = spec["head_hidden"] or d
    head = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, spec["dim"]))
    return nn.Sequential(backbone, head).to(DEVICE, memory_format=torch.channels_last if DEVICE == "cuda" else None)


def augment(images: torch.Tensor, a: dict, size: int) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, size, size): crop and flip, jitter, grayscale, blur; a draw per image."""
    b = images.shape[0]

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(b, *shape, device=images.device)

    low, high = a["crop_scale"]
    area = low + (high - low) * draw()
    ratio = torch.exp(torch.log(torch.tensor(a["crop_ratio"][0])) * (1 - 2 * draw()))
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    flip = torch.where(draw() < a["flip"], -1.0, 1.0)
    zero = torch.zeros_like(w)
    x0, y0 = (2 * draw() - 1) * (1 - w), (2 * draw() - 1) * (1 - h)
    theta = torch.stack([torch.stack([w * flip, zero, x0], 1), torch.stack([zero, h, y0], 1)], 1)
    x = images.permute(0, 3, 1, 2).float() / 255
    x = F.grid_sample(x, F.affine_grid(theta, [b, 3, size, size], align_corners=False), align_corners=False)
    if a["jitter"]:
        apply = draw(1, 1, 1) < a["jitter"]
        y = x
        for operation in torch.randperm(4).tolist():
            y = JITTER[operation](y, a, draw)
        x = torch.where(apply, y, x)
    if a["grayscale"]:
        x = torch.where(draw(1, 1, 1) < a["grayscale"], gray(x), x)
    if a["blur"]:
        low, high = a["blur_sigma"]
        radius = min(int(-(-3 * high // 1)), size - 1)
        d = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (d / (low + (high - low) * draw(1))) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
        y = F.pad(x, [radius] * 4, mode="reflect").reshape(1, 3 * b, size + 2 * radius, size + 2 * radius)
        y = F.conv2d(F.conv2d(y, kernel[:, None, None, :], groups=3 * b), kernel[:, None, :, None], groups=3 * b)
        x = torch.where(draw(1, 1, 1) < a["blur"], y.reshape(x.shape), x)
    return x


def gray(x: torch.Tensor) -> torch.Tensor:
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None].expand_as(x)


def factor(strength: float, draw) -> torch.Tensor:
    return 1 - min(strength, 1) + (min(strength, 1) + strength) * draw(1, 1, 1)


def brightness(x, a, draw):
    return (x * factor(a["brightness"], draw)).clamp(0, 1)


def contrast(x, a, draw):
    f = factor(a["contrast"], draw)
    return (f * x + (1 - f) * gray(x)[:, :1].mean((2, 3), keepdim=True)).clamp(0, 1)


def saturation(x, a, draw):
    if not a["saturation"]:
        return x
    f = factor(a["saturation"], draw)
    return (f * x + (1 - f) * gray(x)).clamp(0, 1)


def hue(x, a, draw):
    if not a["hue"]:
        return x
    r, g, b = x.unbind(1)
    value, least = x.amax(1), x.amin(1)
    chroma = value - least
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    )
    turned = sixths + 6 * a["hue"] * (2 * draw(1, 1) - 1)
    out = []
    for n in (5, 3, 1):
        k = (n + turned) % 6
        out.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(out, 1)


JITTER = (brightness, contrast, saturation, hue)


def unit_rows(count: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, device=DEVICE))


def info_nce(logits: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(1)[:, 0].mean()


class Step:
    """A step on a resident set of random images; a method says what is embedded, the loss, and the rows it keeps."""

    rows: dict[str, torch.Tensor]
    """The queue: name → (K, …), the oldest rows overwritten first."""

    def __init__(self, c: dict):
        self.c, self.method, self.ptr = c, c["method"], 0
        self.networks = {role: network(spec, c["image_size"]) for role, spec in c["networks"].items()}
        for role in c["frozen"]:
            self.networks[role].eval().requires_grad_(False)
        averages = {f"{role}_momentum": copy.deepcopy(self.networks[role]) for role in c["trained"]}
        self.trained = [p for role in c["trained"] for p in self.networks[role].parameters()]
        self.averaged = [p for average in averages.values() for p in average.parameters()]
        self.networks |= averages
        self.optimizer = torch.optim.SGD(self.trained, c["lr"], momentum=0.9, weight_decay=c["weight_decay"])
        shape = (c["images"], c["canvas"], c["canvas"], 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        self.mean, self.std = mean.view(3, 1, 1).to(DEVICE), std.view(3, 1, 1).to(DEVICE)

    def embed(self, one: torch.Tensor, two: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every embedding of the two views that the loss takes."""
        raise NotImplementedError

    def loss(self, *embeddings: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of the normalised embeddings; and the new rows of the queue."""
        raise NotImplementedError

    def contrast(self, q: torch.Tensor, k: torch.Tensor, name: str) -> torch.Tensor:
        """Logits of each query against its own key, then against the queue."""
        return torch.cat([(q * k).sum(1, keepdim=True), q @ self.rows[name].T], 1) / self.method["temperature"]

    def __call__(self) -> torch.Tensor:
        return self.learn(*self.views())

    def view(self, images: torch.Tensor) -> torch.Tensor:
        x = (augment(images, self.c["augment"], self.c["image_size"]) - self.mean) / self.std
        return x.to(memory_format=torch.channels_last) if DEVICE == "cuda" else x

    @torch.no_grad()
    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.images[torch.randint(0, len(self.images), (self.c["batch_size"],), device=DEVICE)]
        return self.view(images), self.view(images)

    def learn(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.c["bfloat16"]):
            embeddings = self.embed(one, two)
        loss, new = self.loss(*(F.normalize(x.float()) for x in embeddings))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.trained, 1 - self.method["momentum"])
            oldest = (self.ptr + torch.arange(len(one), device=DEVICE)) % self.method["queue"]
            for name, rows in new.items():
                self.rows[name][oldest] = rows
            self.ptr = (self.ptr + len(one)) % self.method["queue"]
        return loss


class ReKD(Step):
    def __init__(self, c: dict):
        super().__init__(c)
        k, student, teacher = self.method["queue"], c["networks"]["student"]["dim"], c["networks"]["teacher"]["dim"]
        self.rows = {"k": unit_rows(k, student), "u": unit_rows(k, teacher), "y": torch.full((k,), -1, device=DEVICE)}
        self.centres = unit_rows(self.method["prototypes"], teacher)

    def embed(self, one, two):
        q, t = self.networks["student"](one), self.networks["teacher"](one)
        with torch.no_grad():
            return q, t, self.networks["student_momentum"](two), self.networks["teacher_momentum"](two)

    def loss(self, q, t, k, u):
        y = (u @ self.centres.T).argmax(1)
        positives = torch.cat([torch.ones_like(y, dtype=torch.bool)[:, None], y[:, None] == self.rows["y"][None]], 1)
        targets = positives / positives.sum(1, keepdim=True)
        loss = -(targets * self.contrast(q, k, "k").log_softmax(1)).sum(1).mean() + info_nce(self.contrast(t, u, "u"))
        total = torch.zeros_like(self.centres).index_add_(0, y, u)
        count = torch.zeros_like(self.centres[:, 0]).index_add_(0, y, torch.ones_like(u[:, 0]))[:, None]
        moved = F.normalize(0.99 * self.centres + 0.01 * total / count.clamp(min=1))
        self.centres = torch.where(count > 0, moved, self.centres)
        return loss, {"k": k, "u": u, "y": y}


class DisCo(Step):
    def __init__(self, c: dict):
        super().__init__(c)
        self.rows = {"k": unit_rows(self.method["queue"], c["networks"]["student"]["dim"])}

    def embed(self, one, two):
        student, teacher = self.networks["student"], self.networks["teacher"]
        with torch.no_grad():
            k, t, t2 = self.networks["student_momentum"](two), teacher(one), teacher(two)
        return student(one), student(two), k, t, t2

    def loss(self, q, q2, k, t, t2):
        consistency = (t - q).square().sum(1).mean() + (t2 - q2).square().sum(1).mean()
        contrast = info_nce(self.contrast(q, k, "k"))
        return self.method["contrast"] * contrast + self.method["consistency"] * consistency, {"k": k}


STEPS = {"rekd": ReKD, "disco": DisCo}


def work(step: Step) -> dict:
    """Parameters of each network; forwards of each and FLOPs of a step, without its augmentation."""
    forwards: Counter[str] = Counter()
    hooks = [
        network.register_forward_hook(lambda *_, name=name: forwards.update([name]))
        for name, network in step.networks.items()
    ]
    views = step.views()
    with FlopCounterMode(display=False) as flops:
        step.learn(*views)
    for hook in hooks:
        hook.remove()
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in step.networks.items()}
    return {"parameters": parameters, "forwards": forwards, "flops": flops.get_total_flops()}


def timed(step: Step, budget: float) -> float:
    float(step().detach())
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < budget:
        loss, count = step(), count + 1
        if DEVICE == "cuda" and count % 4 == 0:
            torch.cuda.synchronize()  # or the host would queue far more than the budget
    float(loss.detach())
    return (time.perf_counter() - began) / count


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    sizes = json.loads(sys.stdin.readline())
    step = STEPS[sizes["method"]["name"]](sizes)
    for _ in range(3):
        step()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(json.dumps({"torch": torch.__version__, "device": device, "work": work(step)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(step, float(line))), flush=True)


if __name__ == "__main__":
    main()
