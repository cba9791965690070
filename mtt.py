"""MTT: dataset distillation by matching training trajectories (Cazenavette et al., CVPR 2022).

Experts are ConvNets trained on the real set; their parameters are kept after each epoch. Each
iteration starts a student at an expert's parameters phi*_t of a random epoch t, trains it for N
steps on the synthetic images and compares it with the expert M epochs later:

    L = || phi_{t+N} - phi*_{t+M} ||^2 / || phi*_t - phi*_{t+M} ||^2     (survey Eq. 30, HaBa Eq. 7)

The gradient goes back through all N steps to the images and to alpha, the student's learning rate.
The distilled images train a fresh ConvNet with DSA and the learned alpha. N counts steps and M
epochs, as in the authors' code (survey Eq. 30: N epochs; HaBa Eq. 7: M steps).

    python mtt.py                                  # glyphs, drawn here: minutes on a CPU
    python mtt.py --dataset cifar10 --ipc 1        # the paper: 5,000 iterations, 46.3 +- 0.8 %

Measured on CIFAR-10, --ipc 1: 42.8 +- 0.4 % with --iterations 1000 --experts 16 --expert-epochs 1
--step-size 0.005.
"""

from dataclasses import dataclass
from functools import partial

import torch

import common
from common import arg


@dataclass
class Args(common.Args):
    ipc: int = arg(1, "synthetic images per class")
    iterations: int = arg(5000, "iterations of the distillation; 0: train the experts only")
    experts: int = arg(100, "expert trajectories; missing ones are trained")
    student_steps: int = arg(20, "N: student steps per iteration")
    expert_epochs: int = arg(2, "M: expert epochs to match")
    max_start: int = arg(20, "a student starts at expert epoch t in 0 .. max_start - 1")
    step_size: float = arg(0.01, "first value of alpha, the learning rate of the student")
    lr_step: float = arg(1e-5, "learning rate of alpha (SGD, momentum 0.5)")
    lr_images: float = arg(1000.0, "learning rate of the pixels (SGD, momentum 0.5)")
    batch: int = arg(0, "synthetic images per student step; 0: all")


PRESETS = {  # the authors' settings
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
}
PRESETS["glyphs", 1] = PRESETS["cifar10", 1] | dict(zca=False, experts=2, expert_epochs=4)
PRESETS["glyphs", 1] |= dict(max_start=5, student_steps=20, step_size=0.005, iterations=100)
PRESETS["glyphs", 1] |= dict(runs=2, epochs=200)


def distill(data, args, path):
    """Distill `data` into args.ipc images per class -> content of the distilled file `path`.

    With --iterations 0 only the experts are trained -> None.
    """
    # synthetic images start as real ones
    images, labels = data.sample(args.ipc, args.seed, "start")
    experts = common.load_experts(data, args)
    if args.iterations == 0:
        return None
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device)
    images.requires_grad_()
    step_size = torch.tensor(args.step_size, device=data.device)
    optimizer = torch.optim.SGD([images], lr=args.lr_images, momentum=0.5)
    step_size_optimizer = torch.optim.SGD([step_size], lr=args.lr_step, momentum=0.5)

    state = {"images": images, "step_size": step_size}
    state |= {"optimizer": optimizer, "step_size_optimizer": step_size_optimizer}
    distilled_set = (images.detach()[None], labels, protocol())  # a view: it follows images
    evaluate = partial(common.train_and_test, data, *distilled_set, args, step_size)
    run = common.Run(path, data, args, state, evaluate, experts)
    for it in range(run.start, args.iterations):
        start, target = common.sample_segment(experts, args, args.seed, it)
        batch = partial(student_batch, images, labels, data, args, it)
        optimizer.zero_grad()
        loss, step_size.grad = common.match_trajectory(
            net, start, target, step_size, batch, args.student_steps
        )
        optimizer.step()
        step_size_optimizer.step()
        run.step(it, loss)

    tensors = {"images": images, "labels": labels}
    return common.save_distilled(path, data, args, tensors, run, step_size)


def student_batch(images, labels, data, args, it, n):
    """Augmented synthetic images (b, c, h, w) and labels of student step n of iteration `it`."""
    key = (args.seed, it, "batch")
    index = common.student_indices(len(images), args.batch, n, *key, device=data.device)
    return common.dsa(images[index], data.flip, *key, n), labels[index]


def decode(distilled, device="cpu"):
    """The images of a distilled file (1, n, c, h, w) and their labels (n,)."""
    return distilled["images"].to(device)[None], distilled["labels"].to(device)


def protocol(settings=None, count=None):
    """The training protocol of MTT's authors; the learning rate is the learned alpha."""
    return common.Protocol()


def main():
    args = common.parse_args(Args, PRESETS)
    path = common.output_path(args)
    data = common.load_dataset(args)
    distilled = distill(data, args, path)
    if distilled:
        images, labels = decode(distilled, data.device)
        common.save_grid(path.with_suffix(".png"), data, images[0], columns=10)
        common.score(data, distilled, images, labels, protocol(), args)


if __name__ == "__main__":
    common.run(main)
