"""Train networks on distilled sets and core-sets, score them, save them, export pictures.

    python evaluate.py out/dm_cifar10_ipc10.pt --network convnet resnet18 vgg11 --epochs 300 1000
    python evaluate.py --coreset random herding k-center forgetting --dataset cifar10 --ipc 10
    python evaluate.py --tensors images.pt labels.pt --protocol dm --dataset cifar10

Scores, by the method's training protocol, are lines of OUT/results.jsonl, each with that of random
real images of the same storage. In Python: train_network, training_set, classify.
"""

import argparse
import csv
import functools
import importlib
import itertools
import math
import pathlib
import re
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torchvision import models, utils
from torchvision.transforms.functional import gaussian_blur

import common

METHODS = ("mtt", "dm", "haba", "kfs", "frepo", "translator_fewshot")
NETWORKS = "convnet alexnet vgg11 resnet10 resnet18 densenet121"
CORESETS = ("random", "herding", "k-center", "forgetting")


def train_network(path, network="", seed=0, epochs=0, **flags):
    """Train a network on any method's file by its protocol -> network, test accuracy in %.

    network "", epochs 0: the protocol's; flags: of this script, as data_dir="data", compile=False.
    """
    words = []
    for name, value in flags.items():
        name = name.replace("_", "-")
        is_switch = isinstance(value, bool)
        words.append(f"--{'no-' * (not value)}{name}" if is_switch else f"--{name}={value}")
    words += [f"--network={network}", f"--seed={seed}", f"--epochs={epochs}"]
    ((data, distilled, images, labels, protocol, args),) = jobs(parse([str(path), *words]))
    return common.train_and_test(data, images, labels, protocol, args, distilled["step_size"])


def training_set(path):
    """Training images of a distilled file of any method, on the CPU. Raises UserError.

    -> images (N, c, h, w), preprocessed as info["preprocess"] says, HaBa's with all hallucinators;
    labels (N,) or soft (N, C); info: the metadata (method, dataset, classes, step_size, ...).
    """
    distilled = read_distilled(path)
    images, labels = decode(distilled)
    info = {key: value for key, value in distilled.items() if not torch.is_tensor(value)}
    return images.flatten(0, 1), torch.cat([labels] * len(images)), info


def read_distilled(path):
    """Load a distilled file -> its content, a dict. Raises UserError."""
    needed = ("method", "shape", "classes", "fingerprint", "test_fingerprint", "settings")
    distilled = common.load(path, "a distilled file of these scripts", *needed)
    tensors = filter(torch.is_tensor, distilled.values())
    if distilled["method"] not in METHODS or not all(x.isfinite().all() for x in tensors):
        raise common.UserError(f"{path}: no method {distilled['method']}, or NaN, infinite values")
    return distilled | {"stem": pathlib.Path(path).stem}


def decode(distilled, device="cpu"):
    """All images of a distilled file (V, n, c, h, w), labels (n,) or soft (n, C)."""
    images = distilled.get("images", torch.empty(0))
    # full-size images, also from --tensors with HaBa's or KFS's protocol, need no decoder
    name = "dm" if list(images.shape[1:]) == distilled["shape"] else distilled["method"]
    return importlib.import_module(name).decode(distilled, device)


def open_file(path, args):
    """Load a distilled file and its data set -> the first five arguments of common.score."""
    distilled = read_distilled(path)
    method = importlib.import_module(distilled["method"])
    settings = method.Args(**distilled["settings"])
    places = {"dataset": settings.dataset, "size": settings.size} | args.data
    data = load_data(method, **places | {"zca": settings.zca, "flip": settings.flip})
    if data.fingerprint != distilled["fingerprint"]:
        raise common.UserError(f"{path} has other training images than {data.name}, {data.shape}")
    if data.test_fingerprint != distilled["test_fingerprint"]:
        print(f"{path}: the test images of {data.name} are not those of the distillation")
    return data, distilled, *decode(distilled, data.device), method.protocol(settings)


@functools.lru_cache
def load_data(method, **settings):
    """Load the data set of method.Args(**settings) -> Dataset; equal settings load once."""
    args = method.Args(**settings)
    return common.load_dataset(args, common.setup(args))


