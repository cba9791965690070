"""KFS: condensation with latent space knowledge factorization and sharing (Lee et al. 2022).

In place of images, KFS stores M small latent codes theta_cm per class and D tiny decoders phi_d,
shared by all classes. Each code goes through each decoder: M x D training images per class for the
storage of a few. Both are learned by matching distributions over the full real and synthetic sets:
with g(x) the features of a ConvNet with random parameters, new ones in each iteration,

    L = 1/C sum_c 1/2 || 1/N sum_n g(x_cn) - 1/(D M) sum_dm g(f(theta_cm; phi_d)) ||^2     (Eq. 1)

A sample of the synthetic images gives a biased gradient (Eq. 2, --sample-decoders), a sample of
the real images a noisy one (Eq. 3, --batch-real).

    python kfs.py                                              # glyphs: minutes on a CPU
    python kfs.py --dataset cifar10 --ipc 1                    # the paper: 59.8 +- 0.5 %
    python kfs.py --dataset cifar10 --ipc 1 --real-means 100   # reuse 100 networks: faster

Measured on CIFAR-10, --ipc 1: 61.3 +- 0.2 %, --iterations 1500 --drops 1200 1390 --real-means 96.
"""

import math
import pathlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import arg


@dataclass
class Args(common.Args):
    free = common.Args.free + ("scoring",)
    places = common.Args.places + ("fixed_decoders",)
    ipc: int = arg(1, "storage of the codes, in images per class; the decoders come on top")
    iterations: int = arg(20000, "iterations of the distillation")
    lr_codes: float = arg(0.1, "learning rate of the codes (Adam)")
    lr_decoders: float = arg(0.01, "learning rate of the decoders (Adam)")
    drops: tuple = arg((), "iterations after which both rates are multiplied by 0.2")
    high_res: bool = arg(False, "High-R: codes of 1/4 side, 2-layer decoders (else 1/8, 3 layers)")
    codes: int = arg(0, "M: codes per class; 0: as many as fit into the storage", 0)
    decoders: int = arg(8, "D: decoders")
    pretrain: int = arg(2000, "steps of the auto-encoder that starts codes, decoders")
    real_means: int = arg(0, "K: stored networks, used in turn; 0: a new one in each iteration", 0)
    sample_decoders: int = arg(0, "decoders in an iteration (biased gradient, Eq. 2); 0: all", 0)
    batch_real: int = arg(0, "real images per class and iteration (noisy, Eq. 3); 0: all", 0)
    backprop: int = arg(0, "codes per class to backpropagate through (Sec. 3.2); 0: all", 0)
    fixed_decoders: str = arg("", "file whose decoders are kept, for class-incremental learning")
    scoring: Literal["idc", "dsa"] = arg("idc", "augmentation: IDC's with CutMix, or DSA")


PRESETS = {
    ("cifar10", 1): {},
    ("cifar10", 10): dict(high_res=True),
    ("glyphs", 1): dict(iterations=60, decoders=4, pretrain=300, real_means=10, runs=2, epochs=60),
}


class Decoders(nn.Module):
    """D decoders as the groups of grouped transposed convolutions (Tables 4, 5).

    With widths 12, 9, 6, 3 and kernel 2, a decoder has 738 parameters (App. B: kernel 4 for
    ImageNet). A final sigmoid gives pixels, which are then standardized by mean, std (c, 1, 1).
    """

    def __init__(self, count, args, shape, mean, std):
        super().__init__()
        _, _, widths = layout(args, shape)
        self.count = count
        self.shape = tuple(shape)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.layers = nn.Sequential()
        for inside, outside in pairwise(widths):
            layer = nn.ConvTranspose2d(count * inside, count * outside, 2, stride=2, groups=count)
            self.layers.append(layer)

    def forward(self, codes):
        """Codes (B, c', h', w') -> images (B, D, c, h, w), preprocessed."""
        x = self.layers(codes.repeat(1, self.count, 1, 1))
        h, w = self.shape[1:]
        # sides were rounded up
        top = (x.shape[2] - h) // 2
        left = (x.shape[3] - w) // 2
        x = x[:, :, top : top + h, left : left + w].unflatten(1, (self.count, -1))
        return (x.sigmoid() - self.mean) / self.std


