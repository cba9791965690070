"""MTT: dataset distillation by matching training trajectories (Cazenavette et al., CVPR 2022).

Experts are ConvNets trained on the real set; their parameters are kept after each epoch. Each
iteration starts a student at an expert's parameters theta*_t of a random epoch t, trains it for N
steps on the synthetic images and compares it with the expert M epochs later:

    L = || theta_{t+N} - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2       (survey Eq. 30)

The gradient goes back through all N steps to the images and to alpha, the student's learning rate.
Evaluation trains a fresh ConvNet on the distilled images, with DSA and the learned alpha. N counts
steps and M epochs, as in the authors' code (survey Eq. 30: N epochs; HaBa Eq. 7: M steps).

    python mtt.py                                  # glyphs, drawn here: minutes on a CPU
    python mtt.py --dataset cifar10 --ipc 1        # the paper: 5,000 iterations, 46.3 +- 0.8 %

Measured in a shorter run (five networks): 43.4 +- 0.7 % with --dataset cifar10 --ipc 1
--iterations 1107 --experts 30.
"""

import pathlib
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import common
from common import arg


@dataclass
class Args(common.Args):
    ipc: int = arg(1, "synthetic images per class")
    iterations: int = arg(5000, "iterations of the distillation; 0: train the experts only", 0)
    experts: int = arg(100, "expert trajectories; missing ones are trained")
    student_steps: int = arg(20, "N: student steps per iteration")
    expert_epochs: int = arg(2, "M: expert epochs to match")
    max_start: int = arg(20, "a student starts at expert epoch t in 0 .. max_start - 1")
    step_size: float = arg(0.01, "first value of alpha, the student's learning rate", 1e-6)
    lr_step: float = arg(1e-5, "learning rate of alpha (SGD, momentum 0.5)")
    lr_images: float = arg(1000.0, "learning rate of the pixels (SGD, momentum 0.5)")
    batch: int = arg(0, "synthetic images per student step; 0: all", 0)


# The settings of the authors' code; ours for glyphs
PRESETS = {
    ("cifar10", 1): dict(zca=True, student_steps=50, max_start=2, lr_images=100.0, lr_step=1e-7),
    ("cifar10", 10): dict(zca=True, student_steps=30, lr_images=100.0, step_size=0.001),
    ("cifar10", 50): dict(student_steps=30, max_start=40, step_size=0.001),
    ("cifar100", 1): dict(zca=True, expert_epochs=3),
    ("cifar100", 10): dict(),
    ("cifar100", 50): dict(zca=True, student_steps=80, max_start=40, batch=125),
    ("imagenet10", 1): dict(max_start=10, lr_step=1e-6),
    ("imagenet10", 10): dict(max_start=10, lr_step=1e-6, batch=20),
    ("tinyimagenet", 1): dict(student_steps=10, max_start=10, lr_images=1e4, lr_step=1e-4),
    ("tinyimagenet", 10): dict(max_start=40, lr_images=1e4, lr_step=1e-4, batch=200),
    ("glyphs", 1): dict(iterations=80, experts=2, expert_epochs=4, max_start=5, step_size=0.005)
    | dict(lr_images=100.0, lr_step=1e-7, runs=2, epochs=200),
}


# ------------------------------------------------------------ trajectories (a copy is in haba.py)


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


# ------------------------------------------------------------ MTT


def distill(data, args, path):
    """Distill `data` into args.ipc images per class -> content of the distilled file `path`.

    With --iterations 0 only the experts are trained -> None.
    """
    if args.iterations == 0:
        load_experts(data, args, {})
        return None
    run = common.Run(path, data, args)
    # synthetic images start as real ones
    images, labels = data.sample(args.ipc, args.seed, "start")
    experts = load_experts(data, args, run.record)
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device)
    images.requires_grad_()
    step_size = torch.tensor(args.step_size, device=data.device)
    optimizer = torch.optim.SGD([images], lr=args.lr_images, momentum=0.5)
    step_size_optimizer = torch.optim.SGD([step_size], lr=args.lr_step, momentum=0.5)
    steps = args.student_steps

    state = {"images": images, "step_size": step_size}
    state |= {"optimizer": optimizer, "step_size_optimizer": step_size_optimizer}
    # a detached view shares memory: an evaluation uses the current images
    distilled_set = (images.detach()[None], labels, protocol(args))
    run.restore(state, partial(common.train_and_test, data, *distilled_set, args, step_size))
    for it in common.progress(range(run.start, args.iterations), "iterations"):
        segment = sample_segment(experts, args, args.seed, it)
        batch = partial(student_batch, images, labels, data, args, it)
        optimizer.zero_grad()
        loss, step_size.grad = match_trajectory(net, *segment, step_size, batch, steps)
        optimizer.step()
        step_size_optimizer.step()
        # outside 0 .. 100 times its first value alpha becomes NaN, which ends the run
        outside = (step_size <= 0) | (step_size > 100 * args.step_size)
        step_size.masked_fill_(outside, torch.nan)
        run.step(it, loss)

    tensors = {"images": images, "labels": labels}
    return common.save_distilled(path, data, args, tensors, run, step_size)


def student_batch(images, labels, data, args, it, n):
    """Augmented synthetic images (b, c, h, w) and labels of student step n of iteration `it`."""
    key = (args.seed, it, "batch")
    index = student_indices(len(images), args.batch, n, *key, device=data.device)
    return common.dsa(images[index], data.flip, *key, n), labels[index]


# ------------------------------------------------------------ the distilled file


def decode(distilled, device="cpu"):
    """Images (1 variant, n, c, h, w) and labels (n,) of a distilled file."""
    return distilled["images"].to(device)[None], distilled["labels"].to(device)


def protocol(args):
    """The training protocol of MTT's authors; common.score replaces its rate by alpha."""
    return common.Protocol()


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path(args)
    data = common.load_dataset(args, common.setup(args))
    distilled = distill(data, args, path)
    if distilled:
        images, labels = decode(distilled, data.device)
        common.save_grid(path.with_suffix(".png"), data, images[0], columns=10)
        common.score(data, distilled, images, labels, protocol(args), args)


if __name__ == "__main__":
    common.cli(main)
