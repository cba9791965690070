"""Few-shot dataset distillation via translative pre-training (Liu & Wang, ICCV 2023).

Distilling in thousands of networks is slow; in one it is fast, but the result fits that network
only. So: distill in one random network theta, then translate the images so that they serve any
network. With features f(X), synthetic images X_S and labels Y_S are judged by neural feature
regression,

    || f(X_T) w* - Y_T ||^2,   w* = f(X_S)^T (f(X_S) f(X_S)^T)^-1 Y_S                      (Eq. 2)

The translator G, a small auto-encoder, learns on subsets of a large data set, distilled in theta
and cached, to make this small in random networks theta' (Alg. 2); then it adapts to the target set
in S' steps. The result trains a fresh network like FRePo's. --mode is a column of Table 3.

    python translator_fewshot.py --mode autoencoder                        # glyphs: minutes
    python translator_fewshot.py --mode pretrain --dataset tiny32 --out t  # writes t/translator.pt
    python translator_fewshot.py --dataset cifar10 --translator t/translator.pt    # paper: 44.0 %

No code of the authors is known. As the paper says, what it does not print follows FRePo's PyTorch
branch: no norm, torch's initialization, ridge 1e-6, mirror images, the hinge on labels, AdamW in
scoring, Adam with a cosine to 10 % on images and labels. Ours: constant rates for the translator.
Losses are half the mean over real images; the paper's are sums.
"""

import math
import pathlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common

TRANSLATED = ("adapted", "no-adaptation", "scratch", "autoencoder")
MODES = TRANSLATED + ("one-net", "bilevel", "baseline", "pretrain")


@dataclass
class Args(common.Args):
    # synthetic images a class
    ipc: int = 1
    # a column of Table 3, or pretrain: write a translator
    mode: Literal[MODES] = "adapted"
    # file of a translator, from --mode pretrain or an adapted one
    translator: str = ""
    # store four times as many images at half the side (Ours-DS); see --adapt-steps
    down_sample: bool = False
    # whiten the images
    zca: bool = True
    # T: steps of the distillation in one network
    iterations: int = 3000
    # alpha: learning rate of images and labels (Adam)
    lr: float = 1e-3
    # S': steps of the adaptation; 6 to 15 times as many with --down-sample (Sec. 4.2)
    adapt_steps: int = 1000
    # eta': its learning rate (Adam)
    lr_adapt: float = 1e-4
    # S: steps of the pre-training
    pretrain_steps: int = 200000
    # eta: its learning rate (Adam)
    lr_pretrain: float = 1e-5
    # N: cached subsets
    subsets: int = 5000
    # C_max: classes of a subset, at most
    max_classes: int = 100
    # C_min: classes of a subset, at least
    min_classes: int = 10
    # M: real images of a subset, at most
    max_images: int = 4000
    # I_max: synthetic images of a subset, at most
    max_synthetic: int = 1000
    # B: subsets in a step of the pre-training
    batch: int = 4
    # real images in a step
    batch_real: int = 1024
    # ridge, in units of trace(K_ss) / n
    ridge: float = 1e-6
    # use mirror images of the synthetic images as well
    mirror: bool = True
    # weight of the hinge on the labels' margin
    weight_margin: float = 1.0
    # auto-encoder: steps, Adam 1e-3
    ae_steps: int = 2000
    # bi-level: steps of Alg. 1
    outer_steps: int = 1000
    # bi-level: T of Alg. 1
    inner_steps: int = 16

    whitening = "zca-trace"


PRESETS = {
    ("cifar10", 1): {},
    ("mnist", 1): dict(zca=False),
    ("glyphs", 1): dict(
        zca=False, iterations=200, lr=0.01, adapt_steps=60, batch_real=256, ae_steps=200
    ),
}
PRESETS["glyphs", 1] |= dict(outer_steps=10, inner_steps=4, lr_adapt=1e-3, runs=3, epochs=300)


class Translator(nn.Module):
    """G: 3 blocks of conv 3x3, batch norm, ReLU, then a conv to the image; width 64 is our choice.

    Fully convolutional: the same weights serve all sizes. Batch norm takes the statistics of the
    set at hand. Labels pass unchanged. A gray image enters as three equal channels.
    """

    def __init__(self, width=64):
        super().__init__()
        layers, channels = [], 3
        for _ in range(3):
            norm = nn.BatchNorm2d(width, track_running_stats=False)
            layers += [nn.Conv2d(channels, width, 3, padding=1), norm, nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, images):
        translated = self.layers(images.expand(-1, 3, -1, -1))
        return translated if images.shape[1] == 3 else translated.mean(1, keepdim=True)


