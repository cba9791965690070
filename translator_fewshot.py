"""Few-shot dataset distillation via translative pre-training (Liu & Wang, ICCV 2023).

    python translator_fewshot.py --mode autoencoder                         # glyphs, drawn here: minutes on a CPU
    python translator_fewshot.py --dataset cifar10 --ipc 1 10 --pretrain-dir imagenet     # the paper's experiment

Distilling in thousands of networks is slow; in a single one it is fast, but the result fits that network alone. So:
distil in one network theta, then translate the images into a space in which they serve any network. With f_theta(X)
the features of a random network, synthetic images X_S with labels Y_S are judged by neural feature regression,

    || f_theta(X_T) w* - Y_T ||^2,   w* = f_theta(X_S)^T (f_theta(X_S) f_theta(X_S)^T)^-1 Y_S          (Eq. 2)

The translator G, an auto-encoder, learns beforehand on subsets of a large data set, distilled in theta and kept, to make
this small in random networks theta' (Alg. 2), and adapts to the target set in some steps more. The large data set is
ImageNet in the paper; here any folder with many classes (--pretrain-dir) or a file of an earlier run (--translator).
--mode picks a column of the paper's Table 3. Used afterwards, images and soft labels train a network as FRePo's do.

"Other hyper-parameters follow FRePo", says the paper, and its supplement is not at hand. As it is done here: Adam on
images and labels (Alg. 2 writes plain gradient descent, FRePo has LAMB), no mirror images and no hinge on labels,
theta and theta' without batch norm, as the network that the result is scored with: an image's features then depend on
nothing but the image, and are computed once. The loss is half the mean over real images, not their sum.

Measured (short runs on CIFAR-10, 1 image a class, pre-trained on Tiny ImageNet): 40.9 +- 0.6 % adapted, 39.7 in one
network; the paper has 44.0 and 35.3. See the README, with commands and all six modes.
"""
import argparse
import copy
import os
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import common

METHOD = "translator_fewshot"
PROTOCOL = common.frepo_protocol  # how a result is scored
MODES = ("one-net", "bilevel", "scratch", "autoencoder", "no-adaptation", "adapted")  # the columns of Table 3

# Table 1: steps T, lr alpha, lr_pretrain eta, subsets N, min_classes and max_classes C_min and C_max, max_images M,
# max_synthetic I_max, batch B, pretrain_steps S, adapt_steps S', lr_adapt eta'. batch_real: real images a step, and
# ridge: lambda in parts of trace / n, are FRePo's; rows: real features looked at in a step of the distillation in one
# network (0: all, as in Alg. 2). inner_steps, lr_inner, outer_steps, lr_outer: the bi-level algorithm's, of which 16
# steps (Sec. 3.3) and alpha are printed: 1e-3 on a sum of squares over 1,024 images is 2 on half their mean. (At that
# rate labels learn and images hardly move; at 10 the loss rises at first.) ae_steps, lr_ae: the auto-encoder's, not
# printed. down_sample: store images at half the side, four times as many ("Ours-DS"): S' is 6,000 then, 15,000 from 50
# images a class on (Sec. 4.2). one-net and bilevel distil for T + S' steps: "all with 4k iterations" (Sec. 4.3).
PAPER = dict(zca="trace", steps=3000, lr=1e-3, lr_pretrain=1e-5, subsets=5000, max_classes=100, min_classes=10,
             max_images=4000, max_synthetic=1000, batch=4, pretrain_steps=200000, adapt_steps=1000, lr_adapt=1e-4,
             batch_real=1024, rows=0, ridge=1e-6, inner_steps=16, lr_inner=2., outer_steps=1000, lr_outer=1e-4,
             ae_steps=2000, lr_ae=1e-3, down_sample=False)
SETTINGS = {("cifar10", 1): PAPER, ("glyphs", 1): PAPER | dict(
    steps=200, lr=0.01, adapt_steps=60, batch_real=256, ae_steps=200, outer_steps=10)}  # a short run


