"""Few-shot dataset distillation via translative pre-training (Liu & Wang, ICCV 2023).

Distilling in thousands of networks is slow; in one it is fast, but the result fits that one only.
So: distill in one random network theta, then translate the images so that they serve any network.
With features f(X), synthetic images X_S and labels Y_S are judged by neural feature regression,

    || f(X_T) w* - Y_T ||^2,   w* = f(X_S)^T (f(X_S) f(X_S)^T)^-1 Y_S                      (Eq. 2)

The translator G, a small auto-encoder, is trained to make this loss small in random networks theta'
(Alg. 2), on subsets of a large data set, each distilled in theta and cached. Then it adapts to the
target set in S' steps. The result trains a fresh network like FRePo's. --mode: columns of Table 3.

    python translator_fewshot.py --mode autoencoder                        # glyphs: minutes
    python translator_fewshot.py --mode pretrain --dataset tiny32 --out t  # writes t/translator.pt
    python translator_fewshot.py --dataset cifar10 --translator t/translator.pt    # paper: 44.0 %

No code of the authors is known. What the paper omits follows FRePo's PyTorch branch, to which it
refers: no norm, torch's initialization, ridge 1e-6, mirror images, the margin of labels, AdamW in
scoring, Adam with a cosine to 10 % on images and labels. Our own choices:

- A loss is half the mean (paper: the sum) over images: all real ones in theta, a batch in theta'.
- G has width 64 and a last convolution, no down-sampling; in Ours-DS it works at half the side.
- Mirror images for all budgets; Alg. 1 takes 1,000 outer steps at the adaptation's rate.
- G is trained by Adam at constant rates; the auto-encoder by squared error, 128 images a step.
- A subset has a uniformly drawn number of synthetic images, and a DSA copy of each real image.

Measured on CIFAR-10, --ipc 1: 37.8 +- 0.2 %, 300 + 1,000 steps; pre-trained 1,000 on 24 subsets.
"""

import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import arg

# Modes that adapt G to the target set; modes with a translator G
ADAPTED = ("adapted", "scratch", "autoencoder")
TRANSLATED = ADAPTED + ("no-adaptation", "pretrain")
MODES = TRANSLATED + ("one-net", "bilevel", "baseline")


@dataclass
class Args(common.Args):
    ipc: int = arg(1, "synthetic images per class")
    mode: Literal[MODES] = arg("adapted", "a column of Table 3, or pretrain: write a translator")
    translator: str = arg("", "file of a translator, from --mode pretrain or an adapted one")
    down_sample: bool = arg(False, "store four times as many images at half the side (Ours-DS)")
    zca: bool = arg(True, "whiten the images")
    iterations: int = arg(3000, "T: steps of the distillation in one network")
    lr: float = arg(1e-3, "alpha: learning rate of images and labels (Adam)")
    adapt_steps: int = arg(1000, "S': adaptation steps (Ours-DS: 6,000, at 50 images 15,000)")
    lr_adapt: float = arg(1e-4, "eta': learning rate of the adaptation; bi-level: of theta (Adam)")
    pretrain_steps: int = arg(200000, "S: steps of the pre-training")
    lr_pretrain: float = arg(1e-5, "eta: learning rate of the pre-training (Adam)")
    subsets: int = arg(5000, "N: cached subsets")
    max_classes: int = arg(100, "C_max: classes of a subset, at most", 2)
    min_classes: int = arg(10, "C_min: classes of a subset, at least", 2)
    max_images: int = arg(4000, "M: real images of a subset, at most")
    max_synthetic: int = arg(1000, "I_max: synthetic images of a subset, at most")
    batch: int = arg(4, "B: subsets in a step of the pre-training")
    batch_real: int = arg(1024, "real images in a step")
    ae_steps: int = arg(2000, "auto-encoder: steps, Adam 1e-3")
    outer_steps: int = arg(1000, "bi-level: steps of Alg. 1")
    inner_steps: int = arg(16, "bi-level: T of Alg. 1")

    whitening = "zca-trace"
    free = ("runs", "epochs", "pretrain_steps", "compile")


PRESETS = {
    ("cifar10", 1): {},
    ("mnist", 1): dict(zca=False),
    ("fashionmnist", 1): dict(zca=False),
    ("glyphs", 1): dict(zca=False, iterations=200, lr=0.01, adapt_steps=60, lr_adapt=1e-3)
    | dict(batch_real=256, ae_steps=200, outer_steps=10, inner_steps=4, runs=3, epochs=300),
}