def build_network(data):
    """FRePo's ConvNet with the parameters theta, arbitrary but fixed, the same on all devices."""
    net = common.ConvNet(data.shape, len(data.classes), norm=False, double=True)
    return net.requires_grad_(False).reset("theta").to(data.device)


def enlarge(images, side):
    """Enlarge images stored at half the side (Ours-DS)."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear")


def nfr(net, images, labels, target, target_labels, data, args):
    """Eq. 2 for synthetic images and the features `target` (m, d) of real ones."""
    images = enlarge(images, data.shape[-1])
    if args.mirror and data.flip:
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2, 1)
    return common.nfr_loss(net.features(images), labels, target, target_labels, args.ridge)


def start_synthetic(data, per_class, args, *key):
    """Alg. 2, line 4: random real images and centered labels."""
    images, labels = data.sample(per_class * (4 if args.down_sample else 1), *key)
    images = F.avg_pool2d(images, 2) if args.down_sample else images
    classes = len(data.classes)
    return images, common.center_labels(labels, classes, math.sqrt(classes / 10))


# ------------------------------------------------------------ distillation in one network


def distill_in_one_network(net, images, labels, target, target_labels, data, args, path=None):
    """Alg. 2, lines 5 to 10 -> images, labels, common.Run or None.

    target, target_labels: features (m, d) of the real set, computed once, and its labels (m, C);
    target None is the baseline: a new network and a real batch in each step. path: of the
    distilled file, for checkpoints; None: without.
    """
    images, labels = images.clone().requires_grad_(), labels.clone().requires_grad_()
    optimizer = torch.optim.Adam([images, labels], lr=args.lr)
    decay = partial(common.cosine, steps=args.iterations)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    state = {"images": images, "labels": labels, "optimizer": optimizer, "schedule": schedule}
    run = common.Run(path, data, args, state) if path else None
    for t in range(run.start if run else 0, args.iterations):
        x, y = target, target_labels
        if target is None:
            net.reset(args.seed, t)
            real, y = data.batch(args.batch_real, args.seed, t, "real")
            x, y = common.features(net, real), common.center_labels(y, len(data.classes))
        loss = nfr(net, images, labels, x, y, data, args)  # line 7
        optimizer.zero_grad()
        (loss + args.weight_margin * common.margin_loss(labels)).backward()
        optimizer.step()  # lines 8, 9
        schedule.step()
        if run:
            run.step(t, loss)
    return images.detach(), labels.detach(), run


def cached_subset(data, net, n, args):
    """Subset n of a large data set, distilled in theta (Sec. 4.1), cached in a file.

    -> {"images", "labels": distilled, "real" (classes, k): indices of its real images}. The count
    of synthetic images is uniform up to I_max, a choice of ours.
    """
    names = ("min_classes", "max_classes", "max_images", "max_synthetic", "iterations", "lr")
    names += ("seed", "ridge", "mirror", "weight_margin")
    settings = [getattr(args, name) for name in names]
    tag = f"{common.hash_int(data.preprocess.fingerprint, settings):016x}"
    path = pathlib.Path(args.data_dir) / "subsets" / f"{data.name}_{tag}" / f"{n:05d}.pt"
    if path.exists():
        return common.load(path, "a cached subset")
    common.seed(args.seed, "subset", n)
    low, high = (min(size, len(data.classes)) for size in (args.min_classes, args.max_classes))
    count = torch.randint(min(low, high), high + 1, ()).item()
    chosen = torch.randperm(len(data.classes))[:count].to(data.device)
    k = max(1, min(args.max_images // count, data.smallest_class))
    ipc = torch.randint(1, max(1, min(args.max_synthetic // count, k)) + 1, ()).item()
    index = data.draw(data.indices_by_class[chosen], k)
    real, numbers = data.train[index.flatten()], torch.arange(count, device=data.device)
    # DSA "to mimic larger data sets": each image once more, transformed
    parts = [common.dsa(x, data.flip, args.seed, n, i) for i, x in enumerate(real.split(128))]
    target = common.features(net, torch.cat([real, *parts]))
    target_labels = common.center_labels(numbers.repeat_interleave(k).repeat(2), count)
    labels = common.center_labels(numbers.repeat_interleave(ipc), count, math.sqrt(count / 10))
    images = data.train[index[:, :ipc].flatten()]
    pair = distill_in_one_network(net, images, labels, target, target_labels, data, args)[:2]
    subset = {"images": pair[0], "labels": pair[1], "real": index}
    subset = {name: tensor.cpu() for name, tensor in subset.items()}
    common.save(subset, path)
    return subset


# ------------------------------------------------------------ training a translator


def train_translator(translator, data, args, path, steps, lr, loss_of, batch=1):
    """Adam on the mean of loss_of(step, b) over b < batch, then write the translator -> seconds.

    Pre-training, adaptation and auto-encoder differ in the loss alone.
    """
    optimizer = torch.optim.Adam(translator.parameters(), lr=lr)
    state = {"translator": translator, "optimizer": optimizer}
    run = common.Run(path, data, replace(args, iterations=steps), state)
    for step in range(run.start, steps):
        optimizer.zero_grad()
        total = 0
        for b in range(batch):
            loss = loss_of(step, b) / batch
            loss.backward()
            total = total + loss.detach()
        optimizer.step()  # line 15
        run.step(step, total)
    content = {"weights": translator.state_dict(), "preprocess": data.preprocess.kind}
    common.save(content | {"dataset": data.name}, path)
    print(f"wrote {path}")
    return run.seconds


def translation_loss(translator, net, images, labels, real, real_labels, data, args, *key):
    """Alg. 2, lines 11 to 14: Eq. 2 for translated images in a new random network."""
    net.reset(*key)  # line 12
    truth = common.center_labels(real_labels, labels.shape[1])
    return nfr(net, translator(images), labels, common.features(net, real), truth, data, args)


def adaptation_loss(translator, net, images, labels, data, args, step, b=0):
    """Alg. 2, lines 11 to 14, on a batch of the target set."""
    key = (args.seed, "adapt", step)
    real = data.batch(args.batch_real, *key, "real")
    return translation_loss(translator, net, images, labels, *real, data, args, *key)


def pretraining_loss(translator, net, theta, data, args, step, b=0):
    """Alg. 2, lines 11 to 14, on one of the B cached subsets of a step, in a theta' of its own."""
    key = (args.seed, "pretrain", step, b)
    subset = cached_subset(data, theta, common.hash_int(*key) % args.subsets, args)
    subset = {name: tensor.to(data.device) for name, tensor in subset.items()}
    common.seed(*key, "real")
    index = torch.randint(subset["real"].numel(), (args.batch_real,), device=data.device)
    real = data.train[subset["real"].flatten()[index]]
    numbers = index // subset["real"].shape[1]
    pair = subset["images"], subset["labels"]
    return translation_loss(translator, net, *pair, real, numbers, data, args, *key)


