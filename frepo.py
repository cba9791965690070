"""FRePo: dataset distillation using neural feature regression (Zhou, Nezhadarya & Ba, NeurIPS 2022; survey Sec. 3.2).

    python frepo.py                                 # glyphs, drawn here: minutes on a CPU
    python frepo.py --dataset cifar10 --ipc 10      # the paper's experiment: 500000 iterations

Training a network on the synthetic set is cut down to its last layer: its features are held fixed and the layer is
solved by kernel ridge regression, in closed form and differentiable. With features f of a network, synthetic images
X_s with learned labels y_s, and a batch of real images X_t with labels y_t,

    L = 1/2 || y_t - K_ts (K_ss + lambda I)^-1 y_s ||^2,     K_ab = f(X_a) f(X_b)^T          (survey Eq. 17)

The features come from a pool of networks that train on the synthetic set as it is: one is drawn in every iteration,
takes one step of its own (Eq. 18), and is thrown away after 100 of them. So the synthetic set meets networks of all
ages. Used afterwards, images and soft labels train a fresh network, by squared error.

What the paper leaves open, as it is done here: batch norm in the pool takes the statistics of the batch at hand,
those of real and of synthetic images apart; a network's own step sees no mirror images and no augmentation; weights
start as LeCun's normal distribution, not truncated; L is a mean over the real images.

Measured (short run, 300 of the paper's 500,000 iterations): 42.3 +- 0.9 % on CIFAR-10 with --ipc 1 --lr 0.01
--iterations 300 --batch-real 512; the paper has 46.8. See the README.
"""
import argparse
import math

import torch
from torch import nn

import common

METHOD = "frepo"
PROTOCOL = common.frepo_protocol  # how a result is scored

# The authors' settings, the same for all of their data sets. zca: whitened after standardising ("trace"). lr, lr_end:
# LAMB's at the start and, after a cosine, at the end, as a share. batch_real: real images an iteration. ridge: lambda in
# parts of trace(K_ss) / n. pool: networks; max_age: steps after which one is thrown away; lr_pool: Adam's for them.
# mirror: X_s and its mirror images go in together (not for digits). weight_margin: of the hinge on labels.
ROW = dict(zca="trace", iterations=500000, lr=3e-4, lr_end=0.1, batch_real=1024, ridge=1e-6, pool=10, max_age=100,
           lr_pool=3e-4, weight_margin=1.)