def join_files(paths, args):
    """Join files of the same data; the protocol is that of the first -> as open_file."""
    sets = [open_file(path, args) for path in paths]
    data, *_, protocol = sets[0]
    if len({(x.fingerprint, x.flip, rule.loss.__name__) for x, *_, rule in sets}) > 1:
        raise common.UserError("--join: the files differ in data, --flip or loss")
    joint, images, labels = join([part[1:4] for part in sets], data.classes, protocol)
    merges = {"per_class": sum, "stored_per_class": sum, "method": "+".join, "stem": "+".join}
    for name, merge in merges.items():
        joint[name] = merge(distilled[name] for _, distilled, *_ in sets)
    return data, joint, images, labels, protocol


def join(parts, classes, protocol):
    """Join [(distilled, images, labels)], each of some of `classes` -> one such, soft labels."""
    # variants repeat up to a common multiple, so those of a part stay equally likely
    variants = torch.arange(math.lcm(*(len(images) for _, images, _ in parts)))
    images = torch.cat([images[variants % len(images)] for _, images, _ in parts], 1)
    labels = []
    for distilled, _, own in parts:
        if own.ndim == 1:
            own = protocol.soft_labels(own, len(distilled["classes"]))
        # the lowest entry for the classes that this part lacks
        soft = own.amin(1, keepdim=True).repeat(1, len(classes))
        soft[:, [classes.index(name) for name in distilled["classes"]]] = own
        labels.append(soft)
    joint = dict(parts[0][0])
    rates = [distilled["step_size"] for distilled, *_ in parts]
    if any(rates):
        joint["step_size"] = sum(rate or protocol.lr for rate in rates) / len(rates)
    return joint, images, torch.cat(labels)