def reconstruction_loss(translator, data, args, step, b=0):
    """The auto-encoder of Table 3: real images are translated to themselves. Set, loss, steps, rate
    and batch are ours."""
    images, _ = data.batch(128, args.seed, "auto-encoder", step)
    return F.mse_loss(translator(images), images)


# ------------------------------------------------------------ the bi-level ablation


def learn_space(net, data, args, path):
    """Alg. 1: turn `net` into a distillation space, in place -> seconds.

    Steps, rate and batches of real images (the paper: all) are ours.
    """
    judge = build_network(data)
    optimizer = torch.optim.Adam(net.blocks.parameters(), lr=args.lr_adapt)
    state = {"net": net, "optimizer": optimizer}
    run = common.Run(path, data, replace(args, iterations=args.outer_steps), state)
    for i in range(run.start, args.outer_steps):
        key = (args.seed, "space", i)
        images, labels = start_synthetic(data, args.ipc, args, *key, "start")  # line 3
        real = data.batch(args.batch_real, *key, "real")
        judge.reset(*key, "judge")  # line 10
        optimizer.zero_grad()
        loss = bilevel_gradient(net, judge, images, labels, *real, data, args)
        optimizer.step()  # line 13
        run.step(i, loss)
    return run.seconds


def bilevel_gradient(net, judge, images, labels, real, real_labels, data, args, lr=2.0):
    """Alg. 1, lines 4 to 13 -> loss; its gradient is added to the parameters of `net`.

    T steps of gradient descent on images and labels in `net`, judged in `judge`; lr 2 on half the
    mean over 1,024 images is the paper's 1e-3 on the sum of squares. As in common.match_trajectory
    the steps are gone through backwards one at a time, so memory does not grow with T.
    """
    net.requires_grad_(True)
    truth = common.center_labels(real_labels, len(data.classes))
    real_features = net.features(real)  # line 4
    target = real_features.detach().requires_grad_()

    def gradient(x, y, create_graph):
        loss = nfr(net, x, y, target, truth, data, args)
        return torch.autograd.grad(loss, (x, y), create_graph=create_graph)

    tape = []
    for _ in range(args.inner_steps):  # lines 5 to 8
        leaves = images.detach().requires_grad_(), labels.detach().requires_grad_()
        tape.append(leaves)
        dx, dy = gradient(*leaves, create_graph=False)
        images, labels = leaves[0].detach() - lr * dx, leaves[1].detach() - lr * dy
    images.requires_grad_()
    labels.requires_grad_()
    judged = common.features(judge, real)  # line 11
    loss = nfr(judge, images, labels, judged, truth, data, args)  # line 12
    adjoints = torch.autograd.grad(loss, (images, labels))
    for x, y in reversed(tape):
        dx, dy = gradient(x, y, create_graph=True)
        (-lr * ((dx * adjoints[0]).sum() + (dy * adjoints[1]).sum())).backward()
        adjoints = adjoints[0] + x.grad, adjoints[1] + y.grad
    real_features.backward(target.grad)
    net.requires_grad_(False)
    return loss.detach()