# ------------------------------------------ FRePo: regression and protocol (a copy is in frepo.py)


def krr(support, labels, ridge=1e-6):
    """Kernel ridge regression (survey Eq. 14): w = f^T (f f^T + lambda I)^-1 y.

    support f (n, d), labels y (n, C) -> w (d, C), NaN if Cholesky fails; features (m, d) @ w are
    predictions. In float64: float32's rounding errors come near lambda = ridge trace(f f^T) / n.
    """
    f = support.double()
    kernel = f @ f.T
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(kernel + ridge * kernel.diagonal().mean() * eye)
    factor = torch.where(failed > 0, torch.nan, factor)
    return (f.T @ torch.cholesky_solve(labels.double(), factor)).to(support.dtype)


def half_square(predicted, labels):
    """Half the squared error, summed over classes, mean over images (survey Eq. 17: a sum)."""
    return 0.5 * (predicted - labels).square().sum(1).mean()


def center_labels(labels, classes, scale=1.0):
    """FRePo's labels for class numbers (n,): (one-hot - 1 / C) / scale, (n, C)."""
    return (F.one_hot(labels, classes) - 1 / classes) / scale


def margin_loss(labels):
    """Reward the gap of the two largest labels: -min(first - second, 1 / C), mean over images."""
    first, second = labels.topk(2).values.T
    return -(first - second).clamp(max=1 / labels.shape[1]).mean()


def distill_rate(step, steps):
    """Factor of the rate of images and labels: half a cosine from 1 to 1/10."""
    return 0.55 + 0.45 * math.cos(math.pi * step / steps)


