"""HaBa: dataset distillation via factorization (Liu et al., NeurIPS 2022).

In place of images, HaBa stores bases (bpc per class) and a few hallucinators, small networks that
all classes share: |B| bases and |H| hallucinators give |B| x |H| training images. An adversary F
learns features in which the images of a class are similar; bases and hallucinators learn to make
the features of a basis differ from hallucinator to hallucinator:

    L_S = L_DD + lambda_cos L_cos                for bases and hallucinators (Eq. 6, lambda_DD = 1)
    L_F = lambda_con L_con + lambda_task L_task  for F (Eq. 4)

L_DD matches training trajectories (Eq. 7, match_trajectory), or is DM's or DC's (Tab. 2).

    python haba.py                                  # glyphs, drawn here: minutes on a CPU
    python haba.py --dataset cifar10 --bpc 9        # the paper: 69.9 +- 0.4 %

Measured on CIFAR-10, --bpc 3 --basis-channels 1: 53.0 +- 0.3 % (paper: 55.7) with --iterations 580
--experts 12 --lr-hallucinators 1.
"""

import pathlib
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import common
from common import arg


@dataclass
class Args(common.Args):
    budget = "bpc"
    bpc: int = arg(1, "bases per class, |B| / C")
    objective: Literal["mtt", "dm", "dc"] = arg("mtt", "L_DD: MTT's, DM's or DC's (Tab. 2)")
    iterations: int = arg(15000, "iterations of the distillation; mtt, 0: train experts only", 0)
    hallucinators: int = arg(5, "|H|: hallucinators; 0: none, bases are images", 0)
    class_hallucinators: bool = arg(False, "each class has |H| hallucinators of its own (Tab. 5)")
    share_conv: bool = arg(False, "all hallucinators share encoder and decoder (supplement Tab. 5)")
    depth: Literal[0, 1, 2, 3] = arg(1, "convolutions in the encoder, and in the decoder")
    channels: int = arg(0, "c'': channels of block 1; 0: as the image, 8 from depth 2 on", 0)
    basis_channels: int = arg(0, "c': channels of a basis; 0: as the image", 0)
    basis_size: int = arg(0, "h', w': side of a basis; 0: as the image", 0)
    lr_bases: float = arg(100.0, "eta_B: bases' rate (SGD, momentum 0.95; dm, dc 0.5)")
    lr_hallucinators: float = arg(100.0, "eta_H: hallucinators' rate (the same SGD)")
    weight_cos: float = arg(0.1, "lambda_cos (Eq. 6); dm, dc: times |grad L_DD| / |grad L_cos|")
    weight_con: float = arg(0.1, "lambda_con: weight of L_con (Eq. 4)")
    weight_task: float = arg(1.0, "lambda_task: weight of the cross-entropy of F (Eq. 4)")
    dsa: bool = arg(True, "augment hallucinated images by DSA (Tab. 6); experts always have it")
    batch: int = arg(0, "bases per student step and Eq. 4, 5 (paper: 300 of > 1,000); 0: all", 0)
    experts: int = arg(100, "mtt: expert trajectories; missing ones are trained")
    student_steps: int = arg(30, "mtt: N, student steps per iteration")
    expert_epochs: int = arg(2, "mtt: M, expert epochs to match")
    max_start: int = arg(20, "mtt: a student starts at expert epoch t in 0 .. max_start - 1")
    step_size: float = arg(0.01, "mtt: first value of alpha, the student's learning rate", 0.001)
    lr_step: float = arg(1e-5, "mtt: learning rate of alpha (SGD, momentum 0.9)")
    batch_real: int = arg(256, "dm, dc: real images per class and iteration")
    matches: int = arg(10, "dc: iterations with one network")
    net_epochs: int = arg(50, "dc: epochs that the network trains between two iterations")

    def augment(self, images, flip, *key, **options):
        return common.dsa(images, flip, *key, **options) if self.dsa else images