def open_tensors(args):
    """Make a distilled file of other people's images and labels -> its path. Raises UserError.

    Images (n, c, h, w), (n, h, w, c) or (C, n, c, h, w): pixels if uint8 or with --pixels, else
    network inputs (--zca: whitened). Labels: numbers, one-hot or soft; none: class after class.
    """
    method = importlib.import_module(args.protocol)
    data = load_data(method, **args.data)
    count = len(data.classes)
    paths = [pathlib.Path(path) for path in args.tensors]
    images, *labels = itertools.chain(*(read_tensors(path, data) for path in paths))
    fit = images.ndim == 4 or images.shape[:-4] == (count,)
    images = images.reshape(-1, *images.shape[-3:])
    if fit and images.shape[-1] == data.shape[0]:
        images = images.movedim(-1, 1)
    if images.shape[1:] != data.shape or len(images) == 0 or not fit:
        raise common.UserError(f"images of {tuple(images.shape)} do not fit {count} x {data.shape}")
    pixels = args.pixels or images.dtype == torch.uint8
    images = images.float().to(data.device)
    if pixels and images.min() < 0:
        raise common.UserError("--pixels are 0 .. 1 or 0 .. 255, and some of these are below 0")
    if pixels:
        images = data.preprocess(images if images.max() > 2 else images * 255)
    if not labels:
        print(f"no labels: taken as class after class, {len(images) // count} each")
    labels = labels or [torch.arange(count).repeat_interleave(len(images) // count)]
    labels, *more = [tensor.float() for tensor in labels]
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    numbers = labels.argmax(1) if labels.ndim == 2 else labels
    fit = labels.shape in ((len(images),), (len(images), count)) and not more
    if not fit or not set(numbers.tolist()) <= set(range(count)):
        shapes = f"({len(images)},) of 0 .. {count - 1}, or ({len(images)}, {count})"
        raise common.UserError(f"labels of {tuple(labels.shape)} are not {shapes}")
    if not (images.isfinite().all() and labels.isfinite().all()):
        raise common.UserError(f"{paths[0]}: images or labels are NaN or infinite")
    numbers = numbers.long()
    soft = labels.ndim == 2 and not labels.equal(nn.functional.one_hot(numbers, count).float())
    tensors = {"images": images, "labels": labels if soft else numbers}

    # the means of whitened images hardly vary
    ours, real = ((x.mean(), x.std(), x.mean((1, 2, 3)).std()) for x in (images, data.train))
    text = "{:.2f} +- {:.2f} (means of images: +- {:.3f})"
    print(f"the tensors: {text.format(*ours)}; real, preprocessed alike: {text.format(*real)}")
    alike = all(1 / 4 < x / y < 4 for x, y in zip(ours[1:], real[1:], strict=True))
    # network inputs have negative values, 0 .. 1 has none
    if not alike or abs(ours[0] - real[0]) > real[1] or images.min() >= 0:
        print("these are far apart: are --zca, --pixels, --dataset and --protocol right?")
    settings = args.data | {method.Args.budget: len(images) // count, "iterations": 0}
    if hasattr(method.Args, "step_size"):
        settings["step_size"] = args.step_size
    run = argparse.Namespace(record={"seconds": 0.0, "evaluations": []})
    options = method.Args(**settings, out=args.out)
    path = pathlib.Path(args.out) / f"{paths[0].stem}_{common.output_path(options).name}"
    common.save_distilled(path, data, options, tensors, run, args.step_size)
    return path


def read_tensors(path, data):
    """Read .npy, .pt (tensor, list of tensors, {"data": [list, ...]}) or <class>/* -> tensors."""
    try:
        if path.is_dir():
            names, samples = common.list_images(path)
            pixels = read_pictures([file for file, _ in samples], data.shape)
            folders = [name.replace("/", "-") for name in data.classes]
            return [pixels, torch.tensor([folders.index(names[c]) for _, c in samples])]
        if path.suffix == ".npy":
            return [torch.from_numpy(np.load(path, mmap_mode="c"))]
        # numpy numbers, which DM's files hold beside the tensors
        scalar = np.float64(0).__reduce__()[0]
        named = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        with torch.serialization.safe_globals([*named, np.dtype, type(np.dtype(float))]):
            content = torch.load(path, "cpu", weights_only=True)
        if isinstance(content, dict):
            content = content["data"][0]
        first, *rest = [content] if torch.is_tensor(content) else content
        return [tensor.detach() for tensor in (first, *rest)]
    except (OSError, ValueError) as error:
        raise common.UserError(f"{path} cannot be read for {data.name}: {error}") from None
    except Exception:
        raise common.UserError(f"{path} has no tensors, or more: torch.save these alone") from None


def read_pictures(paths, shape):
    """Read pictures as pixels (n, c, h, w) of shape (c, h, w): cropped, resized, gray if c = 1."""
    return common.to_pixels((common.open_image(path, shape[0]) for path in paths), shape[1])


def open_coreset(kind, args):
    """Select a core-set of --dataset -> the first five arguments of common.score."""
    data = load_data(common, **args.data)
    images, labels = data.sample(args.ipc, args.seed, "core-set")
    if kind != "random":
        images = select(kind, data, args)
    described = dict(method=kind, dataset=data.name, per_class=args.ipc, iterations=0, seconds=0)
    described |= dict(stored_per_class=args.ipc * math.prod(data.shape), step_size=None)
    settings = {name: args.data[name] for name in args.data if name not in common.Args.places}
    described |= {"stem": kind, "settings": settings | {"seed": args.seed, "epochs": 0}}
    return data, described, images[None], labels, common.Protocol()


def select(kind, data, args):
    """Select a core-set greedily: at each step the image with the lowest cost."""
    name = f"features_{data.fingerprint}_{data.flip}_{args.seed}.pt"
    path = pathlib.Path(args.data_dir) / ".cache" / name
    if not path.exists():
        common.save(learn_features(data, args), path)
    all_features, forgotten = (x.to(data.device) for x in common.load(path, "a cache"))
    chosen = []
    for index in data.indices_by_class:
        index = index[index >= 0]
        features = all_features[index]
        center = features.mean(0)
        cost = -forgotten[index]
        best = []
        # forgetting: most events; herding: the mean of the chosen nearest to the class's mean;
        # k-center: first nearest to the class's mean, then always farthest from the chosen
        for k in range(args.ipc):
            if kind == "k-center" and best:
                cost = -torch.cdist(features, features[best]).amin(1)
            elif kind != "forgetting":
                means = (features[best].sum(0) + features) / (k + 1)
                cost = (means - center).norm(dim=1)
            cost[best] = torch.inf
            best.append(cost.argmin().item())
        chosen.append(data.train[index[best]])
    return torch.cat(chosen)


def learn_features(data, args):
    """Train a ConvNet on all images for 20 epochs -> features (n, d), forgetting events (n,)."""
    net = common.ConvNet(data.shape, len(data.classes)).to(data.device).reset(args.seed, "features")
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    real = (data.train[None], data.train_labels, common.Protocol())
    # random fractions break ties
    forgotten = torch.rand(len(data.train), device=data.device)
    correct = torch.zeros_like(forgotten).bool()
    common.compiling(compiles(args, data))
    for epoch in common.progress(range(20), "epochs for core-sets"):
        common.train_epoch(net, sgd, data, *real, args.seed, epoch)
        features = common.frozen_features(net, data.train)
        wrong = common.predict(net.classifier, features) != data.train_labels
        # images that were never correct have no event (Toneva et al. 2019 put them first)
        forgotten += correct & wrong
        correct = ~wrong
    return features, forgotten


# ------------------------------------------------------------ networks, corruption, continual

# Convolutions: width, kernel size, whether a 2x2 max pool follows
PLANS = {
    "alexnet": ((128, 5, 1), (192, 5, 1), (256, 3, 0), (192, 3, 0), (192, 3, 1)),
    "vgg11": ((64, 3, 1), (128, 3, 1), (256, 3, 0), (256, 3, 1)) + ((512, 3, 0), (512, 3, 1)) * 2,
}


def build_network(name, shape, classes):
    """Build a network for images of `shape` (c, h, w); `.kind` is its name.

    In the usual form for small images, with instance norm; parameters for 3x32x32, 10 classes:
    convnet 320,010; alexnet (DC's, no norm) 1,872,202; vgg11 9,231,114; resnet10 4,903,242;
    resnet18 11,173,962; densenet121 6,956,426. Any other name is torchvision's model, unchanged.
    """
    if re.fullmatch(r"(frepo-)?convnet\d*", name):
        net = common.ConvNet(shape, classes, frepo=name.startswith("frepo"))
        if name[-1].isdigit() and name != net.kind:
            raise ValueError(f"the depth follows from the size of the images: {net.kind}")
        return net
    if name in PLANS:
        net = nn.Sequential()
        channels = shape[0]
        for width, kernel, pool in PLANS[name]:
            net.append(nn.Conv2d(channels, width, kernel, padding=kernel // 2))
            net.append(nn.GroupNorm(width, width) if name == "vgg11" else nn.Identity())
            net.extend([nn.ReLU(), nn.MaxPool2d(2) if pool else nn.Identity()])
            channels = width
        side = 4 if name == "alexnet" else 1
        net.extend([nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(width * side**2, classes)])
    elif name == "resnet10":
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], classes)
    else:
        net = getattr(models, name)(num_classes=classes)
    if name in ("resnet10", "resnet18", "densenet121"):
        net = adapt_to_small_images(net, shape[0])
    if shape[-1] == 28:
        # 32x32, as in ConvNet
        net = nn.Sequential(nn.ZeroPad2d(2), net)
    net.kind = name
    return net


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


def save_networks(folder, job, row, trained):
    """Write networks with all that `classify` needs: STEM_NETWORK_EPOCHS_seedSEED_K.pt."""
    data, distilled, *_ = job
    for k, (net, accuracy) in enumerate(trained):
        name = f"{distilled['stem']}_{net.kind}_{row['epochs']}_seed{row['seed']}_{k}.pt"
        path = pathlib.Path(folder) / name
        content = {"network": net.kind, "classes": data.classes, "shape": list(data.shape)}
        content |= {"preprocess": vars(data.preprocess), "weights": net.state_dict()}
        common.save(content | {"accuracy": accuracy}, path)
        print(f"wrote {path}: {accuracy:.2f} %")


def classify(network_file, *pictures):
    """Classify pictures, cropped and resized, by a network of --save -> names of classes."""
    names = ("network", "classes", "shape", "preprocess", "weights")
    stored = common.load(network_file, "a network of evaluate.py --save", *names)
    net = build_network(stored["network"], stored["shape"], len(stored["classes"]))
    net.load_state_dict(stored["weights"])
    inputs = common.Preprocess(**stored["preprocess"])(read_pictures(pictures, stored["shape"]))
    return [stored["classes"][number] for number in common.predict(net.eval(), inputs)]


def read_corruptions(folder, data):
    """Read CIFAR-10-C, or compute three kinds -> {kind: uint8 (5, n, c, h, w)}, labels (n,)."""
    if folder == "made":
        pixels = data.preprocess.undo(data.test).clamp(0, 1)
        mean = pixels.mean((2, 3), keepdim=True)
        common.seed("corruption")
        noise = torch.randn_like(pixels)
        kinds = {
            "noise": [pixels + s * noise for s in (0.04, 0.06, 0.08, 0.09, 0.1)],
            "blur": [gaussian_blur(pixels, 9, s) for s in (0.4, 0.6, 0.7, 0.8, 1.0)],
            "contrast": [mean + s * (pixels - mean) for s in (0.75, 0.5, 0.4, 0.3, 0.15)],
        }
        levels = {kind: torch.stack(images).clamp(0, 1) for kind, images in kinds.items()}
        return {kind: (255 * x).round().byte() for kind, x in levels.items()}, data.test_labels
    c, h, w = data.shape
    paths = sorted(pathlib.Path(folder).glob("*.npy"))
    arrays = {path.stem: read_tensors(path, data)[0] for path in paths}
    labels = arrays.pop("labels", torch.empty(0))
    form = (torch.uint8, len(labels) // 5 * 5, h, w, c)
    known = labels.ndim == 1 and set(labels.tolist()) <= set(range(len(data.classes)))
    if not known or {(x.dtype, *x.shape) for x in arrays.values()} != {form}:
        raise common.UserError(f"{folder} needs labels.npy, KIND.npy: bytes (5 n, {h}, {w}, {c})")
    kinds = {kind: x.unflatten(0, (5, -1)).movedim(4, 2) for kind, x in arrays.items()}
    return kinds, labels[: len(labels) // 5].long().to(data.device)


def score_corruption(*job):
    """Score a set, then its networks on corrupted images, levels 0 to 5; append both rows."""
    data, *_, args = job
    kinds, labels = read_corruptions(args.corruption, data)
    row, trained = common.score(*job)
    found = np.zeros((args.runs, len(kinds), 6))
    for k, (net, accuracy) in enumerate(trained):
        found[k, :, 0] = accuracy
        for (i, pixels), level in itertools.product(enumerate(kinds.values()), range(5)):
            images = data.preprocess(pixels[level].to(data.device))
            found[k, i, level + 1] = common.accuracy(net, images, labels)
    row |= dict(kind="corruption", images=pathlib.Path(args.corruption).name)
    row["accuracy"] = found.mean((0, 1)).round(2).tolist()
    row["std"] = found.mean(1).std(0).round(2).tolist()
    row["kinds"] = dict(zip(kinds, found.mean(0).round(2).tolist(), strict=True))
    print(f"{row['method']} on {row['dataset']}, corruption levels 0 to 5: {row['accuracy']} %")
    common.append_row(row, data.device, args.out)
    return row, trained


def continual(args):
    """Distill classes in steps, train on all so far; append a row of the accuracy by step."""
    method = importlib.import_module(args.continual)
    flags = [f"--{method.Args.budget}={args.ipc}", *args.flags]
    options = common.parse_args(method.Args, method.PRESETS, flags)
    data = common.load_dataset(options, common.setup(options))
    count = len(data.classes)
    if getattr(options, "mode", "") == "pretrain" or getattr(options, "fixed_decoders", ""):
        raise common.UserError("--continual: leave out --mode pretrain, --fixed-decoders")
    if count < 2 * args.steps or options.iterations == 0:
        raise common.UserError(f"{data.name}: --steps {count // 2} at most, --iterations 1 or more")
    # KFS's later steps depend on its first decoders, so on the iterations, too
    budget = getattr(options, options.budget)
    name = f"continual_{args.continual}_{data.name}_{budget}_{args.steps}_{options.iterations}"
    options.out = str(pathlib.Path(args.out) / name)
    protocol = method.protocol(options)
    found = np.zeros((2, args.orders, args.steps))
    for order in range(args.orders):
        steps = np.array_split(np.random.RandomState(order).permutation(count), args.steps)
        parts = []
        for i, new in enumerate(steps):
            path = pathlib.Path(options.out) / f"order{order}_step{i}.pt"
            if args.continual == "kfs":
                # App. A: decoders of the first step are kept, two drops
                options.drops = options.drops or (5000, 15000)
                options.fixed_decoders = str(path.with_name(f"order{order}_step0.pt")) * (i > 0)
            distilled = method.distill(restrict(data, new), options, path)
            parts.append((distilled, *method.decode(distilled, data.device)))
            seen = restrict(data, np.concatenate(steps[: i + 1]))
            joint, *joined = join(parts, seen.classes, protocol)
            joint["dataset"] = f"{data.name} ({len(seen.classes)} classes)"
            row, _ = common.score(seen, joint, *joined, protocol, options)
            found[:, order, i] = row["accuracy"], row["random"]
    sizes = np.cumsum([len(step) for step in steps]).tolist()
    row |= dict(kind="continual", orders=args.orders, classes_seen=sizes)
    row["accuracy"], row["random"] = found.mean(1).round(2).tolist()
    row["std"], row["random_std"] = found.std(1).round(2).tolist()
    print(f"accuracy on {sizes} classes: {row['accuracy']} %")
    common.append_row(row, data.device, args.out)


def restrict(data, classes):
    """Restrict to some classes, numbered in that order -> Dataset with fingerprints of its own."""
    parts = []
    for images, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        same = labels[:, None] == torch.tensor(classes, device=data.device)
        parts += [images[same.any(1)], same.nonzero()[:, 1]]
    names = [data.classes[c] for c in classes]
    key = f"{common.hash_int(classes.tolist()):016x}"
    prints = [f"{x}-{key}" for x in (data.fingerprint, data.test_fingerprint)]
    return common.Dataset(data.name, names, *parts, data.preprocess, *prints, data.flip)


# ------------------------------------------------------------ pictures, command line


def export(path, args):
    """Write <class>/NNN.png, grid.png, labels.csv and README.txt to the folder of --export."""
    folder = pathlib.Path(args.export)
    data = open_file(path, args)[0]
    images, labels, _ = training_set(path)
    images = images.to(data.device)
    pixels = data.preprocess.undo(images)
    soft = labels if labels.ndim == 2 else nn.functional.one_hot(labels, len(data.classes))
    numbers = soft.argmax(1).tolist()
    lines = [["file", "class", "soft label"]]
    for k, c in enumerate(numbers):
        name = data.classes[c].replace("/", "-")
        file = folder / name / f"{numbers[:k].count(c):03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        utils.save_image(pixels[k], file)
        lines.append([f"{name}/{file.name}", data.classes[c], " ".join(map(str, soft[k].tolist()))])
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    step = math.ceil(len(images) / len(data.classes) / 10)
    common.save_grid(folder / "grid.png", data, images[::step], columns=10)
    clipped = 100 * ((pixels - 0.5).abs() > 0.5 + 0.5 / 255).float().mean()
    note = f"{clipped:.1f} % of the values lie outside 0 .. 255, clipped: train by training_set.\n"
    (folder / "README.txt").write_text(note)
    print(f"wrote {len(images)} images to {folder}. {note}", end="")


def jobs(args):
    """Yield common.score's arguments for each set, network and number of epochs."""
    sets = [join_files(args.files, args)] if args.join else []
    sets += [open_file(path, args) for path in args.files * (not args.join)]
    sets += [open_coreset(kind, args) for kind in args.coreset]
    stems = {distilled["stem"] for _, distilled, *_ in sets}
    if args.save and len(stems) < len(sets):
        raise common.UserError("--save: sets of one name: give one at a time")
    for one, name, epochs in itertools.product(sets, args.network, args.epochs):
        data, distilled, images, labels, protocol = one
        if name:
            build = functools.partial(build_network, name)
            try:
                build(data.shape, len(data.classes))(torch.zeros(2, *data.shape)).argmax(1)
            except Exception:
                raise common.UserError(f"{name} can't take {data.shape}: use {NETWORKS}") from None
            protocol = replace(protocol, network=build)
        options = vars(args) | {"epochs": epochs or distilled["settings"]["epochs"]}
        options["compile"] = compiles(args, data)
        yield data, distilled, images, labels, protocol, argparse.Namespace(**options)


def compiles(args, data):
    """Whether to compile: as --compile says, else all but networks for glyphs."""
    return data.name != "glyphs" if args.compile is None else args.compile


def parse(argv=None):
    """Parse the command line -> Namespace; .data: for load_data; .flags: for --continual."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.usage = "%(prog)s [FILE ...] [--flag value ...]"
    add = parser.add_argument
    add("--continual", choices=METHODS, metavar="METHOD", help="learn classes in steps")
    add("--steps", type=int, default=5, help="steps of --continual (5)")
    add("--orders", type=int, default=5, help="class orders of --continual (5)")
    add("--ipc", type=int, default=10, help="images per class for --coreset, --continual (10)")
    add("--out", default="out", help="folder of results.jsonl (out)")
    args, flags = parser.parse_known_args(argv)
    # not with --continual, whose other flags are its method's
    add("--help", action="help", help="print this")
    add("--network", nargs="+", default=[""], metavar="X", help=f"{NETWORKS}, or torchvision's")
    add("--epochs", nargs="+", type=int, default=[0], metavar="N", help="0: those of the file")
    add("--runs", type=int, default=5, help="networks trained for a score (5)")
    add("--save", metavar="DIR", help="write each trained network")
    add("--join", action="store_true", help="train on the union of the files")
    add("--coreset", nargs="+", default=[], choices=CORESETS, metavar="X", help=" ".join(CORESETS))
    add("--tensors", nargs="+", metavar="X", help="others' images, labels: .pt, .npy, a folder")
    add("--protocol", choices=METHODS, help="whose protocol --tensors are for")
    add("--pixels", action="store_true", help="--tensors are 0 .. 1 or 0 .. 255, not preprocessed")
    add("--zca", action=argparse.BooleanOptionalAction, help="--tensors, --coreset: whitened")
    add("--no-flip", dest="flip", action="store_false", help="--tensors, --coreset: no mirroring")
    add("--step-size", type=float, help="learning rate of networks on --tensors")
    add("--dataset", help="data set (that of the file, else glyphs)")
    add("--data-dir", default="data", help="folder of data sets and caches (data)")
    add("--size", type=int, help="resize a folder's images (as in the file)")
    add("--seed", type=int, default=0, help="seed of all random numbers (0)")
    add("--compile", action=argparse.BooleanOptionalAction, help="networks (all but for glyphs)")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add("--corruption", nargs="?", const="made", metavar="DIR", help="test on corrupted images")
    add("--export", metavar="DIR", help="write the images of a file as PNG")
    args, files = parser.parse_known_args([] if args.continual else argv, args)
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    places = ("dataset", "size", "zca", "flip", "data_dir", "device")
    args.data = {name: given[name] for name in places if name in given}
    if pathlib.Path(args.dataset or "").name in ("mnist", "svhn"):
        args.data["flip"] = False
    unknown = [word for word in files if word.startswith("-")]
    count = len(files) + bool(args.tensors)
    repeated = len(files) - len({*files})
    least = min(args.ipc, args.runs, args.steps, args.orders, 1 + min(args.epochs))
    # the flags that only some tasks read
    reads = {"tensors": {"protocol", "pixels", "step_size", "zca", "flip"}}
    reads |= {"coreset": {"zca", "flip", "ipc"}, "continual": {"ipc", "steps", "orders"}}
    tasks = given.keys() & reads.keys()
    read = set().union(*(reads[task] for task in tasks))
    idle = sorted(given.keys() & set().union(*reads.values()) - read)
    others = args.coreset or args.save or args.corruption
    rate = given.get("step_size", float(args.protocol not in ("mtt", "haba")))
    named = args.protocol and args.dataset and rate > 0
    full = [x for x in (args.save, args.export) if x and any(pathlib.Path(x).glob("*"))]
    mistakes = {
        f"unknown argument {' '.join(unknown)}: see --help": unknown,
        "--ipc, --runs, --steps, --orders: 1 or more; --epochs: 0 or more": least < 1,
        "nothing to do: give files, --tensors, --coreset or --continual": not (files or tasks),
        "--tensors need --protocol, --dataset (mtt, haba: --step-size)": args.tensors and not named,
        f"no effect on this: {', '.join(idle)}": idle,
        "--export takes one file; no --save, --corruption": args.export and (count != 1 or others),
        "--join takes two files and more, each once": args.join and (count < 2 or repeated),
        "--coreset beside files needs --dataset": args.coreset and files and not args.dataset,
        f"{' '.join(full)} is not empty: give a new folder to --save, --export": full,
    }
    for message, is_wrong in mistakes.items():
        if is_wrong:
            raise common.UserError(message)
    return argparse.Namespace(**vars(args), files=files, flags=flags)


def main(argv=None):
    args = parse(argv)
    for folder in filter(None, (args.out, args.save, args.export)):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    if args.tensors:
        args.files.append(open_tensors(args))
    if args.continual:
        continual(args)
    elif args.export:
        export(args.files[0], args)
    else:
        score = score_corruption if args.corruption else common.score
        for job in list(jobs(args)):
            row, trained = score(*job)
            if args.save:
                save_networks(args.save, job, row, trained)


if __name__ == "__main__":
    common.cli(main)
