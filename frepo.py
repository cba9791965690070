"""FRePo: dataset distillation using neural feature regression (Zhou et al., NeurIPS 2022).

Training on the synthetic set is cut down to the last layer, which kernel ridge regression solves in
closed form. With features f of a network, synthetic images X_s and learned labels y_s, and a real
batch X_t with labels y_t,

    L = 1/2 || y_t - K_ts (K_ss + lambda I)^-1 y_s ||^2,  K_ab = f(X_a) f(X_b)^T    (survey Eq. 17)

The features come from a pool of networks that train on the current synthetic set. Each iteration
draws one of them, updates X_s and y_s, then trains it for one step (Eq. 18); after 100 steps it is
replaced by a newly initialized one. So the pool covers all stages of training. The distilled
images and soft labels train a fresh network of this kind by squared error.

    python frepo.py                                # glyphs, drawn here: minutes on a CPU
    python frepo.py --dataset cifar10 --ipc 1      # the paper: 500,000 iterations, 46.8 +- 0.7 %

Measured on CIFAR-10, --ipc 1: 41.9 +- 0.3 % with --iterations 1000 --lr 0.01 --batch-real 512.

Beyond Eq. 17, as in the authors' code: lambda is in units of trace(K_ss) / n, mirror images join
X_s, and a hinge on the margin of y_s is added to L.

Unlike the authors' JAX code: torch's initialization (theirs: LeCun's). Unlike Eq. 17: a mean over
real images in L. As in their code: batch norm in the pool's networks, no norm in the score's.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import common
from common import arg


@dataclass
class Args(common.Args):
    ipc: int = arg(1, "synthetic images per class")
    iterations: int = arg(500000, "iterations of the distillation")
    zca: bool = arg(True, "whiten the images")
    lr: float = arg(3e-4, "learning rate of images and labels (LAMB), a cosine to a tenth")
    batch_real: int = arg(1024, "real images in an iteration, |X_t|")
    ridge: float = arg(1e-6, "lambda, in units of trace(K_ss) / n")
    pool: int = arg(10, "networks in the pool")
    max_age: int = arg(100, "steps after which a network is replaced")
    lr_pool: float = arg(3e-4, "learning rate of the networks (Adam)")
    batch_pool: int = arg(500, "synthetic images in a step of a network, at most")
    mirror: bool = arg(True, "use mirror images of the synthetic images as well")
    weight_margin: float = arg(1.0, "weight of the hinge on the labels' margin")

    whitening = "zca-trace"


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
    """The scoring network, with batch norm after each pooling that a convolution follows."""
    net = common.ConvNet(shape, classes, norm=False, double=True)
    blocks = list(net.blocks[:1])
    for layer in net.blocks[1:]:
        if isinstance(layer, nn.Conv2d):
            # running statistics are nine tenths those of the newest batch
            blocks.append(nn.BatchNorm2d(layer.in_channels, momentum=0.9))
        blocks.append(layer)
    net.blocks = nn.Sequential(*blocks)
    return net


def distill(data, args, path):
    """Distill `data` into args.ipc images and soft labels per class -> content of file `path`."""
    classes = len(data.classes)
    # synthetic images start as real ones
    images, numbers = data.sample(args.ipc, args.seed, "start")
    labels = common.center_labels(numbers, classes, math.sqrt(classes / 10))
    images.requires_grad_()
    labels.requires_grad_()
    optimizer = Lamb([images, labels], args.lr)
    networks = [build_network(data.shape, classes) for _ in range(args.pool)]
    pool = nn.ModuleList(networks).to(data.device)
    pool_optimizer = torch.optim.Adam(pool.parameters(), lr=args.lr_pool)
    for k, net in enumerate(pool):
        net.reset(args.seed, "pool", k)
    # The first networks have shorter lives, so that they are not all replaced at once.
    ages = torch.arange(args.pool) * args.max_age // args.pool

    state = {"images": images, "labels": labels, "optimizer": optimizer}
    state |= {"pool": pool, "pool_optimizer": pool_optimizer, "ages": ages}
    # views: they follow the in-place updates
    distilled_set = (images.detach()[None], labels.detach(), protocol(None, len(images)))
    evaluate = partial(common.train_and_test, data, *distilled_set, args)
    run = common.Run(path, data, args, state, evaluate, extend=False)
    for it in range(run.start, args.iterations):
        key = (args.seed, it)
        k = common.hash_int(*key, "network") % args.pool
        net = pool[k].requires_grad_(False).eval()

        # Eq. 17: ridge regression from the synthetic features to the real ones, both with the
        # running statistics of the synthetic set
        real, real_labels = data.batch(args.batch_real, *key, "real")
        target = common.frozen_features(net, real)
        support, support_labels = images, labels
        if args.mirror and data.flip:
            support, support_labels = torch.cat([images, images.flip(3)]), labels.repeat(2, 1)
        truth = common.center_labels(real_labels, classes)
        predicted = target @ common.krr(net.features(support), support_labels, args.ridge)
        loss = common.half_square(predicted, truth)
        optimizer.param_groups[0]["lr"] = args.lr * common.cosine_decay(it, args.iterations)
        optimizer.zero_grad()
        (loss + args.weight_margin * common.margin_loss(labels)).backward()
        optimizer.step()

        # Eq. 18: a step of the network on the synthetic set; old networks are replaced
        net.requires_grad_(True).train()
        index = common.student_indices(len(images), args.batch_pool, 0, *key, device=data.device)
        pool_optimizer.zero_grad()  # the other networks keep None as gradient and are skipped
        features = net.blocks(images.detach()[index]).flatten(1)  # in one batch, for its statistics
        common.half_square(net.classifier(features), labels.detach()[index]).backward()
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
    """The images of a distilled file (1, n, c, h, w) and their soft labels (n, C)."""
    return distilled["images"].to(device)[None], distilled["labels"].to(device)


def protocol(settings, count):
    """FRePo's training protocol for `count` images."""
    return common.frepo_protocol(count)


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path(args)
    data = common.load_dataset(args)
    distilled = distill(data, args, path)
    images, labels = decode(distilled, data.device)
    common.save_grid(path.with_suffix(".png"), data, images[0], columns=10)
    common.score(data, distilled, images, labels, protocol(None, len(labels)), args)


if __name__ == "__main__":
    common.run(main)