def frepo_augment(images, flip, *key, scale=False):
    """Apply one of FRePo's transforms; scale: DSA's scaling, too, as in their PyTorch branch."""
    names = ["color", "crop", "translate", "cutout", "rotate"] + ["flip"] * flip + ["scale"] * scale
    name = names[common.hash_int(*key) % len(names)]
    side = images.shape[-1]
    common.seed(*key)
    u = torch.rand(len(images), 3, device=images.device)
    a, b, c = (2 * u - 1).T
    if name == "color":
        # brightness +-0.25, saturation and contrast exp(+-0.25)
        return common.adjust_color(images, a / 4, (b / 4).exp(), (c / 4).exp())
    if name == "crop":
        # a window of 0.8 .. 1.25 of the side, edges repeated
        zoom = 1.025 + 0.225 * a
        return common.warp(images, zoom, 0, 0, zoom, padding="border")
    if name == "translate":
        # by up to 1/8 of the side, edges repeated
        return common.warp(images, 1, 0, 0, 1, a / 4, b / 4, padding="border")
    if name == "cutout":
        # a square of a quarter of the side, inside
        return common.cut(images, (u[:, :2] * (side - side // 4 + 1)).floor(), side // 4)
    return common.transform(images, name, u)


# Training steps by the number of images, as in FRePo's code
STEPS = {10: 1000, 100: 2000, 200: 20000, 400: 5000, 500: 5000, 1000: 10000, 2000: 40000}


@dataclass
class FrepoProtocol(common.Protocol):
    """FRePo's protocol: its ConvNet, squared error on centered labels, AdamW, its augmentation."""

    network: Callable = partial(common.ConvNet, frepo=True)
    augment: Callable = frepo_augment
    loss: Callable = half_square
    epochs: int = 0
    batch: int = 500
    lr: float = 3e-4
    optimizer: Callable = torch.optim.AdamW
    weight_decay: float = 0.0

    soft_labels = staticmethod(center_labels)

    def length(self, count):
        nearest = min(STEPS, key=lambda n: abs(math.log(count / n)))
        return self.epochs or STEPS[nearest] // math.ceil(count / self.batch)

    def rate(self, epoch, count):
        """Linear warm-up of 500 steps (at most half of all), then half a cosine to 1/100."""
        epochs = self.length(count)
        warm = min(500 / math.ceil(count / self.batch), epochs / 2)
        if epoch < warm:
            return self.lr * min(1, (epoch + 1) / warm)
        return self.lr * (0.505 + 0.495 * math.cos(math.pi * (epoch - warm) / (epochs - warm)))

    def baseline(self):
        return self


# ------------------------------------------------------------ the translator


class Translator(nn.Module):
    """G: 3 blocks of conv 3x3, batch norm, ReLU, then a conv to the image, for all sizes.

    The paper's G maps images and labels (Alg. 2, line 11); ours leaves the labels as they are.
    Batch norm takes the statistics of the set at hand. A gray image enters as three equal channels.
    """

    def __init__(self):
        super().__init__()
        layers = []
        for channels in (3, 64, 64):
            norm = nn.BatchNorm2d(64, track_running_stats=False)
            layers += [nn.Conv2d(channels, 64, 3, padding=1), norm, nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1))

    def forward(self, images):
        translated = self.layers(images.expand(-1, 3, -1, -1))
        return translated if images.shape[1] == 3 else translated.mean(1, keepdim=True)


def build_network(data):
    """FRePo's ConvNet; RGB data sets of one size get the same convolutions, on every device."""
    net = common.ConvNet(data.shape, len(data.classes), frepo=True)
    return net.requires_grad_(False).reset("theta").to(data.device)


def fit(net, images, labels, data):
    """Compute w* (d, C) of Eq. 2, with mirror images as in FRePo; Ours-DS: images enlarged."""
    images = F.interpolate(images, data.shape[1:], mode="bilinear")
    if data.flip:
        images = torch.cat([images, images.flip(3)])
        labels = labels.repeat(2, 1)
    return krr(net.features(images), labels)


def random_network_loss(net, images, labels, data, args, *key):
    """Compute half the mean of Eq. 2 in a random theta' (Alg. 1, lines 10 to 13; Alg. 2, 12-15)."""
    net.reset(*key)
    real, real_labels = data.batch(args.batch_real, *key, "real")
    predicted = common.frozen_features(net, real) @ fit(net, images, labels, data)
    return half_square(predicted, center_labels(real_labels, len(data.classes)))


def start_synthetic(data, args, *key):
    """Start from random real images and centered labels (Alg. 1, line 3; Alg. 2, line 4)."""
    images, numbers = data.sample(args.ipc * (4 if args.down_sample else 1), *key)
    if args.down_sample:
        images = F.avg_pool2d(images, 2)
    classes = len(data.classes)
    labels = center_labels(numbers, classes, math.sqrt(classes / 10))
    return images.requires_grad_(), labels.requires_grad_()


def quadratic_form(theta, data):
    """Coefficients of Eq. 2, a quadratic in w: f^T f / m (d, d), f^T y / m (d, C), ||y||^2 / m."""
    # Alg. 2, line 5: features of all real images (m, d), which no step has to read again
    f = common.frozen_features(theta, data.train)
    y = center_labels(data.train_labels, len(data.classes))
    return f.T @ f / len(f), f.T @ y / len(f), y.square().sum() / len(f)


def distill_in_one_network(theta, images, labels, data, args, path):
    """Distill `data` in theta (Alg. 2, lines 5 to 10) -> images, labels, common.Run."""
    run = common.Run(path, data, args)
    if args.mode != "baseline":
        gram, cross, constant = quadratic_form(theta, data)
    optimizer = torch.optim.Adam([images, labels], lr=args.lr)
    run.restore({"images": images, "labels": labels, "optimizer": optimizer})
    for t in common.progress(range(run.start, args.iterations), "iterations"):
        if args.mode == "baseline":
            # a new network and a real batch in each step
            loss = random_network_loss(theta, images, labels, data, args, args.seed, t)
        else:
            # line 7, then || f w - y ||^2 / (2 m), expanded with quadratic_form's coefficients
            w = fit(theta, images, labels, data)
            loss = 0.5 * ((w * (gram @ w - 2 * cross)).sum() + constant)
        optimizer.param_groups[0]["lr"] = args.lr * distill_rate(t, args.iterations)
        optimizer.zero_grad()
        (loss + margin_loss(labels)).backward()
        # lines 8, 9
        optimizer.step()
        run.step(t, loss)
    return images.detach(), labels.detach(), run


def cached_subset(data, n, args):
    """Choose, distill and cache subset n of `data` (Sec. 4.1) -> Dataset, images, labels."""
    common.seed(args.seed, "subset", n)
    most = min(args.max_classes, len(data.classes))
    count = torch.randint(min(args.min_classes, most), most + 1, ()).item()
    # Alg. 2, line 3
    chosen = torch.randperm(len(data.classes))[:count]
    k = max(1, min(args.max_images // count, data.smallest_class))
    ipc = torch.randint(1, max(1, min(args.max_synthetic // count, k)) + 1, ()).item()
    rows = data.indices_by_class[chosen.to(data.device)]
    order = torch.rand(rows.shape, device=data.device).masked_fill(rows < 0, -1)
    index = rows.gather(1, order.topk(k).indices).flatten()
    classes = [data.classes[c] for c in chosen]
    labels = torch.arange(count, device=data.device).repeat_interleave(k)
    subset = replace(data, classes=classes, train=data.train[index], train_labels=labels)

    key = (data.fingerprint, data.flip, index.tolist(), ipc, args.iterations, args.lr, args.seed)
    path = pathlib.Path(args.data_dir) / "subsets" / data.name / f"{common.hash_int(*key):016x}.pt"
    if not path.exists():
        # only what the subset depends on: any run may continue it
        args = Args(ipc=ipc, iterations=args.iterations, lr=args.lr, seed=args.seed)
        start = start_synthetic(subset, args, args.seed, "start")
        # DSA, "to mimic the cases of larger datasets" (Sec. 4.1): one transformed copy per image
        parts = enumerate(subset.train.split(128))
        copies = [common.dsa(x, data.flip, args.seed, n, i) for i, x in parts]
        train = torch.cat([subset.train, *copies])
        larger = replace(subset, train=train, train_labels=labels.repeat(2))
        theta = build_network(data)
        images, labels, run = distill_in_one_network(theta, *start, larger, args, path)
        common.save([images.cpu(), labels.cpu()], path)
        for extra in (run.path, run.path.with_suffix(".csv")):
            extra.unlink(missing_ok=True)

    images, labels = common.load(path, "a cached subset")
    return subset, images.to(data.device), labels.to(data.device)


def adaptation_loss(translator, net, images, labels, data, args, i):
    """Compute the loss of Alg. 2, lines 11 to 15, on the target set."""
    return random_network_loss(net, translator(images), labels, data, args, args.seed, "adapt", i)


def pretraining_loss(translator, net, data, args, i):
    """Compute the loss of Alg. 2, lines 11 to 15, on a cached subset, in its own theta'."""
    key = (args.seed, "pretrain", i)
    subset, images, labels = cached_subset(data, common.hash_int(*key) % args.subsets, args)
    return random_network_loss(net, translator(images), labels, subset, args, *key)


def reconstruction_loss(translator, data, args, i):
    """Compute the error of real images translated to themselves (Table 3, w AE)."""
    images, _ = data.batch(128, args.seed, "auto-encoder", i)
    return F.mse_loss(translator(images), images)


def bilevel_loss(theta, net, data, args, i, alpha=1e-3):
    """Compute Alg. 1's loss (lines 3 to 13): T steps in theta, then Eq. 2 in a random network.

    Memory grows with T. alpha: Table 1's. Lines 4, 11: all real images, here one batch for both.
    """
    key = (args.seed, "space", i)
    # lines 3, 4
    images, labels = start_synthetic(data, args, *key, "start")
    real, real_labels = data.batch(args.batch_real, *key, "real")
    target = theta.features(real)
    target_labels = center_labels(real_labels, len(data.classes))
    # Alg. 1's loss is a sum over m images, ours half the mean: its gradient is 2 m times ours
    rate = 2 * len(real) * alpha
    for _ in range(args.inner_steps):
        # lines 6 to 8
        loss = half_square(target @ fit(theta, images, labels, data), target_labels)
        grad_images, grad_labels = torch.autograd.grad(loss, (images, labels), create_graph=True)
        images = images - rate * grad_images
        labels = labels - rate * grad_labels
    return random_network_loss(net, images, labels, data, args, *key)


def train(module, loss_of, steps, lr, data, args, path, batch=1, inputs=None):
    """Train `module` by Adam on means of `batch` losses loss_of(i), save it -> seconds."""
    module.requires_grad_(True)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    run = common.Run(path, data, args, steps, inputs)
    run.restore({"module": module, "optimizer": optimizer})
    for step in common.progress(range(run.start, steps), path.stem):
        optimizer.zero_grad()
        total = 0
        for b in range(batch):
            loss = loss_of(step * batch + b) / batch
            loss.backward()
            total = total + loss.detach()
        # Alg. 1, line 13; Alg. 2, line 15
        optimizer.step()
        run.step(step, total)
    module.requires_grad_(False)
    content = {"preprocess": data.preprocess.kind, "dataset": data.name}
    content["weights" if isinstance(module, Translator) else "theta"] = module.state_dict()
    common.save(content, path)
    print(f"wrote {path}")
    return run.record["seconds"]


def build_translator(data, args):
    """Build a new translator or load --translator; the identity for modes without one."""
    loads = args.mode in ("adapted", "no-adaptation")
    if bool(args.translator) != loads:
        text = "--mode adapted and no-adaptation, no other, need --translator: see --mode pretrain"
        raise common.UserError(text)
    if args.eval_every:
        raise common.UserError("this method scores at the end only: leave out --eval-every")
    if args.mode not in TRANSLATED:
        return nn.Identity()
    common.seed(args.seed, "translator")
    translator = Translator().to(data.device).requires_grad_(False)
    if loads:
        stored = common.load(args.translator, "a translator", "weights", "preprocess")
        if stored["preprocess"] != data.preprocess.kind:
            raise common.UserError(f"{args.translator} needs {stored['preprocess']}: see --zca")
        translator.load_state_dict(stored["weights"])
    return translator


def pretrain(data, args):
    """Pre-train a translator on the many classes of `data` (Alg. 2) -> args.out/translator.pt."""
    translator = build_translator(data, args)
    for n in common.progress(range(args.subsets), "subsets"):
        cached_subset(data, n, args)
    loss_of = partial(pretraining_loss, translator, build_network(data), data, args)
    path = pathlib.Path(args.out) / "translator.pt"
    train(translator, loss_of, args.pretrain_steps, args.lr_pretrain, data, args, path, args.batch)


def distill(data, args, path):
    """Distill and translate -> content of `path`; <stem>_adapted.pt: G for other budgets."""
    theta = build_network(data)
    # theta', drawn anew in each use
    net = build_network(data)
    translator = build_translator(data, args)
    seconds = 0
    if args.mode == "autoencoder":
        loss_of = partial(reconstruction_loss, translator, data, args)
        file = path.with_name(f"{path.stem}_encoder.pt")
        seconds += train(translator, loss_of, args.ae_steps, 1e-3, data, args, file)
    if args.mode == "bilevel":
        loss_of = partial(bilevel_loss, theta, net, data, args)
        file = path.with_name(f"{path.stem}_space.pt")
        seconds += train(theta, loss_of, args.outer_steps, args.lr_adapt, data, args, file)

    if args.mode not in ADAPTED:
        # 4k steps in all modes (Sec. 4.3)
        args = replace(args, iterations=args.iterations + args.adapt_steps)
    start = start_synthetic(data, args, args.seed, "start")
    images, labels, run = distill_in_one_network(theta, *start, data, args, path)

    if args.mode in ADAPTED:
        loss_of = partial(adaptation_loss, translator, net, images, labels, data, args)
        file = path.with_name(f"{path.stem}_adapted.pt")
        inputs = nn.utils.parameters_to_vector([images, labels, *translator.parameters()])
        rest = (args.adapt_steps, args.lr_adapt, data, args, file)
        seconds += train(translator, loss_of, *rest, inputs=inputs)
    images = translator(images)
    run.record["seconds"] += seconds
    return common.save_distilled(path, data, args, {"images": images, "labels": labels}, run)


def decode(distilled, device="cpu"):
    """The images of a distilled file (1, n, c, h, w) and their soft labels (n, C)."""
    images = F.interpolate(distilled["images"], distilled["shape"][1:], mode="bilinear")
    return images[None].to(device), distilled["labels"].to(device)


def protocol(args):
    """FRePo's protocol, with the PyTorch branch's weight decay and scaling."""
    return FrepoProtocol(augment=partial(frepo_augment, scale=True), weight_decay=5e-4)


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path(args, f"_{args.mode}")
    data = common.load_dataset(args, common.setup(args))
    if args.mode == "pretrain":
        return pretrain(data, args)
    distilled = distill(data, args, path)
    images, labels = decode(distilled, data.device)
    common.save_grid(path.with_suffix(".png"), data, images[0], columns=10)
    common.score(data, distilled, images, labels, protocol(args), args)


if __name__ == "__main__":
    common.cli(main)