# ------------------------------------------------------------ distill, pre-train, decode


def distill(data, args, path):
    """Distill `data` in one network and translate -> content of the distilled file `path`.

    An adapted translator is written beside it, for other budgets (Fig. 4c).
    """
    theta = build_network(data)
    translator, seconds = None, 0
    if args.mode in TRANSLATED:
        translator, seconds = start_translator(data, args, path)
    if args.mode not in ("adapted", "scratch", "autoencoder"):  # 4k for all (Sec. 4.3)
        args = replace(args, iterations=args.iterations + args.adapt_steps)
    if args.mode == "bilevel":
        seconds = learn_space(theta, data, args, path.with_name(f"{path.stem}_space.pt"))
    target, target_labels = None, None
    if args.mode != "baseline":
        target = common.features(theta, data.train)  # line 5
        target_labels = common.center_labels(data.train_labels, len(data.classes))
    images, labels = start_synthetic(data, args.ipc, args, args.seed, "start")
    images, labels, run = distill_in_one_network(
        theta, images, labels, target, target_labels, data, args, path
    )
    if args.mode in TRANSLATED and args.mode != "no-adaptation":
        network = build_network(data)
        loss_of = partial(adaptation_loss, translator, network, images, labels, data, args)
        adapted = path.with_name(f"{path.stem}_adapted.pt")
        rest = (args.adapt_steps, args.lr_adapt, loss_of)
        seconds += train_translator(translator, data, args, adapted, *rest)
    if translator:
        with torch.no_grad():
            images = translator(images)
    run.seconds += seconds
    return common.save_distilled(path, data, args, {"images": images, "labels": labels}, run)


def start_translator(data, args, path):
    """The translator before adaptation, and seconds. Raises UserError if the mode needs a file."""
    common.seed(args.seed, "translator")
    translator, seconds = Translator().to(data.device), 0
    if args.mode == "autoencoder":
        loss_of = partial(reconstruction_loss, translator, data, args)
        file = path.with_name(f"{path.stem}_encoder.pt")
        seconds = train_translator(translator, data, args, file, args.ae_steps, 1e-3, loss_of)
    elif args.mode in ("adapted", "no-adaptation"):
        stored = common.load(args.translator, "a translator (--translator, see --mode pretrain)")
        if "weights" not in stored or stored["preprocess"] != data.preprocess.kind:
            raise common.UserError(f"{args.translator} is no translator for {data.preprocess.kind}")
        translator.load_state_dict(stored["weights"])
    return translator, seconds


def pretrain(data, args):
    """Pre-train a translator on the many classes of `data` (Alg. 2) -> args.out/translator.pt."""
    path = pathlib.Path(args.out) / "translator.pt"
    theta = build_network(data)
    progress = common.Progress(args.subsets, "subsets")
    for n in range(args.subsets):
        cached_subset(data, theta, n, args)
        progress.step()
    translator, _ = start_translator(data, args, path)
    loss_of = partial(pretraining_loss, translator, build_network(data), theta, data, args)
    rest = (args.pretrain_steps, args.lr_pretrain, loss_of, args.batch)
    train_translator(translator, data, args, path, *rest)


def decode(distilled, device="cpu"):
    """The images of a distilled file (1, n, c, h, w) and their soft labels (n, C)."""
    images = enlarge(distilled["images"].to(device), distilled["shape"][-1])
    return images[None], distilled["labels"].to(device)


def protocol(settings, count):
    """FRePo's protocol, with the PyTorch branch's weight decay and scaling."""
    return common.frepo_protocol(count, partial(common.frepo_augment, scale=True), 5e-4)


def main():
    args = common.parse_args(Args, PRESETS)
    if args.eval_every:
        raise common.UserError("this method scores at the end only: leave out --eval-every")
    path = common.output_path(f"translator_fewshot_{args.mode}", args)
    data = common.load_dataset(args)
    if args.mode == "pretrain":
        return pretrain(data, args)
    distilled = distill(data, args, path)
    images, labels = decode(distilled, data.device)
    common.save_grid(
        path.with_suffix(".png"), data, images[0], columns=min(len(labels) // len(data.classes), 10)
    )
    common.score(data, distilled, images, labels, protocol(None, len(labels)), args)


if __name__ == "__main__":
    common.run(main)
