"""FRePo: dataset distillation using neural feature regression (Zhou et al., NeurIPS 2022).

Only the last, linear layer is fitted to the synthetic set, in closed form by kernel ridge
regression. With features f of a network, synthetic images X_s and learned labels y_s, and a real
batch X_t with labels y_t,

    L = 1/2 || y_t - K_ts (K_ss + lambda I)^-1 y_s ||^2,  K_ab = f(X_a) f(X_b)^T    (survey Eq. 17)

The features come from a pool of networks that train on the current synthetic set. Each iteration
draws one of them, updates X_s and y_s, then trains it for one step (Eq. 18); after 100 steps it is
replaced by a newly initialized one, so the pool has networks of all ages. Evaluation trains a fresh
ConvNet on the distilled images and soft labels by squared error.

    python frepo.py                                # glyphs, drawn here: minutes on a CPU
    python frepo.py --dataset cifar10 --ipc 1      # the paper: 500,000 iterations, 46.8 +- 0.7 %

Measured on CIFAR-10, --ipc 1: 41.9 +- 0.3 % with --iterations 1000 --lr 0.01 --batch-real 512.

As in the authors' JAX code, beyond Eq. 17 and 18: lambda is in units of trace(K_ss) / n; X_s
includes its mirror images; L has a term on the margin of y_s; LAMB updates X_s and y_s, Adam the
networks; these have batch norm, the evaluated ones no norm. Unlike the code: torch's initialization
(theirs: LeCun's). Unlike Eq. 17: L is a mean over real images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import common
from common import arg


@dataclass
class Args(common.Args):
    ipc: int = arg(1, "synthetic images per class")
    iterations: int = arg(500000, "iterations of the distillation")
    zca: bool = arg(True, "whiten the images")
    lr: float = arg(3e-4, "initial rate of images and labels (LAMB), cosine to a tenth")
    batch_real: int = arg(1024, "real images in an iteration, |X_t|")
    ridge: float = arg(1e-6, "lambda, in units of trace(K_ss) / n")
    pool: int = arg(10, "networks in the pool")
    max_age: int = arg(100, "steps after which a network is replaced")
    lr_pool: float = arg(3e-4, "learning rate of the networks (Adam)")
    batch_pool: int = arg(500, "synthetic images in a network's step, at most")
    mirror: bool = arg(True, "use mirror images of the synthetic images as well")
    weight_margin: float = arg(1.0, "weight of margin_loss")

    whitening = "zca-trace"
    # not the iterations: the rate is a cosine over them
    free = ("runs", "epochs", "eval_every", "compile")


PRESETS = {
    ("cifar10", 1): dict(),
    ("cifar10", 100): dict(batch_pool=1000),
    ("cifar100", 1): dict(),
    ("cifar100", 10): dict(mirror=False, batch_pool=1000),
    ("tinyimagenet", 1): dict(),
    ("tinyimagenet", 10): dict(mirror=False, batch_pool=1000),
    ("mnist", 1): dict(zca=False),
    ("fashionmnist", 1): dict(zca=False),
    ("glyphs", 1): dict(
        zca=False, iterations=150, lr=0.01, batch_real=256, pool=4, max_age=30, runs=3, epochs=300
    ),
}


# --------------------------------- regression and protocol (a copy is in translator_fewshot.py)


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


# ------------------------------------------------------------ pool and distillation


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020), no weight decay: Adam's update, scaled to norm lr * ||tensor||."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                mean = state["mean"].lerp_(p.grad, 1 - beta1) / (1 - beta1 ** state["step"])
                square = state["square"].lerp_(p.grad**2, 1 - beta2) / (1 - beta2 ** state["step"])
                update = mean / (square.sqrt() + group["eps"])
                trust = p.norm() / update.norm()
                trust = torch.where(trust.isfinite() & (trust > 0), trust, 1.0)
                p -= group["lr"] * trust * update


def build_network(shape, classes):
    """The scoring network, with batch norm before each convolution except the first."""
    net = common.ConvNet(shape, classes, frepo=True)
    for i in reversed(range(1, len(net.blocks))):
        if isinstance(net.blocks[i], nn.Conv2d):
            # 0.9 is the weight of the newest batch in the running statistics
            net.blocks.insert(i, nn.BatchNorm2d(net.blocks[i].in_channels, momentum=0.9))
    return net


def distill(data, args, path):
    """Distill `data` into args.ipc images and soft labels per class -> content of file `path`."""
    run = common.Run(path, data, args)
    classes = len(data.classes)
    # synthetic images start as real ones
    images, numbers = data.sample(args.ipc, args.seed, "start")
    labels = center_labels(numbers, classes, math.sqrt(classes / 10))
    optimizer = Lamb([images.requires_grad_(), labels.requires_grad_()], args.lr)
    networks = [build_network(data.shape, classes) for _ in range(args.pool)]
    pool = nn.ModuleList(networks).to(data.device)
    pool_optimizer = torch.optim.Adam(pool.parameters(), lr=args.lr_pool)
    for k, net in enumerate(pool):
        net.reset(args.seed, "pool", k)
    # The first networks have shorter lives, so that they are not all replaced at once.
    ages = torch.arange(args.pool) * args.max_age // args.pool

    state = {"images": images, "labels": labels, "optimizer": optimizer}
    state |= {"pool": pool, "pool_optimizer": pool_optimizer, "ages": ages}
    # detached views share memory: an evaluation uses the current images and labels
    distilled_set = (images.detach()[None], labels.detach(), protocol(args))
    run.restore(state, partial(common.train_and_test, data, *distilled_set, args))
    for it in common.progress(range(run.start, args.iterations), "iterations"):
        key = (args.seed, it)
        k = common.hash_int(*key, "network") % args.pool
        net = pool[k].requires_grad_(False).eval()

        # Eq. 17: ridge regression on the synthetic features predicts the real labels; batch norm
        # uses running statistics, which only the steps on the synthetic set below update
        real, real_labels = data.batch(args.batch_real, *key, "real")
        real_features = common.frozen_features(net, real)
        copies = 2 if args.mirror and data.flip else 1
        support = torch.cat([images, images.flip(3)][:copies])
        support_labels = labels.repeat(copies, 1)
        predicted = real_features @ krr(net.features(support), support_labels, args.ridge)
        loss = half_square(predicted, center_labels(real_labels, classes))
        optimizer.param_groups[0]["lr"] = args.lr * distill_rate(it, args.iterations)
        optimizer.zero_grad()
        (loss + args.weight_margin * margin_loss(labels)).backward()
        optimizer.step()

        # Eq. 18: a step of the network on the synthetic set; old networks are replaced
        net.requires_grad_(True).train()
        index = slice(None)
        if args.batch_pool < len(images):
            common.seed(*key, "pool batch")
            index = torch.randperm(len(images), device=data.device)[: args.batch_pool]
        # the other networks have no gradients and are skipped
        pool_optimizer.zero_grad()
        # not net.features, which splits the batch: batch norm needs all of it
        features = net.blocks(images.detach()[index]).flatten(1)
        half_square(net.classifier(features), labels.detach()[index]).backward()
        pool_optimizer.step()
        ages[k] += 1
        if ages[k] >= args.max_age:
            net.reset(*key, "replace")
            for p in net.parameters():
                del pool_optimizer.state[p]
            ages[k] = 0
        run.step(it, loss)

    return common.save_distilled(path, data, args, {"images": images, "labels": labels}, run)


def decode(distilled, device="cpu"):
    """Images (1 variant, n, c, h, w) and soft labels (n, C) of a distilled file."""
    return distilled["images"].to(device)[None], distilled["labels"].to(device)


def protocol(args):
    """FRePo's training protocol."""
    return FrepoProtocol()


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path(args)
    data = common.load_dataset(args, common.setup(args))
    distilled = distill(data, args, path)
    images, labels = decode(distilled, data.device)
    common.save_grid(path.with_suffix(".png"), data, images[0], columns=10)
    common.score(data, distilled, images, labels, protocol(args), args)


if __name__ == "__main__":
    common.cli(main)