SHORT = dict(iterations=130, hallucinators=4, experts=2, student_steps=20, max_start=5)
SHORT |= dict(expert_epochs=4, step_size=0.005, batch_real=64, net_epochs=5, runs=2, epochs=200)
# The paper has eta_H = eta_B, but with that the hallucinators diverge
DM = dict(iterations=20000, lr_bases=1.0, lr_hallucinators=0.001)
DC = dict(lr_bases=0.1, lr_hallucinators=0.001)
# mtt: the authors' settings; CIFAR-100: MTT's with ZCA and the paper's batch; SVHN: CIFAR-10's
# dc: we read Tab. 2's DC as without DSA: add --no-dsa
PRESETS = {
    "mtt": {
        ("cifar10", 1): dict(zca=True, student_steps=50, max_start=2, lr_step=1e-7),
        ("cifar10", 10): dict(zca=True, step_size=0.001),
        ("cifar10", 50): dict(zca=True),
        ("cifar100", 1): dict(zca=True, student_steps=20, expert_epochs=3),
        ("cifar100", 10): dict(zca=True, student_steps=20),
        ("cifar100", 50): dict(zca=True, student_steps=80, max_start=40, batch=300),
        ("glyphs", 1): SHORT | dict(iterations=100, lr_hallucinators=1.0),
    },
    "dm": {("cifar10", 1): DM, ("glyphs", 1): DM | SHORT},
    "dc": {
        ("cifar10", 1): DC | dict(iterations=1000, matches=1),
        ("cifar10", 10): DC | dict(iterations=10000, matches=10),
        ("cifar10", 50): DC | dict(iterations=50000, matches=50, net_epochs=10),
        ("glyphs", 1): DC | SHORT,
    },
}
PRESETS["mtt"] |= {("svhn", bpc): PRESETS["mtt"]["cifar10", bpc] for bpc in (1, 10, 50)}


class Hallucinator(nn.Module):
    """Encoder, scale sigma, shift mu, decoder (Eq. 2): (b, c', h, w) -> (b, c, h, w).

    Depths 0 to 3 have 6,144, 6,312, 10,963, 16,131 parameters at 3x32x32 (supplement Tab. 3). Ours:
    each block doubles the width; no ReLU at the end, as images are signed (authors: none at all).
    """

    def __init__(self, shape, args):
        super().__init__()
        first = args.channels or (shape[0] if args.depth < 2 else 8)
        widths = [first * 2**i for i in range(args.depth)]
        basis_channels = args.basis_channels or shape[0]
        encoder = []
        for i, o in pairwise([basis_channels, *widths]):
            encoder += [nn.AvgPool2d(2), nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
        decoder = []
        for i, o in pairwise([*widths[::-1], shape[0]]):
            decoder += [nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, padding=1)]
        # the encoder starts without its pooling, the decoder without its ReLU and upsampling
        self.encoder = nn.Sequential(*encoder[1:])
        self.decoder = nn.Sequential(*decoder[2:])
        features = self.encoder(torch.zeros(1, basis_channels, *shape[1:]))[0]
        self.scale = nn.Parameter(torch.ones_like(features))
        self.shift = nn.Parameter(torch.zeros_like(features))

    def forward(self, x):
        return self.decoder(self.scale * self.encoder(x) + self.shift)