def layout(args, shape):
    """Shape of a code, number of codes M, and widths of the decoders.

    Tables 6 and 9 (shapes) are missing from our copy of the paper. Its text has codes of 12x4x4 for
    3x32x32: 16 for one image, 160 for ten (misprinted as 16); our preset for ten has 40 of 12x8x8.
    """
    c, h, w = shape
    cell = 4 if args.high_res else 8
    code = (4 * c, math.ceil(h / cell), math.ceil(w / cell))
    codes = args.codes or max(1, args.ipc * math.prod(shape) // math.prod(code))
    widths = (4 * c, 2 * c, c) if args.high_res else (4 * c, 3 * c, 2 * c, c)
    return code, codes, widths


def start_factors(data, args, fixed=None):
    """Pre-train a decoder as an auto-encoder and copy it D times (App. A) -> codes, Decoders.

    Ours: codes (C, M, c', h', w') are encoded real images, the encoder is linear, the copies have
    10 % of noise. fixed: Decoders to keep; then the encoder alone is trained.
    """
    code, count, widths = layout(args, data.shape)
    fewest = data.smallest_class
    if count > fewest:
        raise common.UserError(f"{count} codes start from {fewest} images: lower --ipc or --codes")
    statistics = data.preprocess.mean, data.preprocess.std
    common.seed(args.seed, "auto-encoder")
    pairs = pairwise(widths[::-1])
    encoder = nn.Sequential(*[nn.Conv2d(i, o, 2, stride=2) for i, o in pairs]).to(data.device)
    decoder = fixed or Decoders(1, args, data.shape, *statistics).to(data.device)
    # images are padded to whole cells of a code, as Decoders crops: left, right, top, bottom
    extra = code[1] * 2 ** len(encoder) - data.shape[1]
    border = (extra // 2, extra - extra // 2) * 2

    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    for step in common.progress(range(args.pretrain), "pre-training"):
        images, _ = data.batch(256, args.seed, "auto-encoder", step)
        decoded = decoder(encoder(F.pad(images, border, mode="replicate")))
        loss = (decoded - images[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        images, _ = data.sample(count, args.seed, "codes")
        codes = encoder(F.pad(images, border, mode="replicate"))
        codes = codes.unflatten(0, (len(data.classes), -1))
        if fixed:
            return codes, fixed
        decoders = Decoders(args.decoders, args, data.shape, *statistics)
        # identical decoders get identical gradients from Eq. 1; noise breaks the symmetry
        common.seed(args.seed, "noise")
        for p, one in zip(decoders.parameters(), decoder.cpu().parameters(), strict=True):
            # axis 0 of a grouped layer: the inputs (weights) or outputs (biases) of all groups
            copies = one.repeat(args.decoders, *[1] * (one.ndim - 1))
            p.copy_(copies + 0.1 * one.square().mean().sqrt() * torch.randn(p.shape))
    return codes, decoders.to(data.device)


def distill(data, args, path):
    """Condense `data` into codes and decoders -> content of the distilled file `path`."""
    if args.zca:
        raise common.UserError("decoders give pixels in [0, 1], not whitened ones: leave out --zca")
    args = replace(args, batch_real=data.at_most(args.batch_real))
    fixed = load_decoders(args, data) if args.fixed_decoders else None
    weights = nn.utils.parameters_to_vector(fixed.parameters()).detach() if fixed else None
    run = common.Run(path, data, args, inputs=weights)
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device).requires_grad_(False)
    real_means = load_real_means(net, data, args) if args.real_means else None
    # a continued run takes codes and decoders from its checkpoint
    codes, decoders = start_factors(data, replace(args, pretrain=0) if run.start else args, fixed)
    groups = [
        {"params": [codes.requires_grad_()], "lr": args.lr_codes},
        {"params": decoders.parameters(), "lr": args.lr_decoders},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, args.drops, gamma=0.2)
    state = {"codes": codes, "optimizer": optimizer, "schedule": schedule}
    if not fixed:
        state["decoders"] = decoders

    def evaluate(k):
        images, labels = images_of(codes, decoders)
        return common.train_and_test(data, images, labels, protocol(args), args, k=k)

    run.restore(state, evaluate)
    for it in common.progress(range(run.start, args.iterations), "iterations"):
        key = (args.seed, it)
        if real_means:
            networks, means = real_means
            nn.utils.vector_to_parameters(networks[it % args.real_means], net.parameters())
            target = means[it % args.real_means]
        else:
            net.reset(*key)
            real = data.train, data.train_labels
            if args.batch_real:
                real = data.sample(args.batch_real, *key, "real")
            target = class_means(net, data, *real)
        optimizer.zero_grad()
        loss = match_distribution(net, target, codes, decoders, args, *key)
        optimizer.step()
        schedule.step()
        run.step(it, loss)

    tensors = {f"decoders.{name}": p for name, p in decoders.named_parameters()}
    return common.save_distilled(path, data, args, {"codes": codes} | tensors, run)


def match_distribution(net, target, codes, decoders, args, *key):
    """Compute Eq. 1 for real means (C, d) -> loss; add its gradient to codes and decoders.

    A first pass without a graph gives the means, hence the gradient at each feature vector, (mean -
    target) / (C n) for n images per class; a second pass backpropagates it, 512 images at a time.
    """
    classes, m = codes.shape[:2]
    used_decoders = used_codes = slice(None)
    if args.sample_decoders:
        # biased: the mean is over a sample (Eq. 2)
        common.seed(*key, "decoders")
        used_decoders = torch.randperm(decoders.count, device=codes.device)[: args.sample_decoders]
    if args.backprop:
        # unbiased: the mean is over all codes, the gradient through a sample
        common.seed(*key, "codes")
        used_codes = torch.randperm(m, device=codes.device)[: args.backprop]

    images = decoders(codes.flatten(0, 1))[:, used_decoders]
    features = common.frozen_features(net, images.flatten(0, 1))
    gap = features.unflatten(0, (classes, -1)).mean(1) - target
    images = images.unflatten(0, (classes, m))[:, used_codes].flatten(0, 2)
    leaf = images.detach().requires_grad_()
    per_class = len(images) // classes
    adjoint = (gap / (classes * per_class)).repeat_interleave(per_class, 0)
    for x, a in zip(leaf.split(512), adjoint.split(512), strict=True):
        with common.autocast(x):
            common.compiled_features(net, x).backward(a)
    images.backward(leaf.grad)
    return gap.square().sum() / (2 * classes)


def class_means(net, data, images, labels):
    """Mean features of each class over images (n, c, h, w), labels (n,) -> (C, d)."""
    one_hot = F.one_hot(labels, len(data.classes)).float()
    return one_hot.T @ common.frozen_features(net, images) / one_hot.sum(0)[:, None]


def load_real_means(net, data, args):
    """Load or compute K random networks (K, P) and their class means (K, C, d) (Sec. 3.2)."""
    if args.batch_real:
        raise common.UserError("--real-means are over all real images: leave out --batch-real")
    low = common.fast_type(data.train) == torch.bfloat16
    name = f"{data.name}_{data.fingerprint}" + "_bf16" * low
    stored = []
    for k in common.progress(range(args.real_means), "real means"):
        path = pathlib.Path(args.data_dir) / "real_means" / name / f"network{k:05d}.pt"
        if not path.exists():
            net.reset("real means", k)
            means = class_means(net, data, data.train, data.train_labels)
            weights = nn.utils.parameters_to_vector(net.parameters())
            common.save([weights.cpu(), means.cpu()], path)
        stored.append(common.load(path, "stored real means"))
    return [torch.stack(tensors).to(data.device) for tensors in zip(*stored, strict=True)]


def open_factors(distilled, device="cpu"):
    """The codes (C, M, c', h', w') and Decoders of a distilled file."""
    args = Args(**distilled["settings"])
    statistics = distilled["mean"], distilled["std"]
    decoders = Decoders(args.decoders, args, distilled["shape"], *statistics)
    decoders.load_state_dict({k: distilled[f"decoders.{k}"] for k in decoders.state_dict()})
    return distilled["codes"].to(device), decoders.to(device).requires_grad_(False)


def load_decoders(args, data):
    """The Decoders of args.fixed_decoders for other classes, `data` (App. A), by its statistics."""
    stored = common.load(args.fixed_decoders, "a distilled file of kfs.py", "settings", "codes")
    names = ("dataset", "size", "high_res", "decoders")
    same = [stored["settings"].get(name) == vars(args)[name] for name in names]
    if stored["shape"] != list(data.shape) or not all(same):
        raise common.UserError(f"{args.fixed_decoders} has another shape, {', '.join(names)}")
    statistics = {"mean": data.preprocess.mean, "std": data.preprocess.std}
    return open_factors(stored | statistics, data.device)[1]


@torch.no_grad()
def images_of(codes, decoders):
    """All M x D images per class -> images (1, n, c, h, w), labels (n,)."""
    images = torch.cat([decoders(x).flatten(0, 1) for x in codes])
    labels = torch.arange(len(codes), device=codes.device)
    return images[None], labels.repeat_interleave(len(images) // len(codes))


def decode(distilled, device="cpu"):
    """All images of a distilled file (1, n, c, h, w) and their labels (n,)."""
    return images_of(*open_factors(distilled, device))


def protocol(args):
    """App. A: 200 epochs, lr x 0.2 at 133 and 166. It names no augmentation: we take IDC's."""
    own = {"epochs": 200, "drops": (133 / 200, 166 / 200), "decay": 0.2}
    if args.scoring == "idc":
        own |= {"augment": idc_augment, "mix": cutmix}
    return common.Protocol(**own)


def idc_augment(images, flip, *key):
    """IDC's augmentation on each batch: color, flip, then one of crop, scale, rotate."""
    last = ("crop", "scale", "rotate")[common.hash_int(*key) % 3]
    common.seed(*key)
    for name in ["color"] + ["flip"] * flip + [last]:
        images = common.transform(images, name, torch.rand(len(images), 3, device=images.device))
    return images


def cutmix(images, labels, *key):
    """IDC's CutMix: with p = 0.5, each image gets a box of another; labels (n, C) mix by area."""
    use, area, y, x = (common.hash_int(*key, name) / 2**63 for name in ("use", "area", "y", "x"))
    if use < 0.5:
        return images, labels
    pixel = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    rows = (pixel - y).abs() < area**0.5 / 2
    columns = (pixel - x).abs() < area**0.5 / 2
    box = rows[:, None] & columns
    common.seed(*key, "partner")
    other = torch.randperm(len(images), device=images.device)
    return torch.where(box, images[other], images), labels.lerp(labels[other], box.float().mean())


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path(args)
    data = common.load_dataset(args, common.setup(args))
    distilled = distill(data, args, path)
    images, labels = decode(distilled, data.device)
    shown = images[0].unflatten(0, (len(data.classes), -1, args.decoders))[:, :2]
    common.save_grid(path.with_suffix(".png"), data, shown.flatten(0, 2), columns=args.decoders)
    common.score(data, distilled, images, labels, protocol(args), args)


if __name__ == "__main__":
    common.cli(main)