SETTINGS = {("cifar10", 1): ROW}
SETTINGS[("glyphs", 1)] = ROW | dict(iterations=150, lr=0.01, batch_real=256, pool=4, max_age=30)  # a short run


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020) without weight decay: Adam's update, scaled so that a tensor moves by the share lr of its
    norm in a step."""

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                mean, square = state["mean"].lerp_(p.grad, 1 - first), state["square"].lerp_(p.grad ** 2, 1 - second)
                update = mean / (1 - first ** state["step"])
                update /= (square / (1 - second ** state["step"])).sqrt() + group["eps"]
                size, length = p.norm(), update.norm()
                trust = torch.where((size > 0) & (length > 0), size / length, 1)
                p -= group["lr"] * trust * update


def margin_loss(labels):
    """The hinge that keeps labels (n, C) telling: minus the margin between the two largest, which counts up to 1 / C."""
    largest = labels.topk(2).values
    return -(largest[:, 0] - largest[:, 1]).clamp(max=1 / labels.shape[1]).mean()


def pool_step(net, optimizer, images, labels):
    """Eq. (18): one step of a network of the pool on the synthetic set (at most 500 images of it), squared error."""
    optimizer.zero_grad()  # leaves the other networks without a gradient: Adam passes them over
    (common.squared_error(net(images), labels) / len(images)).backward()
    optimizer.step()


def renew(net, optimizer, *key):
    """Replace a network of the pool by a random one that depends on `key` alone, and forget its Adam state."""
    common.start_anew(net, *key)
    for p in net.parameters():
        optimizer.state.pop(p, None)


def distill(data, ipc, settings, seed, checkpoint):
    """Distil `data` into ipc images a class with soft labels -> (tensors to store, seconds of work).

    checkpoint: a path; a run that was killed goes on from it. Raises common.UserError as common.iterations does."""
    classes, device, steps = len(data.classes), data.device, settings["iterations"]
    images, numbers = data.random_real(ipc, seed, "images")  # synthetic images start from real ones
    labels = common.centre_labels(numbers, classes)          # and their labels from one-hot - 1 / C
    images.requires_grad_()
    labels.requires_grad_()
    lamb = Lamb([images, labels], settings["lr"])
    pool = nn.ModuleList(common.start_anew(common.FRePoNet(data.shape, classes, norm=True).to(device), seed, "pool", k)
                         for k in range(settings["pool"]))
    adam = torch.optim.Adam(pool.parameters(), lr=settings["lr_pool"])
    ages = torch.arange(len(pool)) * settings["max_age"] // len(pool)  # on the host; the first go one after another
    watch = {"loss": torch.zeros(())}

    same = common.identity(METHOD, data, ipc, settings, seed) | {"iterations": steps}  # the cosine hangs on it
    state = {"images": images, "labels": labels, "lamb": lamb, "pool": pool, "adam": adam, "ages": ages}
    for it in common.iterations(steps, checkpoint, same, state, watch):
        k = common.hash_int((seed, "member", it)) % len(pool)
        net = pool[k].requires_grad_(False)
        index = torch.randint(len(data.train), (min(settings["batch_real"], len(data.train)),),
                              generator=common.rng(seed, "real", it, device=device), device=device)
        real_features = common.features(net, data.train[index])                            # f(X_t), no graph
        real_labels = common.targets(data.train_labels[index], classes)

        both, both_labels = images, labels
        if data.flip:
            both, both_labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
        loss = common.nfr_loss(net.features(both), both_labels, real_features, real_labels, settings["ridge"])  # Eq. (17)
        share = (1 + math.cos(math.pi * it / steps)) / 2
        lamb.param_groups[0]["lr"] = settings["lr"] * (settings["lr_end"] + (1 - settings["lr_end"]) * share)
        lamb.zero_grad()
        (loss + settings["weight_margin"] * margin_loss(labels)).backward()
        lamb.step()
        watch["loss"] = loss.detach()

        net.requires_grad_(True)                                                           # the network grows older
        some = common.student_batch(len(images), 500, 0, seed, "pool", it, device=device)
        pool_step(net, adam, images.detach()[some], labels.detach()[some])
        ages[k] += 1
        if ages[k] >= settings["max_age"]:
            renew(net, adam, seed, "renewed", it)
            ages[k] = 0
    return {"images": images.detach(), "labels": labels.detach()}, watch["seconds"]


def distill_to_file(path, data, ipc, settings, seed, data_dir=None):  # nothing is kept under data_dir
    """The whole run: distillation (its checkpoint beside `path`), distilled file `path`, whose settings tell of its
    labels too -> what the file holds. Raises common.UserError."""
    tensors, seconds = distill(data, ipc, settings, seed, path.with_suffix(".ckpt"))
    settings = settings | label_report(tensors["labels"], ipc)
    return common.save_distilled(path, data, METHOD, ipc, tensors, None, settings, seconds, seed,
                                 PROTOCOL(len(tensors["images"])))


sampler = common.image_sampler  # what common.score draws batches from


def label_report(labels, ipc):
    """How soft labels (C * ipc, C) in class order have moved -> dict(labels_moved: root mean square over all numbers;
    label_margin: the mean of the largest minus the next; labels_kept: share whose largest is still their class)."""
    numbers = torch.arange(labels.shape[1], device=labels.device).repeat_interleave(ipc)
    largest = labels.topk(2).values
    found = {"labels_moved": (labels - common.centre_labels(numbers, labels.shape[1])).square().mean().sqrt(),
             "label_margin": (largest[:, 0] - largest[:, 1]).mean(),
             "labels_kept": (labels.argmax(1) == numbers).float().mean()}
    return {name: round(value.item(), 4) for name, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description="Distil a data set by neural feature regression (FRePo).",
                                     formatter_class=common.HelpFormatter)
    common.add_arguments(parser, "ipc", "synthetic images a class")
    add = parser.add_argument
    add("--iterations", type=common.positive, help="distillation iterations (500000)")
    add("--lr", type=common.amount, help="learning rate of images and labels, LAMB (0.0003; more for a short run)")
    add("--batch-real", type=common.positive, help="real images an iteration (1024)")
    add("--ridge", type=common.amount, help="lambda, in parts of trace(K) / n (1e-6)")
    add("--pool", type=common.positive, help="networks in the pool (10)")
    add("--max-age", type=common.positive, help="steps after which a network of the pool is thrown away (100)")
    add("--lr-pool", type=common.amount, help="learning rate of the pool's networks, Adam (0.0003)")
    add("--weight-margin", type=common.amount, help="weight of the hinge on the labels' margin (1)")
    args = parser.parse_args()
    settings = common.merge_settings(common.settings_for(SETTINGS, args.dataset, args.ipc), args)

    path = common.output_path(METHOD, args, f"ipc{args.ipc}")
    data = common.load_dataset(args.dataset, args.data_dir, settings["zca"], args.size, common.pick_device(args.device))
    distilled = distill_to_file(path, data, args.ipc, settings, args.seed)
    print(", ".join(f"{name} {distilled['settings'][name]}" for name in ("labels_moved", "label_margin", "labels_kept")))
    common.save_picture(path.with_suffix(".png"), data, distilled["images"], per_row=min(args.ipc, 10))
    print(f"wrote {path} and {path.with_suffix('.png')}")
    common.score(data, distilled, *sampler(distilled, data.device), args.out, args.epochs, args.runs, args.seed, PROTOCOL)


if __name__ == "__main__":
    common.run(main)