class FactorizedSet(nn.Module):
    """Bases (n, c', h', w'), class after class, and hallucinators [j][class or 0] (Eq. 1)."""

    def __init__(self, bases, shape, classes, args):
        super().__init__()
        widths = args.channels or args.basis_channels not in (0, 1, shape[0])
        if widths and not (args.depth and args.hallucinators):
            raise common.UserError("--depth 0, --hallucinators 0: no --channels, --basis-channels")
        if shape[1] % 2 ** max(args.depth - 1, 0):
            raise common.UserError(f"--depth {args.depth} cannot halve {shape[1]} pixels evenly")
        self.shape = shape
        self.bases = nn.Parameter(bases)
        labels = torch.arange(classes).repeat_interleave(len(bases) // classes)
        self.register_buffer("labels", labels)
        build = partial(Hallucinator, shape, args) if args.hallucinators else nn.Identity
        self.hallucinators = nn.ModuleList()
        for _ in range(args.hallucinators or 1):
            modules = [build() for _ in range(classes if args.class_hallucinators else 1)]
            self.hallucinators.append(nn.ModuleList(modules))
        if args.share_conv and args.hallucinators:
            for h in chain(*self.hallucinators):
                h.encoder = self.hallucinators[0][0].encoder
                h.decoder = self.hallucinators[0][0].decoder

    def forward(self, index, j):
        """Bases `index` (b,), enlarged, through hallucinator j -> images (b, c, h, w)."""
        modules = self.hallucinators[j]
        enlarge = partial(F.interpolate, size=self.shape[1:], mode="bilinear")
        if len(modules) == 1:
            images = modules[0](enlarge(self.bases[index]))
        else:
            # a module for each class: all bases go through theirs, then `index` selects
            parts = zip(modules, enlarge(self.bases).chunk(len(modules)), strict=True)
            images = torch.cat([module(part) for module, part in parts])[index]
        return images.expand(-1, self.shape[0], -1, -1)

    def all_images(self):
        """All images (|H|, n, c, h, w)."""
        return torch.stack([self(slice(None), j) for j in range(len(self.hallucinators))])


def contrastive_loss(features, labels, temperature=0.07):
    """Compute L_con (Eq. 3, its supervised form) of features (n, d), labels (n,)."""
    # as in the authors' code: unit features, a mean over images (Eq. 3: 1 / |H|^2), positives of
    # the class (Eq. 3: the basis), all others in the denominator (Eq. 3: images of hallucinator k)
    x = F.normalize(features)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    log_p = (x @ x.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~itself
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()


# ------------------------------------------------------------ trajectories (a copy is in mtt.py)


def load_experts(data, args, record):
    """Load expert trajectories (MTT Sec. 3.1), train missing ones -> (experts, epochs + 1, P).

    P: number of parameters. Existing files are taken first, those of this seed before others; with
    --iterations 0 (array jobs) this seed's only. `record` keeps the names for a resumed run.
    """
    name = f"{data.name}_{data.fingerprint}" + "_no-flip" * (not data.flip)
    folder = pathlib.Path(args.data_dir) / "experts" / name
    own = [f"seed{args.seed}_expert{i:03d}.pt" for i in range(args.experts)]
    found = {path.name for path in folder.glob("seed*.pt")} if args.iterations else set()
    ranked = sorted({*own, *found}, key=lambda file: (file not in found, file not in own, file))
    names = record.setdefault("experts", sorted(ranked[: args.experts]))
    epochs = args.max_start - 1 + args.expert_epochs
    experts = [train_expert(data, folder / name, epochs) for name in names]
    return torch.stack(experts).to(data.device)


def train_expert(data, path, epochs):
    """Load an expert and train its missing epochs (SGD, lr 0.01, DSA) -> (epochs + 1, P), CPU."""
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device).reset(path.stem)
    trajectory = flatten(net).cpu()[None]
    if path.exists():
        trajectory = common.load(path, "an expert")
        net.load_state_dict(unflatten(net, trajectory[-1]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    real_set = (data.train[None], data.train_labels, common.Protocol())
    for epoch in common.progress(range(len(trajectory) - 1, epochs), path.stem):
        common.train_epoch(net, optimizer, data, *real_set, path.stem, epoch)
        trajectory = torch.cat([trajectory, flatten(net).cpu()[None]])
        common.save(trajectory, path)
    return trajectory[: epochs + 1]


def sample_segment(experts, args, *key):
    """Draw an expert and t < max_start -> its parameters at t and t + M, each (P,)."""
    expert = experts[common.hash_int(*key, "expert") % len(experts)]
    t = common.hash_int(*key, "start") % args.max_start
    return expert[t], expert[t + args.expert_epochs]


def student_indices(count, batch, step, *key, device="cpu"):
    """Indices of a student step's images: all (a slice), or a batch of a shuffled pass (b,)."""
    if not 0 < batch < count:
        return slice(None)
    # an incomplete last batch of a pass is dropped; the authors' code uses it
    steps = count // batch
    common.seed(*key, "pass", step // steps)
    return torch.randperm(count, device=device)[step % steps * batch :][:batch]


def flatten(net):
    """All parameters as one detached vector (P,)."""
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def unflatten(net, flat):
    """Inverse of `flatten`: a vector (P,) -> {name: view}, for functional_call."""
    named = dict(net.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    return {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}


# compiled to fused kernels, on a GPU (not tried yet) one CUDA graph: results/speed.md
@torch.compile(dynamic=False, mode="reduce-overhead")
def student_gradient(net, params, images, labels):
    """Compute the gradient (P,) of the cross-entropy at parameters `params` (P,)."""

    def loss(params):
        logits = functional_call(net, unflatten(net, params.to(images.dtype)), images)
        return F.cross_entropy(logits.to(params.dtype), labels)

    return torch.func.grad(loss)(params)


@torch.compile(dynamic=False, mode="reduce-overhead")
def student_vjp(net, params, images, labels, adjoint):
    """Gradient (P,), derivatives of gradient @ adjoint by params and by images: (P,), images'."""
    gradient, vjp = torch.func.vjp(partial(student_gradient, net, labels=labels), params, images)
    return gradient, *vjp(adjoint)


def match_trajectory(net, start, target, step_size, batch, steps):
    """Compute survey Eq. 30 (HaBa Eq. 7) for N = `steps` student steps, and its gradient.

    start, target (P,): theta*_t, theta*_{t+M}; batch(n): images and labels of step n, the same in
    each call; their leaves collect gradients. -> loss, gradient of alpha, the step size (0-d).
    Memory: the parameters of each step and the autograd graph of one.
    """
    # bfloat16 where the CPU has it; its error in the images' gradient: results/speed.md
    fast = common.fast_type(start)
    alpha = step_size.detach()
    student = start
    students = []
    for n in range(steps):
        students.append(student)
        with torch.no_grad():
            images, labels = batch(n)
            gradient = student_gradient(net, student, images.to(fast), labels)
            student = student - alpha * gradient

    scale = (start - target).square().sum()
    loss = (student - target).square().sum() / scale
    # dL / d student, back through student_{n+1} = student_n - alpha gradient(student_n, images)
    adjoint = 2 * (student - target) / scale
    alpha_grad = torch.zeros_like(alpha)
    for n in reversed(range(steps)):
        images, labels = batch(n)
        images = images.to(fast)
        with torch.no_grad():
            student, leaf = students.pop(), images.detach()
            gradient, params_grad, images_grad = student_vjp(net, student, leaf, labels, adjoint)
            alpha_grad -= gradient @ adjoint
            adjoint = adjoint - alpha * params_grad
        # adds to the .grad of batch's leaves
        images.backward(-alpha * images_grad)
    return loss, alpha_grad


# ------------------------------------------------------------ HaBa


def distill(data, args, path):
    """Factorize `data` (supplement Alg. 1) -> content of the file; None: experts only."""
    mtt = args.objective == "mtt"
    if mtt and args.iterations == 0:
        load_experts(data, args, {})
        return None
    if not mtt:
        args = replace(args, batch_real=data.at_most(args.batch_real))
    run = common.Run(path, data, args)
    # Bases start as real images (Alg. 1: random)
    bases, _ = data.sample(args.bpc, args.seed, "start")
    if args.basis_channels not in (0, data.shape[0]):
        bases = bases.mean(1, keepdim=True).repeat(1, args.basis_channels, 1, 1)
    bases = F.interpolate(bases, args.basis_size or data.shape[1], mode="bilinear", antialias=True)
    common.seed(args.seed, "hallucinators")
    factors = FactorizedSet(bases, data.shape, len(data.classes), args).to(data.device)
    experts = load_experts(data, args, run.record) if mtt else None
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device)
    adversary = common.ConvNet(data.shape, len(data.classes)).to(data.device).reset(args.seed, "F")
    step_size = torch.tensor(args.step_size, device=data.device)
    groups = [
        {"params": [factors.bases], "lr": args.lr_bases},
        {"params": factors.hallucinators.parameters(), "lr": args.lr_hallucinators},
        {"params": [step_size], "lr": args.lr_step, "momentum": 0.9},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.95 if mtt else 0.5)
    adversary_optimizer = torch.optim.SGD(adversary.parameters(), lr=0.001, momentum=0.9)
    alpha = step_size if mtt else None

    def evaluate(k):
        images = factors.all_images().detach()
        return common.train_and_test(data, images, factors.labels, protocol(args), args, alpha, k)

    state = {"factors": factors, "adversary": adversary, "net": net, "step_size": step_size}
    state |= {"optimizer": optimizer, "adversary_optimizer": adversary_optimizer}
    run.restore(state, evaluate)
    steps = args.student_steps
    use_adversary = args.hallucinators > 1 and args.weight_cos > 0
    for it in common.progress(range(run.start, args.iterations), "iterations"):
        # zeros, not None: hallucinators that are not drawn move by momentum (Alg. 1: not at all)
        for p in factors.parameters():
            p.grad = torch.zeros_like(p)

        # L_DD (Eq. 6, 7): the gradient accumulates in bases and hallucinators
        if mtt:
            segment = sample_segment(experts, args, args.seed, it)
            batch = partial(student_batch, factors, data, args, it)
            loss, step_size.grad = match_trajectory(net, *segment, step_size, batch, steps)
        else:
            loss = match_classes(net, factors, data, args, it)

        # L_cos (Eq. 5) of two drawn hallucinators: 2 of its 4 terms (j, k) have j != k, so half
        if use_adversary:
            features = adversary.features(hallucinate_pair(factors, data, args, it)[0])
            cosine = F.cosine_similarity(*features.chunk(2)).mean() / 2
            weight = args.weight_cos
            if not mtt:
                # relative, as DM's gradient is far larger than that of L_cos
                (gradient,) = torch.autograd.grad(cosine, factors.bases, retain_graph=True)
                weight = weight * factors.bases.grad.norm() / gradient.norm().clamp_min(1e-12)
            (weight * cosine).backward(inputs=list(factors.parameters()))

        # Alg. 1, lines 11, 12
        optimizer.step()
        # at least 0.001, as in the authors' code; above 100 times its first value NaN ends the run
        step_size.clamp_(min=0.001)
        step_size.masked_fill_(step_size > 100 * args.step_size, torch.nan)

        # L_F (Eq. 4; lines 13, 14) of the pair (authors: of a new pair, plus 0.1 (1 - cos) / 2)
        if use_adversary:
            images, labels = hallucinate_pair(factors, data, args, it)
            features = adversary.features(images.detach())
            task = F.cross_entropy(adversary.classifier(features), labels)
            contrast = contrastive_loss(features, labels)
            adversary_optimizer.zero_grad()
            (args.weight_task * task + args.weight_con * contrast).backward()
            adversary_optimizer.step()
        run.step(it, loss)

    return common.save_distilled(path, data, args, dict(factors.named_parameters()), run, alpha)


def student_batch(factors, data, args, it, n):
    """Images, labels of step n by one hallucinator, as in the authors' code (Sec. 4.1: two)."""
    key = (args.seed, it, "batch")
    index = student_indices(len(factors.bases), args.batch, n, *key, device=data.device)
    j = common.hash_int(*key, n, "hallucinator") % len(factors.hallucinators)
    return args.augment(factors(index, j), data.flip, *key, n), factors.labels[index]


def hallucinate_pair(factors, data, args, it):
    """Bases by two hallucinators -> images (2 b, c, h, w), labels (2 b,). DSA as the authors'."""
    key = (args.seed, it, "pair")
    index = student_indices(len(factors.bases), args.batch, 0, *key, device=data.device)
    j = common.hash_int(*key, "j") % args.hallucinators
    k = (j + 1 + common.hash_int(*key, "k") % (args.hallucinators - 1)) % args.hallucinators
    images = torch.cat([factors(index, j), factors(index, k)])
    return args.augment(images, data.flip, *key), factors.labels[index].repeat(2)


def match_classes(net, factors, data, args, it):
    """DM's or DC's L_DD (survey Eq. 31; 22 to 24) -> loss; adds its gradient to the factors.

    Siamese DSA. All hallucinators take part: two would bias the gradient (KFS Eq. 2).
    """
    images = factors.all_images()
    leaf = images.detach().requires_grad_()
    if args.objective == "dm" or it % args.matches == 0:
        net.reset(args.seed, it)
    else:
        # train the network on the set (survey Eq. 20)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        distilled_set = (leaf.detach(), factors.labels, protocol(args))
        for epoch in range(args.net_epochs):
            common.train_epoch(net, optimizer, data, *distilled_set, args.seed, it - 1, epoch)

    classes = len(data.classes)
    real, _ = data.sample(args.batch_real, args.seed, it, "real")
    distance = feature_distance if args.objective == "dm" else gradient_distance
    total = 0
    for c in range(classes):
        key = (args.seed, it, c)
        theirs = args.augment(real.chunk(classes)[c], data.flip, *key, shared=True)
        ours = args.augment(leaf.chunk(classes, 1)[c].flatten(0, 1), data.flip, *key, shared=True)
        loss = distance(net, theirs, ours, c)
        loss.backward(inputs=[leaf])
        total = total + loss.detach()
    images.backward(leaf.grad)
    return total


def feature_distance(net, real, ours, c):
    """DM (survey Eq. 31): the squared distance of the mean features."""
    return (net.features(ours).mean(0) - common.frozen_features(net, real).mean(0)).square().sum()


def gradient_distance(net, real, ours, c):
    """DC (survey Eq. 22, 23): 1 - cosine of the gradients of each output unit, summed."""
    # as in the authors' code: without biases and norm layers, 1e-6 added to the product of lengths
    weights = [p for p in net.parameters() if p.ndim > 1]
    gradients = []
    for x in (real, ours):
        loss = F.cross_entropy(net(x), torch.full((len(x),), c, device=x.device))
        gradients.append(torch.autograd.grad(loss, weights, create_graph=x is ours))
    total = 0
    for a, b in zip(*gradients, strict=True):
        lengths = a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1)
        total = total + (1 - (a * b).flatten(1).sum(1) / (lengths + 1e-6)).sum()
    return total


# ------------------------------------------------------------ the distilled file


@torch.no_grad()
def decode(distilled, device="cpu"):
    """All hallucinated images of a distilled file (|H|, n, c, h, w) and the labels (n,)."""
    args = Args(**distilled["settings"])
    classes = len(distilled["classes"])
    factors = FactorizedSet(distilled["bases"], distilled["shape"], classes, args).to(device)
    for name, parameter in factors.named_parameters():
        parameter.copy_(distilled[name])
    return factors.all_images(), factors.labels


def protocol(args):
    """MTT's training protocol; an epoch uses each basis once, with a drawn hallucinator."""
    return common.Protocol(augment=args.augment)


def save_picture(path, data, distilled, images):
    """Each row: a class's first basis, then its hallucinations (Fig. 4); columns standardized."""
    bases = F.interpolate(distilled["bases"].to(data.device), data.shape[1:])
    if bases.shape[1] != data.shape[0]:
        bases = bases.mean(1, keepdim=True).expand_as(images[0])
    columns = torch.cat([bases[None], images])[:, :: distilled["per_class"]]
    columns = F.layer_norm(columns, columns.shape[1:])
    common.save_grid(path, data, columns.transpose(0, 1).flatten(0, 1), len(columns))


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path(args, "" if args.objective == "mtt" else f"_{args.objective}")
    data = common.load_dataset(args, common.setup(args))
    distilled = distill(data, args, path)
    if distilled:
        images, labels = decode(distilled, data.device)
        save_picture(path.with_suffix(".png"), data, distilled, images)
        common.score(data, distilled, images, labels, protocol(args), args)


if __name__ == "__main__":
    common.cli(main)
