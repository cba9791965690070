"""Train networks on distilled sets and core-sets, score them, save them, export pictures.

    python evaluate.py out/dm_cifar10_ipc10.pt --network convnet resnet18 vgg11 --epochs 300 1000
    python evaluate.py --coreset random herding k-center forgetting whole --dataset cifar10 --ipc 10
    python evaluate.py --tensors images.pt labels.pt --protocol mtt --dataset cifar10 --zca

Scores are lines of OUT/results.jsonl, each with that of random real images of the same storage. The
training protocol is the method's, with the network of --network. In Python: train_network,
training_set, classify.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import pathlib
import re
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms.functional import gaussian_blur, rgb_to_grayscale, to_pil_image

import common

METHODS = ("mtt", "dm", "haba", "kfs", "frepo", "translator_fewshot")
NETWORKS = "convnet alexnet vgg11 resnet10 resnet18 densenet121"
CORESETS = ("random", "herding", "k-center", "forgetting", "whole")
# Epochs of the ConvNet that selects core-sets; of --coreset whole
FEATURE_EPOCHS = 20
WHOLE_EPOCHS = 30


# ------------------------------------------------------------ distilled files


def train_network(path, network="", seed=0, epochs=0, **flags):
    """Train a network on any method's file by its protocol -> network, test accuracy in %.

    network: as --network, "": the method's; epochs 0: the method's; flags: those of this script,
    e.g. data_dir="data". The network takes images that were preprocessed as the file says.
    """
    args = parse([str(path), "--network", network])
    vars(args).update(flags, seed=seed, epochs=[epochs])
    (job,) = jobs(args)
    data, distilled, images, labels, protocol, options = job
    return common.train_and_test(data, images, labels, protocol, options, distilled["step_size"])


def training_set(path):
    """Training images of a distilled file of any method, on the CPU. Raises UserError.

    -> images (N, c, h, w), preprocessed as info["preprocess"] says, all variants of HaBa's; labels
    (N,) or soft (N, C); info: all else but tensors (method, dataset, classes, step_size, ...).
    """
    distilled = read_distilled(path)
    images, labels = decode(distilled)
    info = {key: value for key, value in distilled.items() if not torch.is_tensor(value)}
    return images.flatten(0, 1), torch.cat([labels] * len(images)), info


def read_distilled(path):
    """Load a distilled file -> its content, a dict. Raises UserError."""
    needed = ("shape", "classes", "fingerprint", "test_fingerprint", "settings", "evaluations")
    distilled = common.load(path, "a distilled file of these scripts", "method", *needed)
    if distilled["method"] not in METHODS:
        raise common.UserError(f"{path} is of {distilled['method']}, which is not in METHODS")
    return distilled


def decode(distilled, device="cpu"):
    """All images of a distilled file (V, n, c, h, w), labels (n,) or soft (n, C)."""
    images = distilled.get("images")
    if images is not None and list(images.shape[1:]) == distilled["shape"]:
        return images[None].to(device), distilled["labels"].to(device)
    return importlib.import_module(distilled["method"]).decode(distilled, device)


def open_file(path, args):
    """Load a distilled file and its data set -> the arguments of common.score but the last."""
    distilled = read_distilled(path)
    method = importlib.import_module(distilled["method"])
    settings = method.Args(**distilled["settings"])
    name, size = args.dataset or settings.dataset, args.size or settings.size
    data = load_data(method, name, size, settings.zca, settings.flip, args.data_dir, args.device)
    ours = data.shape, data.classes, data.fingerprint
    theirs = tuple(distilled["shape"]), distilled["classes"], distilled["fingerprint"]
    for what, one, other in zip(("shape", "classes", "training images"), ours, theirs, strict=True):
        if one != other:
            raise common.UserError(f"{path}: {what} of {name} differ: see --dataset, --size")
    if data.test_fingerprint != distilled["test_fingerprint"]:
        print(f"{path}: the test images of {name} are not those of the distillation")
    return data, distilled, *decode(distilled, data.device), method.protocol(settings)


@functools.lru_cache
def load_data(method, dataset, size, zca, flip, data_dir, device):
    """common.load_dataset, once for all files of a data set."""
    args = method.Args(
        dataset=dataset, size=size, zca=zca, flip=flip, data_dir=data_dir, device=device
    )
    return common.load_dataset(args, common.setup(args))


def join_files(paths, args):
    """Join sets of the same classes, by the protocol of the first -> as open_file."""
    sets = [open_file(path, args) for path in paths]
    data, first, _, _, protocol = sets[0]
    for path, (other, *_, rule) in zip(paths, sets, strict=True):
        if (other.fingerprint, type(rule)) != (data.fingerprint, type(protocol)):
            raise common.UserError(f"{path} has other data or another loss than {paths[0]}")
    images = [images.flatten(0, 1) for _, _, images, _, _ in sets]
    labels = []
    for (*_, own, _), part in zip(sets, images, strict=True):
        own = own if own.ndim == 2 else protocol.soft_labels(own, len(data.classes))
        labels.append(own.repeat(len(part) // len(own), 1))
    joint = first | {"evaluations": []}
    joint["method"] = "+".join(distilled["method"] for _, distilled, *_ in sets)
    for name in ("per_class", "stored_per_class"):
        joint[name] = sum(distilled[name] for _, distilled, *_ in sets)
    rates = [distilled["step_size"] or protocol.lr for _, distilled, *_ in sets]
    joint["step_size"] = sum(rates) / len(rates)
    return data, joint, torch.cat(images)[None], torch.cat(labels), protocol


# ------------------------------------------------------------ other people's tensors


def open_tensors(paths, args):
    """Make a distilled file of other people's images and labels -> its path. Raises UserError.

    Images (n, c, h, w), (n, h, w, c) or (C, n, c, h, w); labels: numbers, one-hot or soft, else
    class after class; or a folder <class>/*. Preprocessed like args.dataset with --zca or not, or
    --pixels.
    """
    method = importlib.import_module(args.protocol)
    data = load_data(
        method, args.dataset, args.size, args.zca, args.flip, args.data_dir, args.device
    )
    count = len(data.classes)
    pixels = args.pixels
    if pathlib.Path(paths[0]).is_dir():
        names, samples = common.list_images(pathlib.Path(paths[0]))
        if not set(names) <= set(data.classes):
            raise common.UserError(f"{paths[0]} has other classes than {data.name}: {names[:5]}")
        images = common.to_pixels((common.open_image(path) for path, _ in samples), data.shape[1])
        images = images[:, : data.shape[0]]
        labels = torch.tensor([data.classes.index(names[c]) for _, c in samples])
        pixels = True
    else:
        images, *labels = [part for path in paths for part in read_tensors(path)]
        labels = labels[0] if labels else None
    if images.ndim == 5:
        images = images.flatten(0, 1)
    if images.ndim == 4 and images.shape[3] == data.shape[0]:
        images = images.permute(0, 3, 1, 2)
    if tuple(images.shape[1:]) != data.shape:
        raise common.UserError(f"images of {tuple(images.shape)} do not fit {data.shape}")
    images = images.float()
    if pixels:
        images = data.preprocess(images if images.max() > 1 else images * 255)
    if labels is None:
        labels = torch.arange(count).repeat_interleave(len(images) // count)
    if labels.ndim == 2 and ((labels == 0) | (labels == 1)).all():
        labels = labels.argmax(1)
    labels = labels.float() if labels.ndim == 2 else labels.long()
    fits = labels.shape in ((len(images),), (len(images), count))
    if not fits or (labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < count):
        raise common.UserError(f"labels of {tuple(labels.shape)} for {len(images)} images")
    if args.step_size is None and hasattr(method.Args, "step_size"):
        raise common.UserError(
            "--protocol mtt and haba need --step-size, the learned one (or 0.01)"
        )

    ours, real = (f"{x.mean():.2f} +- {x.std():.2f}" for x in (images, data.train))
    print(f"the tensors: {ours}; real images, preprocessed alike: {real}")
    ratio = (images.std() / data.train.std()).item()
    if not 1 / 3 < ratio < 3 or (images.mean() - data.train.mean()).abs() > data.train.std():
        print("these are far apart: are --zca, --pixels, --dataset and --protocol right?")
    settings = {"dataset": args.dataset, "size": args.size, "zca": args.zca, "flip": args.flip}
    settings |= {method.Args.budget: len(images) // count, "iterations": 0}
    run = argparse.Namespace(record={"seconds": 0.0, "evaluations": []})
    path = pathlib.Path(args.out) / f"{pathlib.Path(paths[0]).stem}_{args.protocol}.pt"
    tensors = {"images": images, "labels": labels}
    common.save_distilled(path, data, method.Args(**settings), tensors, run, args.step_size)
    return path


def read_tensors(path):
    """Read a tensor, an array, or the first [images, labels] under "data" -> list of tensors."""
    if str(path).endswith(".npy"):
        try:
            return [torch.from_numpy(np.load(path))]
        except (OSError, ValueError) as error:
            raise common.UserError(f"{path} cannot be read ({error})") from None
    try:
        content = torch.load(path, "cpu", weights_only=True)
    except Exception:
        how = "torch.save(images.cpu(), FILE), torch.save(labels.cpu(), FILE)"
        raise common.UserError(
            f"{path} holds more than tensors: save them again by {how}"
        ) from None
    if isinstance(content, dict):
        content = content.get("data", [[]])[0]
    content = content if isinstance(content, list | tuple) else [content]
    if not content or not all(map(torch.is_tensor, content)):
        raise common.UserError(
            f'{path} has no tensors, or a dict without [images, labels] in "data"'
        )
    return list(content)


# ------------------------------------------------------------ networks

# Convolutions: width, kernel size, whether a 2x2 max pool follows
PLANS = {
    "alexnet": ((128, 5, 1), (192, 5, 1), (256, 3, 0), (192, 3, 0), (192, 3, 1)),
    "vgg11": ((64, 3, 1), (128, 3, 1), (256, 3, 0), (256, 3, 1)) + ((512, 3, 0), (512, 3, 1)) * 2,
}


def build_network(name, shape, classes):
    """Build a network for images of `shape` (c, h, w); `.kind` is its name. Raises UserError.

    In the field's form for small images, with instance norm; parameters for 3x32x32, 10 classes:
    convnet 320,010; alexnet (no norm) 1,872,202; vgg11 9,231,114; resnet10 4,903,242; resnet18
    11,173,962; densenet121 6,956,426. Any other name is torchvision's model, unchanged.
    """
    if re.fullmatch(r"(frepo-)?convnet\d*", name):
        return common.ConvNet(shape, classes, frepo=name.startswith("frepo"))
    if name in PLANS:
        net = build_stack(name, shape[0], classes)
    elif name == "resnet10":
        net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    elif name in torchvision.models.list_models(torchvision.models):
        net = torchvision.models.get_model(name, num_classes=classes)
    else:
        raise common.UserError(f"no network {name}: use {NETWORKS} or torchvision's")
    if name in ("resnet10", "resnet18", "densenet121"):
        net = adapt_to_small_images(net, shape[0])
    if shape[-1] == 28:
        # 32x32, as in ConvNet
        net = nn.Sequential(nn.ZeroPad2d(2), net)
    net.kind = name
    return net


def build_stack(name, channels, classes):
    """AlexNet of DC's code (no norm; a linear layer on 4x4 maps), or VGG11 (on their mean)."""
    layers = []
    for width, kernel, pool in PLANS[name]:
        convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        norm = nn.GroupNorm(width, width) if name == "vgg11" else nn.Identity()
        layers += [convolution, norm, nn.ReLU(), nn.MaxPool2d(2) if pool else nn.Identity()]
        channels = width
    side = 4 if name == "alexnet" else 1
    head = [nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(channels * side**2, classes)]
    return nn.Sequential(*layers, *head)


def adapt_to_small_images(net, channels):
    """Replace the 7x7 stem by 3x3, batch norm by instance norm, and drop max pooling -> net."""
    for name, layer in net.named_children():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (7, 7):
            layer = nn.Conv2d(channels, layer.out_channels, 3, padding=1, bias=False)
        elif isinstance(layer, nn.Conv2d):
            # torch's default initialization, as in DC's code
            layer.reset_parameters()
        elif isinstance(layer, nn.BatchNorm2d):
            layer = nn.GroupNorm(layer.num_features, layer.num_features)
        elif isinstance(layer, nn.MaxPool2d):
            layer = nn.Identity()
        setattr(net, name, adapt_to_small_images(layer, channels))
    return net


def save_network(folder, job, k, net, accuracy):
    """Write network k of a job with all that `classify` needs, e.g. to dm_cifar10_1_vgg11_0.pt."""
    data, distilled = job[:2]
    names = distilled["method"], data.name, distilled["per_class"], net.kind, job[-1].epochs, k
    path = pathlib.Path(folder) / ("_".join(map(str, names)) + ".pt")
    preprocess = {name: value for name, value in vars(data.preprocess).items() if value is not None}
    content = {"network": net.kind, "classes": data.classes, "shape": list(data.shape)}
    content |= {"preprocess": preprocess, "weights": net.state_dict(), "accuracy": accuracy}
    common.save(content, path)
    print(f"wrote {path}: {accuracy:.2f} %")


@torch.no_grad()
def classify(network_file, *pictures):
    """Names of the classes of pictures, by a network of --save; cropped and resized to its size."""
    names = ("network", "classes", "shape", "preprocess", "weights")
    stored = common.load(network_file, "a network of evaluate.py --save", *names)
    net = build_network(stored["network"], stored["shape"], len(stored["classes"]))
    net.load_state_dict(stored["weights"])
    images = [common.open_image(path) for path in pictures]
    pixels = common.to_pixels(images, stored["shape"][1])
    if stored["shape"][0] == 1:
        pixels = rgb_to_grayscale(pixels)
    numbers = net.eval()(common.Preprocess(**stored["preprocess"])(pixels)).argmax(1)
    return [stored["classes"][number] for number in numbers]


# ------------------------------------------------------------ core-sets


def open_coreset(kind, args):
    """Select a core-set of --dataset -> the arguments of common.score but the last."""
    place = args.data_dir, args.device
    data = load_data(common, args.dataset or "glyphs", args.size, False, args.flip, *place)
    images, labels = data.train, data.train_labels
    if kind != "whole":
        images, labels = data.sample(args.ipc, args.seed, "core-set")
    if kind not in ("whole", "random"):
        images = data.train[select(kind, data, args)]
    count = len(data.classes)
    described = dict(method=kind, dataset=data.name, per_class=round(len(labels) / count))
    described |= dict(stored_per_class=images.numel() / count, step_size=None, iterations=0)
    settings = {"seed": args.seed, "epochs": WHOLE_EPOCHS if kind == "whole" else 0}
    described |= dict(seconds=0, evaluations=[], settings=settings)
    return data, described, images[None], labels, common.Protocol()


def select(kind, data, args):
    """Indices (C * ipc,) of the training images of a core-set, class after class.

    herding keeps the mean of the selected close to that of all; k-center takes the farthest from
    the selected; both start with the closest to the mean. forgetting takes the most forgotten.
    """
    key = common.hash_int(data.fingerprint, data.flip, FEATURE_EPOCHS, args.seed)
    path = pathlib.Path(args.data_dir) / ".cache" / f"features_{key:016x}.pt"
    learned = common.cached(path, functools.partial(learn_features, data, args))
    all_features, forgotten = (tensor.to(data.device) for tensor in learned)
    chosen = []
    for index in data.indices_by_class:
        index = index[index >= 0]
        features = all_features[index]
        mean = features.mean(0)
        best = [(features - mean).norm(dim=1).argmin().item()]
        for k in range(1, args.ipc):
            if kind == "herding":
                cost = ((features[best].sum(0) + features) / (k + 1) - mean).norm(dim=1)
            else:
                cost = -torch.cdist(features, features[best]).amin(1)
            cost[best] = torch.inf
            best.append(cost.argmin().item())
        if kind == "forgetting":
            best = forgotten[index].topk(args.ipc).indices
        chosen.append(index[best])
    return torch.cat(chosen)


def learn_features(data, args):
    """Train a ConvNet on the real set -> features (n, d), forgetting events (n,).

    A forgetting event: an image is classified correctly after an epoch and wrongly after the next.
    Images that never were correct have none (Toneva et al. 2019 put them first).
    """
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device).reset(args.seed, "features")
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    real = (data.train[None], data.train_labels, common.Protocol())
    # breaks ties at random
    forgotten = torch.rand(len(data.train), device=data.device)
    correct = torch.zeros_like(forgotten).bool()
    for epoch in common.progress(range(FEATURE_EPOCHS), "epochs for core-sets"):
        common.train_epoch(net, sgd, data, *real, args.seed, epoch)
        features = common.frozen_features(net, data.train)
        with torch.no_grad(), common.autocast(data.device):
            wrong = net.classifier(features).argmax(1) != data.train_labels
        forgotten += correct & wrong
        correct = ~wrong
    return features, forgotten


# ------------------------------------------------------------ corrupted test images


def make_corruptions(data):
    """Three corruptions, strengths as in CIFAR-10-C's code -> {kind: uint8 (5, n, h, w, c)}."""
    pixels = data.preprocess.undo(data.test).clamp(0, 1)
    mean = pixels.mean((2, 3), keepdim=True)
    common.seed("corruption")
    noise = torch.randn_like(pixels)
    levels = {
        "noise": (pixels + s * noise for s in (0.04, 0.06, 0.08, 0.09, 0.1)),
        "blur": (gaussian_blur(pixels, 9, s) for s in (0.4, 0.6, 0.7, 0.8, 1.0)),
        "contrast": (mean + s * (pixels - mean) for s in (0.75, 0.5, 0.4, 0.3, 0.15)),
    }
    arrays = {}
    for kind, images in levels.items():
        images = torch.stack([(255 * x.clamp(0, 1)).round().byte() for x in images])
        arrays[kind] = images.permute(0, 1, 3, 4, 2).cpu().numpy()
    return arrays


def read_corruptions(where, data):
    """Read CIFAR-10-C's layout -> {kind: uint8 (5, n, h, w, c)}, labels (n,). Raises UserError."""
    if where == "made":
        return make_corruptions(data), data.test_labels
    c, h, w = data.shape
    try:
        paths = sorted(pathlib.Path(where).glob("*.npy"))
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in paths}
        labels = np.split(arrays.pop("labels").astype(np.int64), 5)[0]
        arrays = {kind: a.reshape(5, len(labels), h, w, c) for kind, a in arrays.items()}
    except (OSError, ValueError, EOFError, KeyError):
        raise common.UserError(f"{where} needs labels.npy, KIND.npy (5 n, {h}, {w}, {c})") from None
    return arrays, torch.from_numpy(labels).to(data.device)


def score_corruption(data, distilled, images, labels, protocol, args):
    """Test networks on corrupted images (HaBa supplement, Fig. 2): a row for levels 0 to 5."""
    arrays, test_labels = read_corruptions(args.corruption, data)
    epochs = args.epochs or protocol.length(len(labels))
    protocol = replace(protocol, epochs=epochs, lr=distilled["step_size"] or protocol.lr)
    found = np.zeros((args.runs, len(arrays), 6))
    for k in range(args.runs):
        net = common.train(data, images, labels, protocol, args.seed, "score", k)
        found[k, :, 0] = common.accuracy(net, data.test, data.test_labels)
        for (i, array), level in itertools.product(enumerate(arrays.values()), range(5)):
            test = torch.tensor(array[level], device=data.device).permute(0, 3, 1, 2)
            found[k, i, level + 1] = common.accuracy(net, data.preprocess(test), test_labels)

    row = {key: distilled[key] for key in ("method", "dataset", "per_class", "iterations")}
    row |= dict(kind="corruption", images=args.corruption, network=net.kind)
    row |= dict(epochs=epochs, runs=args.runs, seed=args.seed)
    row["accuracy"] = found.mean((0, 1)).round(2).tolist()
    row["std"] = found.mean(1).std(0).round(2).tolist()
    row["kinds"] = dict(zip(arrays, found.mean(0).round(2).tolist(), strict=True))
    print(f"{row['method']} on {row['dataset']}, corruption levels 0 to 5: {row['accuracy']} %")
    common.append_row(row, data.device, args.out)


# ------------------------------------------------------------ continual learning


def continual(args, flags):
    """Class-incremental learning: a row with the accuracy on the classes seen after each step.

    A step distills its new classes only; a fresh network trains on all sets so far. Class orders
    are numpy's, seeds 0, 1, ... `flags` are the method's. Repeating the command resumes.
    """
    method = importlib.import_module(args.continual)
    given = {method.Args.budget: args.ipc, "data-dir": args.data_dir, "epochs": args.epochs[0]}
    given |= {name: vars(args)[name] for name in ("dataset", "size", "seed", "device", "runs")}
    flags = [f"--{name}={value}" for name, value in given.items() if value != ""] + flags
    options = common.parse_args(method.Args, method.PRESETS, flags)
    data = common.load_dataset(options, common.setup(options))
    count = len(data.classes)
    if count < 2 * args.steps or options.iterations == 0:
        raise common.UserError(f"{data.name}: --steps {count // 2} at most, --iterations 1 or more")
    name = f"continual_{args.continual}_{data.name}_{args.ipc}_{args.steps}steps"
    options = replace(options, out=str(pathlib.Path(args.out) / name))
    found = np.zeros((2, args.orders, args.steps))
    for order in range(args.orders):
        steps = np.array_split(np.random.RandomState(order).permutation(count), args.steps)
        files = [pathlib.Path(options.out) / f"order{order}_step{i}.pt" for i in range(args.steps)]
        parts = []
        for i, new in enumerate(steps):
            if args.continual == "kfs":
                # App. A: decoders of the first step are kept, two drops
                drops = options.drops or (5000, 15000)
                options = replace(options, drops=drops, fixed_decoders=str(files[0]) if i else "")
            parts.append(method.distill(restrict(data, new), options, files[i]))
            seen = restrict(data, np.concatenate(steps[: i + 1]))
            row = common.score(seen, *join_steps(parts, method, data.device), options)
            found[:, order, i] = row["accuracy"], row["random"]

    seen = np.cumsum([len(step) for step in steps]).tolist()
    row |= dict(kind="continual", orders=args.orders, classes_seen=seen)
    row["accuracy"], row["random"] = found.mean(1).round(2).tolist()
    row["std"], row["random_std"] = found.std(1).round(2).tolist()
    print(f"accuracy on {seen} classes: {row['accuracy']} %")
    common.append_row(row, data.device, args.out)


def restrict(data, classes):
    """The images of some classes, numbered in that order -> Dataset with its own fingerprint."""
    number = torch.full((len(data.classes),), -1, device=data.device)
    number[classes.tolist()] = torch.arange(len(classes), device=data.device)
    parts = []
    for images, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        parts += [images[number[labels] >= 0], number[labels][number[labels] >= 0]]
    names = [data.classes[c] for c in classes]
    prints = [f"{x}/{classes.tolist()}" for x in (data.fingerprint, data.test_fingerprint)]
    return common.Dataset(data.name, names, *parts, data.preprocess, *prints, data.flip)


def join_steps(parts, method, device):
    """Join the distilled sets of several steps -> distilled, images, labels, protocol.

    Labels become soft, (n, classes so far), with their lowest entry for the classes of other steps.
    """
    sets = [method.decode(distilled, device) for distilled in parts]
    counts = [len(distilled["classes"]) for distilled in parts]
    images = torch.cat([images for images, _ in sets], 1)
    labels = [own for _, own in sets]
    for i, own in enumerate(labels):
        soft = own if own.ndim == 2 else F.one_hot(own, counts[i]).float()
        low = soft.amin(1, keepdim=True)
        labels[i] = F.pad(soft - low, (sum(counts[:i]), sum(counts[i + 1 :]))) + low
    joint = parts[-1] | {"evaluations": []}
    if joint["step_size"]:
        joint["step_size"] = np.mean([distilled["step_size"] for distilled in parts])
    protocol = method.protocol(method.Args(**joint["settings"]))
    return joint, images, torch.cat(labels), protocol


# ------------------------------------------------------------ table, pictures, command line

SUFFIXES = {"adapted": "", "one-net": "-1net", "scratch": "-wo-pretrain", "autoencoder": "-ae"}
SUFFIXES |= {"no-adaptation": "-wo-ada", "bilevel": "-bilevel", "baseline": "-baseline"}


def print_table(args):
    """Print the scores of OUT/results.jsonl as Markdown; of equal settings the last one counts."""
    path = pathlib.Path(args.out) / "results.jsonl"
    targets = pathlib.Path(__file__).parent / "results" / "targets.csv"
    targets = list(csv.DictReader(targets.open())) if targets.exists() else []
    names = ("dataset", "per_class", "network", "iterations", "epochs", "runs", "seed")
    lines = {}
    try:
        for row in map(json.loads, path.read_text().splitlines()):
            if "kind" not in row:
                kinds = [row["settings"].get(name) for name in ("mode", "objective", "scoring")]
                key = [" ".join([row["method"], *filter(None, kinds)]), *map(row.get, names)]
                key = (*key, json.dumps(row["settings"], sort_keys=True))
                ours = f"{row['accuracy']} +- {row['std']}"
                real = f"{row['random']} +- {row['random_std']} ({row['random_per_class']})"
                lines[key] = [*key[:6], ours, row["best"] or "", real, paper_number(row, targets)]
    except (OSError, ValueError, TypeError, KeyError):
        raise common.UserError(f"{path} is missing or has a line that is not a score") from None
    head = "method data per_class network iterations epochs accuracy best random_(per_class) paper"
    for line in [head.split(), ["---"] * 10, *(lines[key] for key in sorted(lines))]:
        print("| " + " | ".join(map(str, line)) + " |")


def paper_number(row, targets):
    """The paper's accuracies for a row; HaBa's are found by bases, the translator's by mode."""
    settings = row.get("settings", {})
    method = row["method"].replace("k-center", "kcenter").removesuffix("_fewshot")
    method += SUFFIXES[settings.get("mode", "adapted")] + "-ds" * settings.get("down_sample", False)
    method += settings.get("objective", "mtt").removeprefix("mtt")  # others are not in the file
    prefix = "frepo-" * method.startswith("translator")  # its network is named with and without
    ours = (method, row["dataset"], row["per_class"], row["network"].removeprefix(prefix))
    found = []
    for target in targets:
        bases = re.search(r"BPC (\d+)", target["source"])
        budget = int(bases[1] if bases else target["images_per_class"])
        network = target["network"].removeprefix(prefix)
        if ours == (target["method"], target["dataset"], budget, network):
            found.append(f"{target['mean']} +- {target['std']} ({target['source']})")
    return "; ".join(found)


def export(path, folder, args):
    """Write folder/<class>/NNN.png for each image of a file, grid.png, labels.csv, README.txt."""
    folder = pathlib.Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise common.UserError(f"{folder} is not empty: give a new folder to --export")
    data = open_file(path, args)[0]
    images, labels, _ = training_set(path)
    images = images.to(data.device)
    soft = labels if labels.ndim == 2 else F.one_hot(labels, len(data.classes))
    labels = soft.argmax(1)
    values = 255 * data.preprocess.undo(images)
    clipped = 100 * ((values < -0.5) | (values > 255.5)).float().mean()
    pixels = values.clamp(0, 255).round().byte().cpu()
    by_class = [torch.nonzero(labels == c)[:, 0] for c in range(len(data.classes))]
    lines = [["file", "class", "soft label"]]
    for name, index in zip(data.classes, by_class, strict=True):
        for i, k in enumerate(index):
            file = f"{name.replace('/', '-')}/{i:03d}.png"
            png = io.BytesIO()
            to_pil_image(pixels[k]).save(png, "png")
            common.save(png.getvalue(), folder / file)
            lines.append([file, name, " ".join(map(str, soft[k].tolist()))])
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    shown = images[torch.cat([index[:10] for index in by_class])]
    common.save_grid(folder / "grid.png", data, shown, columns=10)
    note = (
        f"These pictures are for looking: {clipped:.1f} % of the values lie outside 0 .. 255 and "
    )
    note += "were clipped. To train, use evaluate.train_network or evaluate.training_set.\n"
    (folder / "README.txt").write_text(note)
    print(f"wrote {len(images)} images to {folder}. {note}", end="")


def jobs(args):
    """Arguments of common.score for each file or core-set, network and number of epochs."""
    sets = [join_files(args.files, args)] if args.join else []
    sets += [open_file(path, args) for path in args.files if not args.join]
    sets += [open_coreset(kind, args) for kind in args.coreset]
    for (data, *_), name in itertools.product(sets, filter(None, args.network)):
        net = build_network(name, data.shape, len(data.classes))
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            if torch.is_tensor(net(torch.zeros(2, *data.shape))):
                continue
        raise common.UserError(f"{name} is not for images of {data.shape}: try convnet, resnet18")
    for one, name, epochs in itertools.product(sets, args.network, args.epochs):
        data, distilled, images, labels, protocol = one
        if name or epochs:
            # the evaluations are of the file's own network and epochs
            distilled = distilled | {"evaluations": []}
        if name:
            protocol = replace(protocol, network=functools.partial(build_network, name))
        options = vars(args) | {"epochs": epochs or distilled["settings"]["epochs"]}
        yield data, distilled, images, labels, protocol, argparse.Namespace(**options)


def parse(argv=None):
    """Parse the command line -> Namespace; .flags: those for the method of --continual."""
    usage = "%(prog)s [FILE ...] [--flag value ...]"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    add("--network", nargs="+", default=[""], metavar="X", help=f"{NETWORKS}, torchvision's")
    add("--epochs", nargs="+", type=int, default=[0], metavar="N", help="0: those of the file")
    add("--runs", type=int, default=5, help="networks trained for a score (5)")
    add("--save", metavar="DIR", help="write each trained network")
    add("--join", action="store_true", help="train on the union of the files")
    add("--coreset", nargs="+", default=[], choices=CORESETS, metavar="X", help=" ".join(CORESETS))
    add("--ipc", type=int, default=10, help="images per class for --coreset, --continual (10)")
    add(
        "--tensors", nargs="+", metavar="X", help="other people's images, labels: .pt, .npy, folder"
    )
    add("--protocol", choices=METHODS, help="whose protocol --tensors are for")
    add("--pixels", action="store_true", help="--tensors are 0 .. 1 or 0 .. 255, not preprocessed")
    add("--zca", action="store_true", help="--tensors are whitened")
    add("--step-size", type=float, help="learning rate of networks on --tensors")
    add("--dataset", default="", help="data set (that of the file, else glyphs)")
    add("--data-dir", default="data", help="folder of data sets and caches (data)")
    add("--size", type=int, default=0, help="resize a folder's images (as in the file)")
    add(
        "--no-flip",
        dest="flip",
        action="store_false",
        help="for --tensors, --coreset: no mirroring",
    )
    add("--seed", type=int, default=0, help="seed of all random numbers (0)")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add("--out", default="out", help="folder of results.jsonl (out)")
    add("--corruption", nargs="?", const="made", metavar="DIR", help="test on corrupted images")
    add("--continual", choices=METHODS, metavar="METHOD", help="learn classes in steps")
    add("--steps", type=int, default=5, help="steps of --continual (5)")
    add("--orders", type=int, default=5, help="class orders of --continual (5)")
    add("--export", metavar="DIR", help="write the images of a file as PNG")
    add("--table", action="store_true", help="print OUT/results.jsonl as Markdown")
    args, words = parser.parse_known_args(argv)
    args.flags, args.files = (words, []) if args.continual else ([], words)
    unknown = [word for word in args.files if str(word).startswith("-")]
    if unknown:
        raise common.UserError(f"unknown argument {unknown[0]}: see --help")
    if min(args.ipc, args.runs, args.steps, args.orders) < 1 or min(args.epochs) < 0:
        raise common.UserError("--ipc, --runs, --steps, --orders: 1 or more; --epochs: 0 or more")
    if not (words or args.coreset or args.continual or args.table or args.tensors):
        raise common.UserError("nothing to do: give files, --coreset, --continual or --table")
    if args.tensors and not (args.protocol and args.dataset):
        raise common.UserError("--tensors need --protocol and --dataset")
    others = args.export or args.corruption or args.coreset or any(args.network) or args.epochs[1:]
    if (args.continual and others) or (args.export and len(words) + bool(args.tensors) != 1):
        raise common.UserError("--export takes one file, --continual only flags of its method")
    return args


def main(argv=None):
    args = parse(argv)
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.tensors:
        args.files = [*args.files, open_tensors(args.tensors, args)]
    if args.continual:
        continual(args, args.flags)
    elif args.export:
        export(args.files[0], args.export, args)
    elif args.corruption:
        for job in jobs(args):
            score_corruption(*job)
    else:
        for job in jobs(args):
            common.score(*job, *[functools.partial(save_network, args.save, job)] * bool(args.save))
    if args.table:
        print_table(args)


if __name__ == "__main__":
    common.cli(main)