class Translator(nn.Module):
    """G_omega: three blocks of conv 3x3 -> batch norm -> ReLU, and a conv to the image: an auto-encoder, fully
    convolutional, so that the same weights serve all sizes of images (its widths are in a supplement that we do not
    have; no down-sampling here). Batch norm uses the statistics of the set at hand, always. Labels pass unchanged: their
    number varies from set to set. Grey images go in as three equal channels, and the mean of three comes out."""

    def __init__(self, width=64):
        super().__init__()
        blocks, channels = [], 3
        for _ in range(3):
            blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width, track_running_stats=False), nn.ReLU()]
            channels = width
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, images):
        """Images (n, 1 or 3, h, w), preprocessed -> images of the same shape."""
        translated = self.blocks(images.expand(-1, 3, -1, -1))
        return translated if images.shape[1] == 3 else translated.mean(1, keepdim=True)


def embed(net, images, size):
    """f_theta: stored images (n, c, h, w), enlarged bilinearly to side `size` where they are smaller ("DS") -> features
    (n, F), with a graph."""
    if images.shape[-1] != size:
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return torch.cat([net.features(x) for x in images.split(common.chunk_size(images))])


# ------------------------------------------------------------------------------------------ distil in one network

def start_synthetic(data, ipc, settings, *key):
    """Synthetic images and soft labels to start from: random real ones (Alg. 2, line 4); four times as many at half the
    side with down_sample. -> images (C * ipc, c, h, w), labels (C * ipc, C), in class order."""
    members, smallest = common.class_members(data)
    per_class = ipc * (4 if settings["down_sample"] else 1)
    if per_class > smallest:
        raise common.UserError(f"{per_class} images a class were asked for, but the smallest class of {data.name} has "
                               f"{smallest}: choose a number from 1 to that")
    return to_synthetic(data, common.draw_members(members, per_class, *key), settings)


def to_synthetic(data, index, settings):
    """Training images `index` as synthetic images, at half the side with down_sample, and their soft labels."""
    images = F.avg_pool2d(data.train[index], 2) if settings["down_sample"] else data.train[index]
    return images, common.centre_labels(data.train_labels[index], len(data.classes))


def distil_in_one_network(net, images, labels, real_features, real_labels, settings, size, key, checkpoint=None, same=None):
    """Alg. 2, lines 6 to 10: T steps (Adam) on images and labels in the one network -> (images, labels, seconds).

    real_features (m, F) and real_labels (m, C) were computed once (line 5): no real image is looked at in here.
    checkpoint: a path and `same` its settings, for long runs; none for subsets."""
    images, labels = images.clone().requires_grad_(), labels.clone().requires_grad_()
    adam = torch.optim.Adam([images, labels], lr=settings["lr"])
    watch, device = {"loss": torch.zeros(()), "seconds": 0.}, images.device
    state = {"images": images, "labels": labels, "adam": adam}
    loop = range(settings["steps"]) if checkpoint is None else common.iterations(
        settings["steps"], checkpoint, same, state, watch)
    for t in loop:
        x, y = real_features, real_labels
        if 0 < settings["rows"] < len(x):
            some = torch.randint(len(x), (settings["rows"],), generator=common.rng(*key, "rows", t, device=device),
                                 device=device)
            x, y = x[some], y[some]
        loss = common.nfr_loss(embed(net, images, size), labels, x, y, settings["ridge"])      # Eq. (2), line 7
        adam.zero_grad()
        loss.backward()
        adam.step()                                                                            # lines 8 and 9
        watch["loss"] = loss.detach()
    return images.detach(), labels.detach(), watch["seconds"]


# ------------------------------------------------------------------------------------------ caching

