"""Score distilled files and core-sets in any network; corruption, continual learning, export.

    python evaluate.py out/dm_cifar10_ipc10.pt --network convnet resnet18 vgg11 --epochs 300 1000
    python evaluate.py --coreset random herding k-center forgetting whole --dataset cifar10 --ipc 10

Scores are lines of OUT/results.jsonl, each with that of random real images of the same storage. The
training protocol is the method's, with the network of --network. For other code: training_set().
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
from torchvision.transforms.functional import gaussian_blur, to_pil_image

import common

METHODS = ("mtt", "dm", "haba", "kfs", "frepo", "translator_fewshot")
NETWORKS = "convnet alexnet vgg11 resnet10 resnet18 densenet121"
CORESETS = ("random", "herding", "k-center", "forgetting", "whole")
FEATURE_EPOCHS, WHOLE_EPOCHS = 20, 30  # of the ConvNet that selects core-sets; of --coreset whole


# ------------------------------------------------------------ distilled files


def training_set(path):
    """Training images of a distilled file of any method, on the CPU. Raises UserError.

    -> images (N, c, h, w), preprocessed as info["preprocess"] says, all variants of HaBa's; labels
    (N,) or soft (N, C); info: all else but tensors (method, dataset, classes, step_size, ...).
    """
    distilled = read_distilled(path)
    images, labels = importlib.import_module(distilled["method"]).decode(distilled)
    info = {key: value for key, value in distilled.items() if not torch.is_tensor(value)}
    return images.flatten(0, 1), torch.cat([labels] * len(images)), info


def read_distilled(path):
    """Load a distilled file -> its content, a dict. Raises UserError."""
    distilled = common.load(path, "a distilled file")
    keys = set(distilled) if isinstance(distilled, dict) else set()
    needed = {"method", "shape", "classes", "fingerprint", "settings", "evaluations"}
    if not needed <= keys or distilled["method"] not in METHODS:
        raise common.UserError(f"{path} is not a distilled file of these scripts")
    return distilled


def open_file(path, args):
    """Load a distilled file and its data set -> the arguments of common.score but the last."""
    distilled = read_distilled(path)
    settings = distilled["settings"]
    name = args.dataset or settings["dataset"]
    size = args.size or settings["size"]
    data = load_data(name, distilled["preprocess"], size, args.data_dir, args.device)
    made_from = (tuple(distilled["shape"]), list(distilled["classes"]), distilled["fingerprint"])
    if made_from != (data.shape, data.classes, data.preprocess.fingerprint):
        raise common.UserError(f"{path} was not made from this {data.name}: see --dataset, --size")
    method = importlib.import_module(distilled["method"])
    images, labels = method.decode(distilled, data.device)
    return data, distilled, images, labels, method.protocol(settings, len(labels))


@functools.lru_cache
def load_data(name, kind, size, data_dir, device):
    """common.load_dataset, once for all files of a data set."""
    return common.load_dataset(common.Args(data_dir=data_dir, size=size, device=device), name, kind)


# ------------------------------------------------------------ networks

PLANS = {  # convolutions: width, kernel size, whether a 2x2 max pool follows
    "alexnet": ((128, 5, 1), (192, 5, 1), (256, 3, 0), (192, 3, 0), (192, 3, 1)),
    "vgg11": ((64, 3, 1), (128, 3, 1), (256, 3, 0), (256, 3, 1)) + ((512, 3, 0), (512, 3, 1)) * 2,
}


def build_network(name, shape, classes):
    """Build a network for images of `shape` (c, h, w); `.kind` is its name. Raises UserError.

    In the field's form for small images, with instance norm; parameters for 3x32x32, 10 classes:
    convnet 320,010; alexnet (no norm) 1,872,202; vgg11 9,231,114; resnet10 4,903,242; resnet18
    11,173,962; densenet121 6,956,426. Any other name is torchvision's model, unchanged.
    """
    if name == "convnet":
        return common.ConvNet(shape, classes)
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
        net = nn.Sequential(nn.ZeroPad2d(2), net)  # 32x32, as in ConvNet
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
            layer.reset_parameters()  # torch's default initialization, as in DC's code
        elif isinstance(layer, nn.BatchNorm2d):
            layer = nn.GroupNorm(layer.num_features, layer.num_features)
        elif isinstance(layer, nn.MaxPool2d):
            layer = nn.Identity()
        setattr(net, name, adapt_to_small_images(layer, channels))
    return net


# ------------------------------------------------------------ core-sets


def open_coreset(kind, args):
    """Select a core-set of --dataset -> the arguments of common.score but the last."""
    data = load_data(args.dataset, "standardize", args.size, args.data_dir, args.device)
    images, labels = data.train, data.train_labels
    if kind != "whole":
        images, labels = data.sample(args.ipc, args.seed, "core-set")  # class after class
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
    key = common.hash_int(data.train_labels.tolist(), data.train[:, 0, 8, 8].tolist(), args.seed)
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
    progress = common.Progress(FEATURE_EPOCHS, "epochs for core-sets")
    forgotten = torch.rand(len(data.train), device=data.device)  # breaks ties at random
    correct = torch.zeros_like(forgotten).bool()
    for epoch in range(FEATURE_EPOCHS):
        common.train_epoch(net, sgd, data, *real, args.seed, epoch)
        features = common.frozen_features(net, data.train)
        with torch.no_grad(), common.autocast(data.device):
            wrong = net.classifier(features).argmax(1) != data.train_labels
        forgotten += correct & wrong
        correct = ~wrong
        progress.step()
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
    epochs = args.epochs or protocol.epochs
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
    data = common.load_dataset(options)
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
            if args.continual == "kfs":  # App. A: decoders of the first step are kept, two drops
                drops = options.drops or (5000, 15000)
                options = replace(options, drops=drops, fixed_decoders=str(files[0]) if i else "")
            parts.append(method.distill(restrict(data, new), options, files[i]))
            seen = restrict(data, np.concatenate(steps[: i + 1]))
            row = common.score(seen, *join(parts, method, data.device), options)
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
    key = common.hash_int(data.preprocess.fingerprint, classes.tolist())
    preprocess = replace(data.preprocess, fingerprint=f"{data.preprocess.kind}-{key:016x}")
    return common.Dataset(data.name, [data.classes[c] for c in classes], *parts, preprocess)


def join(parts, method, device):
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
    return joint, images, torch.cat(labels), method.protocol(joint["settings"], images.shape[1])


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
    """Write folder/<class>/NNN.png for each image of a file, and folder/grid.png."""
    folder = pathlib.Path(folder)
    data = open_file(path, args)[0]
    images, labels, _ = training_set(path)
    images = images.to(data.device)
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    pixels = (255 * data.preprocess.undo(images).clamp(0, 1)).round().byte().cpu()
    by_class = [torch.nonzero(labels == c)[:, 0] for c in range(len(data.classes))]
    for name, index in zip(data.classes, by_class, strict=True):
        for i, image in enumerate(pixels[index]):
            png = io.BytesIO()
            to_pil_image(image).save(png, "png")
            common.save(png.getvalue(), folder / name.replace("/", "-") / f"{i:03d}.png")
    shown = images[torch.cat([index[:10] for index in by_class])]
    common.save_grid(folder / "grid.png", data, shown, columns=10)
    print(f"wrote {len(images)} images and grid.png to {folder}")


def jobs(paths, args):
    """Arguments of common.score for each file or core-set, network and number of epochs."""
    sets = [open_file(path, args) for path in paths]
    sets += [open_coreset(kind, args) for kind in args.coreset]
    for (data, *_), name in itertools.product(sets, filter(None, args.network)):
        net = build_network(name, data.shape, len(data.classes))
        with contextlib.suppress(RuntimeError, ValueError, AssertionError):
            if torch.is_tensor(net(torch.zeros(2, *data.shape))):
                continue
        raise common.UserError(f"{name} is not for images of {data.shape}: try convnet, resnet18")
    for one, name, epochs in itertools.product(sets, args.network, args.epochs):
        data, distilled, images, labels, protocol = one
        if name or epochs:  # the evaluations are of the file's own network and epochs
            distilled = distilled | {"evaluations": []}
        if name:
            protocol = replace(protocol, network=functools.partial(build_network, name))
        options = vars(args) | {"epochs": epochs or distilled["settings"]["epochs"]}
        yield data, distilled, images, labels, protocol, argparse.Namespace(**options)


def main(argv=None):
    usage = "%(prog)s [FILE ...] [--flag value ...]"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    add("--network", nargs="+", default=[""], metavar="X", help=f"{NETWORKS}, torchvision's")
    add("--epochs", nargs="+", type=int, default=[0], metavar="N", help="0: those of the file")
    add("--runs", type=int, default=5, help="networks trained for a score (5)")
    add("--coreset", nargs="+", default=[], choices=CORESETS, metavar="X", help=" ".join(CORESETS))
    add("--ipc", type=int, default=10, help="images per class for --coreset, --continual (10)")
    add("--dataset", default="", help="data set (that of the file, else glyphs)")
    add("--data-dir", default="data", help="folder of data sets and caches (data)")
    add("--size", type=int, default=0, help="resize a folder's images (as in the file)")
    add("--seed", type=int, default=0, help="seed of all random numbers (0)")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add("--out", default="out", help="folder of results.jsonl (out)")
    add("--corruption", nargs="?", const="made", metavar="DIR", help="test on corrupted images")
    add("--continual", choices=METHODS, metavar="METHOD", help="learn classes in steps")
    add("--steps", type=int, default=5, help="steps of --continual (5)")
    add("--orders", type=int, default=5, help="class orders of --continual (5)")
    add("--export", metavar="DIR", help="write the images of a file as PNG")
    add("--table", action="store_true", help="print OUT/results.jsonl as Markdown")
    args, words = parser.parse_known_args(argv)  # words: files, or flags of the method
    unknown = [word for word in words if word.startswith("-")]
    if unknown and not args.continual:
        raise common.UserError(f"unknown argument {unknown[0]}: see --help")
    if min(args.ipc, args.runs, args.steps, args.orders) < 1 or min(args.epochs) < 0:
        raise common.UserError("--ipc, --runs, --steps, --orders: 1 or more; --epochs: 0 or more")
    if not (words or args.coreset or args.continual or args.table):
        raise common.UserError("nothing to do: give files, --coreset, --continual or --table")
    others = args.export or args.corruption or args.coreset or any(args.network) or args.epochs[1:]
    if (args.continual and others) or (args.export and len(words) != 1):
        raise common.UserError("--export takes one file, --continual only flags of its method")
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.continual:
        continual(args, words)
    elif args.export:
        export(words[0], args.export, args)
    else:
        score = score_corruption if args.corruption else common.score
        for job in jobs(words, args):
            score(*job)
    if args.table:
        print_table(args)


if __name__ == "__main__":
    common.run(main)
