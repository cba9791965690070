"""HaBa: dataset distillation via factorization (Liu et al., NeurIPS 2022).

In place of images, HaBa stores bases (bpc a class) and a few hallucinators, small networks that
all classes share: |B| bases and |H| hallucinators give |B| x |H| training images. Both are learned
by matching training trajectories (MTT, see mtt.py): a student trained for N steps on hallucinated
images should arrive where an expert is after M epochs (Eq. 7). An adversary F diversifies the
hallucinators: it is trained to give all images of a basis similar features (Eq. 3, 4); bases and
hallucinators are trained to make these features differ (Eq. 5).

    python haba.py                                      # glyphs, drawn here: minutes on a CPU
    python haba.py --dataset cifar10 --bpc 9            # the paper: 69.9 +- 0.4 %
    python haba.py --dataset cifar10 --objective dm     # DM's or DC's objective (Tab. 2)

Measured: 37.5 +- 0.3 % with the first command, 18.4 for random real images of the same storage.

With the authors' learning rate of 100, hallucinator weights reach 58 within 15 iterations, in their
code as well: use --lr-hallucinators 1 for short runs. Their code also standardizes each batch as a
whole (experts, scoring, test) and mirrors SVHN and MNIST; this does not.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import common


@dataclass
class Args(common.Args):
    # bases a class, |B| / C
    bpc: int = 1
    # L_DD: MTT's, DM's or DC's (Tab. 2)
    objective: Literal["mtt", "dm", "dc"] = "mtt"
    # iterations of the distillation; 0: train the experts only
    iterations: int = 15000
    # |H|: hallucinators; 0: bases are images, enlarged (with the optimizer of HaBa, not of MTT)
    hallucinators: int = 5
    # each class has |H| hallucinators of its own (Tab. 5)
    class_hallucinators: bool = False
    # all hallucinators share encoder and decoder (supplement Tab. 5)
    share_conv: bool = False
    # conv-ReLU blocks in the encoder, and in the decoder
    depth: Literal[0, 1, 2, 3] = 1
    # c'': channels of the first block; 0: as the image, 8 from depth 2 on
    channels: int = 0
    # c': channels of a basis; 0: as the image
    basis_channels: int = 0
    # h', w': side of a basis; 0: as the image
    basis_size: int = 0
    # eta_B: learning rate of the bases
    lr_bases: float = 100.0
    # eta_H: learning rate of the hallucinators
    lr_hallucinators: float = 100.0
    # lambda_cos: weight of the cosine term (Eq. 6); dm, dc: relative to the objective's gradient
    weight_cos: float = 0.1
    # lambda_con: weight of the contrastive loss of F (Eq. 4)
    weight_con: float = 0.1
    # lambda_task: weight of the cross-entropy of F (Eq. 4)
    weight_task: float = 1.0
    # augment hallucinated images by DSA (Tab. 6)
    dsa: bool = True
    # bases a student step, and in Eq. 4, 5; 0: all
    batch: int = 0
    # mtt: expert trajectories; missing ones are trained
    experts: int = 100
    # mtt: N, student steps an iteration
    student_steps: int = 30
    # mtt: M, expert epochs to match
    expert_epochs: int = 2
    # mtt: a student starts at expert epoch t in 0 .. max_start - 1
    max_start: int = 20
    # mtt: first value of alpha, the learning rate of the student
    step_size: float = 0.01
    # mtt: learning rate of alpha (SGD, momentum 0.9)
    lr_step: float = 1e-5
    # dm, dc: real images a class in an iteration
    batch_real: int = 256
    # dc: iterations with one network
    matches: int = 10
    # dc: epochs that the network trains between two iterations
    net_epochs: int = 50

    may_be_zero = ("iterations", "hallucinators")


# DM's and DC's authors; the paper has eta_H = eta_B, but with that the hallucinators diverge
DM = dict(iterations=20000, lr_bases=1.0, lr_hallucinators=0.001)
DC = dict(lr_bases=0.1, lr_hallucinators=0.001)
SHORT = dict(iterations=130, batch_real=64, net_epochs=5, runs=2, epochs=200)
SHORT |= dict(experts=2, student_steps=20, max_start=5, expert_epochs=4, step_size=0.005)
PRESETS = {
    "mtt": {  # CIFAR-100: MTT's with the paper's batch; SVHN (below): CIFAR-10's
        ("cifar10", 1): dict(zca=True, student_steps=50, max_start=2, lr_step=1e-7),
        ("cifar10", 10): dict(zca=True, step_size=0.001),
        ("cifar10", 50): dict(zca=True),
        ("cifar100", 1): dict(zca=True, student_steps=20, expert_epochs=3),
        ("cifar100", 10): dict(zca=True, student_steps=20),
        ("cifar100", 50): dict(zca=True, student_steps=80, max_start=40, batch=300),
        ("glyphs", 1): SHORT | dict(lr_hallucinators=1.0),
    },
    "dm": {("cifar10", 1): DM, ("glyphs", 1): DM | SHORT},
    "dc": {  # Tab. 2 has DC without DSA: add --no-dsa
        ("cifar10", 1): DC | dict(iterations=1000, matches=1),
        ("cifar10", 10): DC | dict(iterations=10000, matches=10),
        ("cifar10", 50): DC | dict(iterations=50000, matches=50, net_epochs=10),
        ("glyphs", 1): DC | SHORT,
    },
}
for budget in (1, 10, 50):
    PRESETS["mtt"]["svhn", budget] = PRESETS["mtt"]["cifar10", budget]


class Hallucinator(nn.Module):
    """Encoder, scale and shift, decoder (Eq. 2): bases (b, c', h', w') -> images (b, c, h, w).

    Smaller bases are enlarged first. Between the blocks the width doubles and the side halves;
    depths 0 to 3 have 6,144, 6,312, 10,963 and 16,131 parameters (supplement Tab. 3). The last
    block has no ReLU, as images are signed. The authors' code has neither ReLU nor padding.
    """

    def __init__(self, shape, basis_channels, channels, depth):
        super().__init__()
        self.size = tuple(shape[1:])
        widths = [channels * 2**i for i in range(depth)]
        inside = (channels, *widths)[-1]
        side = shape[1] // 2 ** max(depth - 1, 0)
        self.encoder = self.convolutions([basis_channels, *widths])
        self.scale = nn.Parameter(torch.ones(inside, side, side))  # sigma
        self.shift = nn.Parameter(torch.zeros(inside, side, side))  # mu
        self.decoder = self.convolutions([*widths[::-1], shape[0]])

    @staticmethod
    def convolutions(widths):
        pairs = zip(widths, widths[1:], strict=False)
        return nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairs)

    def forward(self, x):
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear")
        for i, conv in enumerate(self.encoder):
            x = F.relu(conv(F.avg_pool2d(x, 2) if i else x))
        x = self.scale * x + self.shift
        for i, conv in enumerate(self.decoder):
            x = conv(F.interpolate(F.relu(x), scale_factor=2) if i else x)
        return x


class FactorizedSet(nn.Module):
    """Bases (n, c', h', w'), class after class, and hallucinators (Eq. 1).

    hallucinators[j] is a list: one module for all classes, or one a class.
    """

    def __init__(self, bases, classes, shape, args):
        super().__init__()
        channels = args.channels or (shape[0] if args.depth < 2 else 8)
        if args.depth == 0 and not bases.shape[1] == channels == shape[0]:
            raise common.UserError("--depth 0 has no convolutions: leave out the channels")
        if shape[1] % 2 ** max(args.depth - 1, 0):
            raise common.UserError(f"--depth {args.depth} is too large for {shape[1]} pixels")
        self.bases = nn.Parameter(bases)
        self.register_buffer(
            "labels", torch.arange(classes).repeat_interleave(len(bases) // classes)
        )
        common.seed(args.seed, "hallucinators")
        build = partial(Hallucinator, shape, bases.shape[1], channels, args.depth)
        self.own = classes if args.class_hallucinators else 1
        self.hallucinators = nn.ModuleList()
        for _ in range(args.hallucinators):
            self.hallucinators.append(nn.ModuleList(build() for _ in range(self.own)))
        every = [h for h in self.modules() if isinstance(h, Hallucinator)]
        for h in every if args.share_conv else []:
            h.encoder, h.decoder = every[0].encoder, every[0].decoder
        self.shape = tuple(shape)

    def forward(self, index, j):
        """Bases `index` (b,) through hallucinator j -> images (b, c, h, w), labels (b,)."""
        if not self.hallucinators:
            images = F.interpolate(self.bases[index], self.shape[1:], mode="bilinear")
            return images.expand(-1, self.shape[0], -1, -1), self.labels[index]
        if self.own == 1:
            return self.hallucinators[j][0](self.bases[index]), self.labels[index]
        parts = self.bases.chunk(self.own)
        images = [h(x) for h, x in zip(self.hallucinators[j], parts, strict=True)]
        return torch.cat(images)[index], self.labels[index]

    def everything(self):
        """All images (|H| or 1, n, c, h, w) and labels (n,)."""
        index = torch.arange(len(self.bases), device=self.bases.device)
        images = [self(index, j)[0] for j in range(len(self.hallucinators) or 1)]
        return torch.stack(images), self.labels


def contrastive_loss(features, labels, temperature=0.07):
    """L_con, Eq. 3 in its supervised form (Khosla et al. 2020), which the experiments use.

    features (|H|, b, d), labels (b,): an anchor's positives are all others of its class (in Eq. 3,
    of its basis). Features are normalized, as in the authors' code.
    """
    x = F.normalize(features, dim=2).flatten(0, 1)
    labels = labels.repeat(len(features))
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    log_p = (x @ x.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~itself
    return -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp_min(1)).mean()


def cosine_loss(features):
    """L_cos, Eq. 5, for features (|H|, b, d): the cosine of a basis in hallucinators j != k, summed
    over j and k, over |H|^2, mean over bases. (The authors' (cos + 1) / 2: the same gradient.)"""
    x = F.normalize(features, dim=2)
    total = x.sum(0).square().sum() - x.square().sum()
    return total / (len(x) ** 2 * x.shape[1])


def distill(data, args, path):
    """Factorize `data` (supplement Alg. 1) -> content of the distilled file `path`.

    With --iterations 0 only the experts are trained -> None.
    """
    device, classes, objective = data.device, len(data.classes), args.objective
    factors = start_factors(data, args).to(device)  # line 1
    experts = common.load_experts(data, args) if objective == "mtt" else None
    if args.iterations == 0:
        return None
    net = common.ConvNet(data.shape, classes).to(device)
    adversary = common.ConvNet(data.shape, classes).to(device).reset(args.seed, "F")
    bases = {"params": [factors.bases], "lr": args.lr_bases}
    rest = {"params": list(factors.hallucinators.parameters()), "lr": args.lr_hallucinators}
    momentum = 0.95 if objective == "mtt" else 0.5
    optimizer = torch.optim.SGD([bases, rest], momentum=momentum)
    adversary_optimizer = torch.optim.SGD(adversary.parameters(), lr=0.001, momentum=0.9)
    step_size = torch.tensor(args.step_size, device=device)
    step_size_optimizer = torch.optim.SGD([step_size], lr=args.lr_step, momentum=0.9)
    alpha = step_size if objective == "mtt" else None  # to train with
    use_adversary = args.hallucinators > 1 and args.weight_cos > 0
    for p in factors.parameters():
        p.grad = torch.zeros_like(p)

    def evaluate():
        images, labels = factors.everything()
        rest = (labels, protocol(vars(args)), args, alpha)
        return common.train_and_test(data, images.detach(), *rest)

    state = {"factors": factors, "adversary": adversary, "net": net, "step_size": step_size}
    state |= {"optimizer": optimizer, "adversary_optimizer": adversary_optimizer}
    state |= {"step_size_optimizer": step_size_optimizer}
    run = common.Run(path, data, args, state, evaluate, experts)
    for it in range(run.start, args.iterations):
        optimizer.zero_grad(set_to_none=False)  # what is not drawn moves by its momentum

        # L_DD (Eq. 6, 7): the gradient accumulates in bases and hallucinators
        if objective == "mtt":
            start, target = common.sample_segment(experts, args, args.seed, it)
            batch = partial(student_batch, factors, data, args, it)
            loss, step_size.grad = common.match_trajectory(
                net, start, target, step_size, batch, args.student_steps
            )
        elif objective == "dm":
            loss = match_features(net, factors, data, args, it)
        else:
            loss = match_gradients(net, factors, data, args, it)

        # L_cos (Eq. 5): two hallucinations of a basis should differ in the adversary's features
        if use_adversary:
            images, labels = hallucinate_pair(factors, data, args, it)
            features = adversary.features(images).unflatten(0, (2, -1))
            cosine, weight = cosine_loss(features), args.weight_cos
            if objective != "mtt":  # rescale: DM's and DC's gradients are 1e5 times that of L_cos
                (gradient,) = torch.autograd.grad(cosine, factors.bases, retain_graph=True)
                weight = weight * factors.bases.grad.norm() / gradient.norm()
            (weight * cosine).backward()

        optimizer.step()  # Alg. 1, lines 11, 12
        if objective == "mtt":
            step_size_optimizer.step()
            step_size.clamp_(min=0.001)
        if objective == "dc" and (it + 1) % args.matches:
            train_between(net, factors, data, args, it)

        # Train F (Eq. 3, 4) on the pair of L_cos, recomposed after the update (Alg. 1, lines 13,
        # 14). The authors' code draws a new pair and adds 0.1 (1 - cos) / 2.
        if use_adversary:
            with torch.no_grad():
                images, labels = hallucinate_pair(factors, data, args, it)
            features = adversary.features(images)
            task = F.cross_entropy(adversary.classifier(features), labels.repeat(2))
            contrast = contrastive_loss(features.unflatten(0, (2, -1)), labels)
            adversary_optimizer.zero_grad()
            (args.weight_task * task + args.weight_con * contrast).backward()
            adversary_optimizer.step()
        run.step(it, loss)

    tensors = dict(factors.named_parameters())
    return common.save_distilled(
        path, data, args, tensors, run, None if alpha is None else alpha.item()
    )


def start_factors(data, args):
    """Bases from real images (Alg. 1: random), resized or averaged over channels as needed."""
    bases, _ = data.sample(args.bpc, args.seed, "start")
    if args.basis_channels not in (0, data.shape[0]):
        bases = bases.mean(1, keepdim=True).repeat(1, args.basis_channels, 1, 1)
    if args.basis_size not in (0, data.shape[1]):
        bases = F.interpolate(bases, (args.basis_size,) * 2, mode="bilinear", antialias=True)
    return FactorizedSet(bases, len(data.classes), data.shape, args)


def student_batch(factors, data, args, it, n):
    """Images (b, c, h, w) and labels (b,) of student step n, all of one drawn hallucinator.

    The paper draws two an iteration; the authors' code, as here, one of all in each step.
    """
    key = (args.seed, it, "batch")
    index = common.student_indices(len(factors.bases), args.batch, n, *key, device=data.device)
    j = common.hash_int(*key, n, "hallucinator") % max(args.hallucinators, 1)
    images, labels = factors(index, j)
    return protocol(vars(args)).augment(images, data.flip, *key, n), labels


def hallucinate_pair(factors, data, args, it):
    """Bases through two hallucinators drawn for the iteration (Sec. 4.1), augmented as in the
    authors' code -> images (2 b, c, h, w), labels (b,)."""
    key, count = (args.seed, it, "pair"), args.hallucinators
    index = common.student_indices(len(factors.bases), args.batch, 0, *key, device=data.device)
    j = common.hash_int(*key, "j") % count
    k = (j + 1 + common.hash_int(*key, "k") % (count - 1)) % count
    images = torch.cat([factors(index, j)[0], factors(index, k)[0]])
    return protocol(vars(args)).augment(images, data.flip, *key), factors.labels[index]


# ------------------------------------------------------------ DM's and DC's objectives


def class_pairs(factors, data, args, it):
    """Real and hallucinated images (n, c, h, w) of each class -> list of C pairs, and the leaf.

    Siamese DSA, one draw a class. All hallucinators take part: two drawn ones would make the mean
    features a biased estimate (KFS Eq. 2). The leaf (|H|, n, c, h, w) collects the gradient.
    """
    real, _ = data.sample(min(args.batch_real, data.smallest_class), args.seed, it, "real")
    images, _ = factors.everything()
    leaf = images.detach().requires_grad_()
    ours = leaf.transpose(0, 1).flatten(0, 1)
    pairs, augment, classes = [], protocol(vars(args)).augment, len(data.classes)
    for c, pair in enumerate(zip(real.chunk(classes), ours.chunk(classes), strict=True)):
        pairs.append([augment(x, data.flip, args.seed, it, c, shared=True) for x in pair])
    return pairs, images, leaf


def match_features(net, factors, data, args, it):
    """DM (survey Eq. 31) -> loss; adds its gradient to the factors."""
    net.reset(args.seed, it)
    pairs, images, leaf = class_pairs(factors, data, args, it)
    real, ours = (torch.cat(part) for part in zip(*pairs, strict=True))
    target = common.features(net, real).unflatten(0, (len(pairs), -1)).mean(1)
    means = net.features(ours).unflatten(0, (len(pairs), -1)).mean(1)
    loss = (means - target).square().sum()
    loss.backward(inputs=[leaf])
    images.backward(leaf.grad)
    return loss


def match_gradients(net, factors, data, args, it):
    """DC (survey Eq. 24) -> loss; adds its gradient to the factors, class by class."""
    if it % args.matches == 0:
        net.reset(args.seed, it)
    pairs, images, leaf = class_pairs(factors, data, args, it)
    params, total = list(net.parameters()), 0
    for c, pair in enumerate(pairs):
        gradients = []
        for x in pair:
            loss = F.cross_entropy(net(x), torch.full((len(x),), c, device=x.device))
            gradients.append(torch.autograd.grad(loss, params, create_graph=x is pair[1]))
        distance = gradient_distance(*gradients)
        distance.backward(inputs=[leaf], retain_graph=True)
        total = total + distance.detach()
    images.backward(leaf.grad)
    return total


def gradient_distance(theirs, ours):
    """D (survey Eq. 22, 23): 1 - cosine of the gradients of each output unit, summed. As in the
    authors' code biases and norms do not count, and 1e-6 is added to the product of lengths."""
    total = 0
    for a, b in zip(theirs, ours, strict=True):
        if a.ndim > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def train_between(net, factors, data, args, it):
    """DC: train the network on the factorized set, without momentum (survey Eq. 20)."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    images, labels = factors.everything()
    augment = protocol(vars(args)).augment
    for epoch in range(args.net_epochs):
        key = (args.seed, it, epoch)
        common.train_epoch(net, optimizer, data, images.detach(), labels, *key, augment=augment)


# ------------------------------------------------------------ using a distilled file


@torch.no_grad()
def decode(distilled, device="cpu"):
    """All hallucinated images of a distilled file (|H|, n, c, h, w) and the labels (n,)."""
    args, classes = Args(**distilled["settings"]), len(distilled["classes"])
    factors = FactorizedSet(distilled["bases"], classes, distilled["shape"], args)
    for name, parameter in factors.named_parameters():
        parameter.copy_(distilled[name])
    return factors.to(device).everything()


def protocol(settings, count=None):
    """That of MTT's authors. Each use of a basis draws a hallucinator, so an epoch is as long as
    the number of bases. No DSA if the set was made without (Tab. 6)."""
    augment = common.dsa if settings["dsa"] else lambda images, *key, **shared: images
    return common.Protocol(augment=augment)


def save_picture(path, data, distilled):
    """One row a class: its first basis, then its hallucinations (Fig. 4). For display, match
    channel mean and std to the real images."""
    images, _ = decode(distilled, data.device)
    bases = F.interpolate(distilled["bases"].to(data.device), data.shape[1:])
    if bases.shape[1] != data.shape[0]:
        bases = bases.mean(1, keepdim=True).expand(-1, data.shape[0], -1, -1)
    rows = torch.cat([bases[None], images])[:, :: distilled["per_class"]]
    std, mean = torch.std_mean(data.train[::100], (0, 2, 3), keepdim=True)
    ours_std, ours_mean = torch.std_mean(rows, (1, 3, 4), keepdim=True)
    rows = (rows - ours_mean) / (ours_std + 1e-6) * std + mean
    common.save_grid(path, data, rows.transpose(0, 1).flatten(0, 1), columns=len(rows))


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path("haba" if args.objective == "mtt" else f"haba_{args.objective}", args)
    data = common.load_dataset(args)
    distilled = distill(data, args, path)
    if distilled:
        save_picture(path.with_suffix(".png"), data, distilled)
        images, labels = decode(distilled, data.device)
        common.score(data, distilled, images, labels, protocol(distilled["settings"]), args)


if __name__ == "__main__":
    common.run(main)