def draw_subset(members, smallest, settings, n, seed):
    """Subset n of the large data set (Sec. 4.1, "Pre-Training"), whose `members` and smallest class are those of
    common.class_members -> its classes' numbers, indices of its training images (in class order, k a class), k, and
    synthetic images a class."""
    draw = common.rng(seed, "subset", n)
    low, high = (min(settings[name], len(members)) for name in ("min_classes", "max_classes"))
    count = torch.randint(low, high + 1, (), generator=draw).item()
    classes = torch.randperm(len(members), generator=draw)[:count]
    k = max(1, min(settings["max_images"] // count, smallest))
    most = max(1, min(settings["max_synthetic"] // count, k))
    ipc = torch.randint(1, most + 1, (), generator=draw).item()
    index = common.draw_members(members[classes.to(members.device)], k, seed, "subset", n)
    return classes, index, k, ipc


def cache_subsets(net, data, folder, settings, seed):
    """Distil N random subsets in the one network, one file each in `folder`, those that are there left alone -> their
    paths. Several processes may fill it: each begins somewhere else. Raises common.UserError."""
    paths = [folder / f"seed{seed}_subset{n:05d}.pt" for n in range(settings["subsets"])]
    progress, size, members = common.Progress(len(paths), "subsets"), data.shape[-1], common.class_members(data)
    for n in (torch.arange(len(paths)) + os.getpid()).remainder(len(paths)).tolist():
        if paths[n].exists():
            progress.skip(1)
            continue
        classes, index, k, ipc = draw_subset(*members, settings, n, seed)
        numbers = torch.arange(len(classes), device=data.device).repeat_interleave(k)
        real = data.train[index]
        # DSA "to mimic larger data sets": every image a second time, transformed; features stay computed once.
        augmented = [common.dsa(x, *common.draw_dsa(len(x), seed, n, i, device=data.device, flip=data.flip))
                     for i, x in enumerate(real.split(128))]
        real_features = common.features(net, torch.cat([real, *augmented]))
        chosen = torch.arange(len(numbers), device=data.device).view(-1, k)[:, :ipc].flatten()  # the first ipc of a class
        labels = common.centre_labels(numbers[chosen], len(classes))
        images, labels, _ = distil_in_one_network(net, real[chosen], labels, real_features,
                                                  common.targets(numbers, len(classes)).repeat(2, 1), settings, size, (seed, n))
        if not images.isfinite().all():
            raise common.UserError(f"subset {n} is not finite after its distillation: take a smaller --lr")
        common.save({"index": index.cpu(), "k": k, "images": images.cpu(), "labels": labels.cpu()}, paths[n])
        progress(1)
    progress.end()
    return paths


# ------------------------------------------------------------------------------------------ pre-training, adaptation

def translation_loss(translator, net, images, labels, real, real_labels, settings, size):
    """Alg. 2, lines 11, 13 and 14: the NFR loss of translated images in a random network theta' = `net`."""
    support = embed(net, translator(images), size)
    return common.nfr_loss(support, labels, common.features(net, real), real_labels, settings["ridge"])


def pretrain(net, data, paths, settings, seed, checkpoint, same):
    """Alg. 2 on cached subsets: S steps with batches of B of them -> Translator."""
    translator = common.seeded((seed, "translator"), Translator).to(data.device)             # line 1
    adam = torch.optim.Adam(translator.parameters(), lr=settings["lr_pretrain"])
    watch, device, theta = {"loss": torch.zeros(())}, data.device, copy.deepcopy(net)
    for i in common.iterations(settings["pretrain_steps"], checkpoint, same, {"translator": translator, "adam": adam}, watch):
        common.start_anew(theta, seed, "theta'", i)                                          # line 12
        adam.zero_grad()
        loss = 0
        for b in range(settings["batch"]):
            path = paths[common.hash_int((seed, "cached", i, b)) % len(paths)]               # lines 3 to 10
            cached = {name: value.to(device) if torch.is_tensor(value) else value
                      for name, value in common.load(path, "a cached subset").items()}
            classes = cached["labels"].shape[1]
            some = torch.randint(len(cached["index"]), (min(settings["batch_real"], len(cached["index"])),),
                                 generator=common.rng(seed, "real", i, b, device=device), device=device)
            part = translation_loss(translator, theta, cached["images"], cached["labels"], data.train[cached["index"][some]],
                                    common.targets(some // cached["k"], classes), settings, data.shape[-1]) / settings["batch"]
            part.backward()
            loss = loss + part.detach()
        adam.step()                                                                          # line 15
        watch["loss"] = loss
    return translator


def train_autoencoder(data, settings, seed, checkpoint, same):
    """The "w AE" row of Table 3: the translator learns to give real images back -> Translator."""
    translator = common.seeded((seed, "translator"), Translator).to(data.device)
    adam = torch.optim.Adam(translator.parameters(), lr=settings["lr_ae"])
    watch, device = {"loss": torch.zeros(())}, data.device
    for i in common.iterations(settings["ae_steps"], checkpoint, same, {"translator": translator, "adam": adam}, watch):
        images = data.train[torch.randint(len(data.train), (128,), generator=common.rng(seed, "ae", i, device=device),
                                          device=device)]
        loss = F.mse_loss(translator(images), images)
        adam.zero_grad()
        loss.backward()
        adam.step()
        watch["loss"] = loss.detach()
    return translator


def adapt(translator, net, data, distilled, settings, seed, checkpoint):
    """Lines 11 to 15 of Alg. 2 on the target set, S' steps -> seconds of work; the translator is changed in place.

    distilled: [(images, labels)] of the target set in the one network, for one or several budgets, taken in turn: the
    translator then serves budgets between them too (Sec. 4.3)."""
    adam = torch.optim.Adam(translator.parameters(), lr=settings["lr_adapt"])
    watch, device, theta = {"loss": torch.zeros(())}, data.device, copy.deepcopy(net)
    count = min(settings["batch_real"], len(data.train))
    used = {name: settings[name] for name in ("lr_adapt", "batch_real", "ridge")} | {
        "translator": norm_of(translator), "images": [images.double().norm().item() for images, _ in distilled]}
    same = common.identity("adaptation", data, "", used, seed)
    for i in common.iterations(settings["adapt_steps"], checkpoint, same, {"translator": translator, "adam": adam}, watch):
        common.start_anew(theta, seed, "adaptation", i)
        some = torch.randint(len(data.train), (count,), generator=common.rng(seed, "adapt", i, device=device), device=device)
        images, labels = distilled[i % len(distilled)]
        loss = translation_loss(translator, theta, images, labels, data.train[some],
                                common.targets(data.train_labels[some], len(data.classes)), settings, data.shape[-1])
        adam.zero_grad()
        loss.backward()
        adam.step()
        watch["loss"] = loss.detach()
    return watch["seconds"]


# ------------------------------------------------------------------------------------------ the bi-level algorithm

def bilevel_gradient(net, theta, images, labels, real, real_labels, settings, size):
    """Alg. 1, lines 4 to 13: T steps of plain gradient descent on images and labels in `net`, judged in `theta`; the
    gradient with respect to net's parameters is added to their .grad. -> loss, 0-d.

    The steps are gone through backwards one at a time, as in common.match_trajectory: only images and labels of each
    step are kept, where the paper's memory (16 steps in 40 GB) grows with T."""
    real_features = net.features(real)                                                       # line 4
    leaf, lr = real_features.detach().requires_grad_(), settings["lr_inner"]
    parameters = list(net.blocks.parameters())

    def inner(x, y, create_graph=False):                                                     # lines 6 to 8
        loss = common.nfr_loss(embed(net, x, size), y, leaf, real_labels, settings["ridge"])
        return torch.autograd.grad(loss, (x, y), create_graph=create_graph)

    steps = [(images.detach().requires_grad_(), labels.detach().requires_grad_())]
    for _ in range(settings["inner_steps"]):
        moved = [(tensor - lr * g).detach().requires_grad_() for tensor, g in zip(steps[-1], inner(*steps[-1]))]
        steps.append(tuple(moved))
    loss = common.nfr_loss(embed(theta, steps[-1][0], size), steps[-1][1], common.features(theta, real), real_labels,
                           settings["ridge"])                                                # lines 11 to 13
    adjoint = torch.autograd.grad(loss, steps.pop())
    sums = [torch.zeros_like(p) for p in (leaf, *parameters)]
    for x, y in reversed(steps):
        products = torch.autograd.grad(inner(x, y, create_graph=True), (x, y, leaf, *parameters), [-lr * a for a in adjoint])
        adjoint = [a + p for a, p in zip(adjoint, products)]
        for total, product in zip(sums, products[2:]):
            total += product
    for p, total, through in zip(parameters, sums[1:], torch.autograd.grad(real_features, parameters, sums[0])):
        p.grad = total + through if p.grad is None else p.grad + total + through
    return loss.detach()


def learn_distillation_space(net, data, ipc, settings, seed, checkpoint):
    """Alg. 1: the parameters of `net` become those of a distillation space, in place -> seconds of work."""
    net.requires_grad_(True)
    adam = torch.optim.Adam(net.blocks.parameters(), lr=settings["lr_outer"])
    watch, device, theta = {"loss": torch.zeros(())}, data.device, copy.deepcopy(net).requires_grad_(False)
    count, (members, _) = min(settings["batch_real"], len(data.train)), common.class_members(data)
    per_class = ipc * (4 if settings["down_sample"] else 1)
    used = {name: settings[name] for name in ("inner_steps", "lr_inner", "lr_outer", "batch_real", "ridge", "down_sample")}
    same = common.identity("bilevel", data, ipc, used, seed)
    for i in common.iterations(settings["outer_steps"], checkpoint, same, {"net": net, "adam": adam}, watch):
        index = common.draw_members(members, per_class, seed, "synthetic", i)                # line 3
        images, labels = to_synthetic(data, index, settings)
        some = torch.randint(len(data.train), (count,), generator=common.rng(seed, "bilevel", i, device=device), device=device)
        common.start_anew(theta, seed, "theta'", i)                                          # line 10
        adam.zero_grad()
        watch["loss"] = bilevel_gradient(net, theta, images, labels, data.train[some],
                                         common.targets(data.train_labels[some], len(data.classes)), settings,
                                         data.shape[-1])
        adam.step()                                                                          # line 13
    net.requires_grad_(False)
    return watch["seconds"]


# ------------------------------------------------------------------------------------------ the whole of it

def distill(data, ipcs, settings, seed, mode, translator, checkpoint):
    """Distil `data` for every budget of the list `ipcs` -> ({ipc: tensors to store}, seconds of work without
    pre-training). translator: a Translator to start from, or None with the modes that have none.

    checkpoint(name) -> path of the checkpoint of a part; a run that was killed goes on from them, and all modes share
    that of the one network. Raises common.UserError as common.iterations does."""
    net, seconds = one_network(data), 0.
    if mode == "bilevel":
        if len(ipcs) > 1:
            raise common.UserError("--mode bilevel learns a network for one budget: give one --ipc")
        seconds += learn_distillation_space(net, data, ipcs[0], settings, seed,
                                            checkpoint(f"ipc{ipcs[0]}_space{'_ds' * settings['down_sample']}"))
    real_features, real_labels = common.features(net, data.train), common.targets(data.train_labels, len(data.classes))
    if mode in ("one-net", "bilevel"):
        settings = settings | {"steps": settings["steps"] + settings["adapt_steps"]}
    name = f"{'_ds' * settings['down_sample']}_{settings['steps']}"
    found = {}
    for ipc in ipcs:
        used = {name: settings[name] for name in ("lr", "rows", "ridge", "down_sample")} | {"net": norm_of(net)}
        path = checkpoint(f"ipc{ipc}_{'bilevel' if mode == 'bilevel' else 'one-net'}{name}")
        images, labels = start_synthetic(data, ipc, settings, seed, "images")
        *found[ipc], spent = distil_in_one_network(
            net, images, labels, real_features, real_labels, settings, data.shape[-1], (seed, "one network"), path,
            common.identity(METHOD, data, ipc, used, seed))
        seconds += spent
    if translator is not None:
        if mode != "no-adaptation":
            seconds += adapt(translator, net, data, list(found.values()), settings, seed,
                             checkpoint(f"ipc{'-'.join(map(str, ipcs))}_{mode}{name}"))
        with torch.no_grad():
            found = {ipc: (translator(images), labels) for ipc, (images, labels) in found.items()}  # line 11
    return {ipc: {"images": images, "labels": labels} for ipc, (images, labels) in found.items()}, seconds


def distill_to_file(path, data, ipc, settings, seed, data_dir=None):
    """What evaluate.py --continual runs, one budget: adapted with the translator of the file settings["translator"], or,
    where that is None, in one network for T + S' steps; checkpoints lie beside the distilled file `path` -> what the
    file holds. Raises common.UserError."""
    translator, mode = None, "one-net"
    if settings["translator"]:
        translator, mode = load_translator(settings["translator"], data, "adapted").to(data.device), "adapted"
    found, seconds = distill(data, [ipc], settings, seed, mode, translator,
                             lambda name: path.with_name(f"{path.stem}_{name}.ckpt"))
    return common.save_distilled(path, data, METHOD, ipc, found[ipc], None, settings, seconds, seed,
                                 PROTOCOL(len(found[ipc]["images"])))


def norm_of(module):
    """One number that tells apart different parameters: for checkpoints."""
    return common.flat_parameters(module).double().norm().item()


def one_network(data):
    """The arbitrary but fixed network theta, the same for all data sets with images of this shape, on all devices."""
    net = common.start_anew(common.FRePoNet(data.shape, len(data.classes)), "theta")  # drawn on the CPU
    return net.requires_grad_(False).to(data.device)


def prepare_translator(data, args, settings, device):
    """The translator that --mode asks for, before adaptation -> Translator or None. Pre-trained ones are kept under
    --data-dir and found again; their subsets too. Raises common.UserError."""
    mode, seed = args.mode, args.seed
    if mode in ("one-net", "bilevel"):
        return None
    if mode == "scratch":
        return common.seeded((seed, "translator"), Translator).to(device)
    if args.translator:
        return load_translator(args.translator, data, mode).to(device)
    if not args.pretrain_dir and mode != "autoencoder":
        raise common.UserError(f"--mode {mode} takes a translator that was trained beforehand: give --pretrain-dir (a folder "
                               "of images with many classes; ImageNet in the paper) or --translator, or take --mode "
                               "autoencoder or scratch")
    large = data if not args.pretrain_dir else common.load_dataset(
        args.pretrain_dir, args.data_dir, settings["zca"] if data.preprocess.whiten is not None else False,
        args.size or data.shape[-1], device)
    learning = ("ae_steps", "lr_ae") if mode == "autoencoder" else ("pretrain_steps", "lr_pretrain", "batch", "batch_real")
    caching = () if mode == "autoencoder" else ("steps", "lr", "rows", "ridge", "max_classes", "min_classes", "max_images",
                                                "max_synthetic")
    cached = common.identity("translator" if caching else "autoencoder", large, "", {name: settings[name] for name in caching}, seed)
    same = cached | {name: settings[name] for name in learning + ("subsets",) * bool(caching)}
    folder = pathlib.Path(args.data_dir) / "translators"
    path = folder / f"{large.name}_{same['method']}_{tag(same)}.pt"
    if not path.exists():
        if caching:
            net = one_network(large)
            paths = cache_subsets(net, large, folder / f"{large.name}_subsets_{tag(cached)}", settings, seed)
            translator = pretrain(net, large, paths, settings, seed, path.with_suffix(".ckpt"), same)
        else:
            translator = train_autoencoder(large, settings, seed, path.with_suffix(".ckpt"), same)
        common.save({"format": "translator 1", "weights": translator.state_dict(), "pretrained_on": large.name,
                     "settings": same}, path)
        print(f"wrote {path}, which --translator takes")
    return load_translator(path, data, mode).to(device)


def tag(settings):
    """A short name for settings: 8 hexadecimal digits."""
    return f"{common.hash_int(sorted(settings.items())) >> 31:08x}"


def load_translator(path, data, mode):
    """The Translator of a file that prepare_translator wrote, for `data`. Raises common.UserError."""
    stored, translator = common.load(path, "a pre-trained translator"), Translator()
    if stored.get("format") != "translator 1":
        raise common.UserError(f"{path} is not a translator of this project: give a file that translator_fewshot.py wrote")
    if (stored["settings"]["method"] == "autoencoder") != (mode == "autoencoder") \
            or stored["settings"]["fingerprint"].rpartition("-")[0] != data.preprocess.kind:
        raise common.UserError(f"{path} was trained as {stored['settings']['method']} on images preprocessed as "
                               f"{stored['settings']['fingerprint'].rpartition('-')[0]}: it does not fit --mode {mode} and "
                               f"{data.name} ({data.preprocess.kind}); give another")
    translator.load_state_dict(stored["weights"])
    translator.pretrained_on = stored["pretrained_on"]
    return translator


def sampler(distilled, device):
    """What common.score draws batches from: (draw(run, index, *key) -> images, labels; number of entries)."""
    if distilled["settings"]["down_sample"]:
        images = F.interpolate(distilled["images"], size=distilled["shape"][-1], mode="bilinear", align_corners=False)
        distilled = distilled | {"images": images}
    return common.image_sampler(distilled, device)


def variant(settings):
    """What the results call a file: its mode, e.g. "adapted", and "ds" where images are stored down-sampled."""
    return settings.get("mode", "adapted" if settings.get("translator") else "one-net") + " ds" * settings["down_sample"]


def main():
    parser = argparse.ArgumentParser(description="Distil a data set in one network, then translate.",
                                     formatter_class=common.HelpFormatter)
    common.add_arguments(parser, "ipc", "images a class; several: one adaptation for all", several=True)
    add = parser.add_argument
    add("--mode", choices=MODES, default="adapted", help="a column of Table 3 (adapted)")
    add("--pretrain-dir", help="a folder of images with many classes to pre-train on (ImageNet in the paper)")
    add("--translator", help="a pre-trained translator, in place of --pretrain-dir")
    add("--down-sample", action="store_true", default=None, help="store images at half the side, four times as many (off)")
    add("--steps", type=common.positive, help="T: steps in the one network (3000)")
    add("--lr", type=common.amount, help="alpha: learning rate of images and labels, Adam (0.001)")
    add("--rows", type=lambda text: common.positive(text) if text != "0" else 0, help="real features looked at in a step (0: all)")
    add("--adapt-steps", type=common.positive, help="S': adaptation steps (1000; with --down-sample 6000 or 15000)")
    add("--lr-adapt", type=common.amount, help="eta': its learning rate (0.0001)")
    add("--batch-real", type=common.positive, help="real images in a step of (pre-)training (1024)")
    add("--subsets", type=common.positive, help="N: cached subsets (5000)")
    add("--max-classes", type=common.positive, help="C_max: classes of a subset, at most (100)")
    add("--max-images", type=common.positive, help="M: images of a subset, at most (4000)")
    add("--max-synthetic", type=common.positive, help="I_max: synthetic images of a subset, at most (1000)")
    add("--batch", type=common.positive, help="B: subsets in a step of pre-training (4)")
    add("--pretrain-steps", type=common.positive, help="S: pre-training steps (200000)")
    add("--lr-pretrain", type=common.amount, help="eta: its learning rate (0.00001)")
    add("--outer-steps", type=common.positive, help="steps of the bi-level algorithm, Alg. 1 (1000)")
    add("--ae-steps", type=common.positive, help="steps of the auto-encoder (2000)")
    args = parser.parse_args()
    settings = common.merge_settings(common.settings_for(SETTINGS, args.dataset, args.ipc[0]), args)
    if args.down_sample and not args.adapt_steps:
        settings["adapt_steps"] *= 15 if max(args.ipc) >= 50 else 6

    kind = f"{METHOD}_{args.mode}{'_ds' * bool(args.down_sample)}"
    paths = {ipc: common.output_path(kind, args, f"ipc{ipc}") for ipc in args.ipc}
    device = common.pick_device(args.device)
    data = common.load_dataset(args.dataset, args.data_dir, settings["zca"], args.size, device)
    for ipc in args.ipc:
        start_synthetic(data, ipc, settings, 0)  # enough images in every class? before the hours of pre-training
    translator = prepare_translator(data, args, settings, device)
    found, seconds = distill(data, args.ipc, settings, args.seed, args.mode, translator,
                             lambda name: common.output_path(METHOD, args, name).with_suffix(".ckpt"))
    for ipc, tensors in found.items():
        path, stored = paths[ipc], settings | {"mode": args.mode, "pretrained_on": getattr(translator, "pretrained_on", None)}
        stored["iterations"] = settings["steps"] + settings["adapt_steps"] * (args.mode != "no-adaptation")
        count = len(tensors["images"])
        distilled = common.save_distilled(path, data, METHOD, ipc, tensors, None, stored, seconds, args.seed, PROTOCOL(count))
        draw, count = sampler(distilled, device)
        entries, _ = draw(0, torch.arange(count))
        common.save_picture(path.with_suffix(".png"), data, entries, per_row=min(count // len(data.classes), 10))
        print(f"wrote {path} and {path.with_suffix('.png')}")
        common.score(data, distilled, draw, count, args.out, args.epochs, args.runs, args.seed, PROTOCOL,
                     more={"variant": variant(stored)})


if __name__ == "__main__":
    common.run(main)
