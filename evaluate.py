"""Score distilled files of any of the methods, and core-sets, on any of eight networks.

    python evaluate.py out/haba_cifar10_bpc9.pt --network convnet resnet18 vgg11     # a row for each network
    python evaluate.py --coreset random herding k-center forgetting whole --ipc 10 --dataset cifar10 --table

A row is the accuracy of fresh networks trained on the set (mean and standard deviation over --runs), next to that of
random real images of the same storage under the same protocol, and the gain over them. The protocol is the method's own
(the README, "Protocols"), with --network in place of its network. The data set and its preprocessing have to be those
that the file was distilled from. Every row is a line of JSON in OUT/results.jsonl; --table makes Markdown of them, with
the papers' numbers (results/targets.csv) beside ours. The same file, seed and machine give the same number to the last
digit on a CPU.

In place of such rows: --steps (accuracy over the training budget), --corruption (accuracy on corrupted test images),
--continual (classes that come a few at a time), --picture, --curves (loss and accuracy over iterations).
"""
import argparse
import collections
import csv
import dataclasses
import hashlib
import importlib
import io
import json
import math
import pathlib
import re

import numpy as np
import torch
from torch import nn

import common

METHODS = ("mtt", "haba", "dm", "kfs", "frepo", "translator_fewshot")
CORESETS = ("random", "herding", "k-center", "forgetting", "whole")
FEATURE_EPOCHS = 20  # of the network whose features choose a core-set
WHOLE_EPOCHS = 30    # at most, for the whole real set: one of its epochs is as long as hundreds of a distilled set's


# ------------------------------------------------------------------------------------------ networks

def build_network(name, norm="instance"):
    """-> build(shape, classes): network `name` for a protocol. Its first layers are those of the small-image variants
    (as in the code of DC and MTT) up to 64 pixels, torchvision's own beyond. norm: instance (GroupNorm with as many
    groups as channels; it does not mix images) or batch; the AlexNet of DC has none unless it is batch. No dropout and
    no stochastic depth: nothing in training is random but the batches. build raises UserError outside 28 to 256
    pixels."""
    def build(shape, classes):
        if name == "convnet":
            net = common.ConvNet(shape, classes)
        elif not 28 <= shape[-1] <= 256:
            raise common.UserError(f"{name} takes images of 28 to 256 pixels, these have {shape[-1]}: take --network "
                                   "convnet, or --size 32 for a folder")
        else:
            net = NETWORKS[name](shape, classes)
            net.kind, net.depth = name, ""
            if name == "alexnet" and norm != "batch":
                net.features = nn.Sequential(*(x for x in net.features if not isinstance(x, nn.BatchNorm2d)))
        return replace_norms(net, norm)

    return build


def replace_norms(net, norm):
    """Put `norm`, "instance" or "batch", where net has a norm of either kind; -> net."""
    for name, layer in net.named_children():
        if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            width = layer.weight.numel()
            setattr(net, name, nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(width, width))
        else:
            replace_norms(layer, norm)
    return net


def first_pad(shape, kernel=3):
    """Padding of a first convolution of stride 1: 28x28 digits become 32x32 maps, as in the ConvNet; five halvings want
    32."""
    return kernel // 2 + 2 * (shape[-1] < 32)


def build_alexnet(shape, classes):
    """DC's AlexNet for small images: 5x5 convolutions without stride, one linear layer on 4x4 maps; 1,872,202
    parameters for 3x32x32 and 10 classes (without norms). torchvision's stride of 4 leaves nothing of 32 pixels."""
    layers, channels = [], shape[0]
    for width, kernel, pool in ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)):
        pad = kernel // 2 if layers else first_pad(shape, kernel)
        layers += [nn.Conv2d(channels, width, kernel, padding=pad), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pool
        channels = width
    return nn.Sequential(collections.OrderedDict(features=nn.Sequential(*layers), pool=nn.AdaptiveAvgPool2d(4),
                                                 flatten=nn.Flatten(), classifier=nn.Linear(192 * 4 * 4, classes)))


def build_vgg11(shape, classes):
    """VGG11: torchvision's convolutions with norms, one linear layer in place of three; 9,231,114 parameters."""
    from torchvision.models.vgg import cfgs, make_layers
    features = make_layers(cfgs["A"], batch_norm=True)
    features[0] = nn.Conv2d(shape[0], 64, 3, padding=first_pad(shape))
    return nn.Sequential(collections.OrderedDict(features=features, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                                                 classifier=nn.Linear(512, classes)))


def build_resnet(blocks, average=False):
    """torchvision's ResNet of basic blocks (2, 2, 2, 2: ResNet18, 11,173,962 parameters; 1, 1, 1, 1: ResNet10,
    4,903,242), up to 64 pixels with a 3x3 stem and no pool. average: ResNetAP (IDC), average pools in place of strides
    (as in DC's ResNet18_AP but with one linear layer behind a global pool). Convolutions start as torch's do, like those of
    DC's code, not as torchvision's."""
    def build(shape, classes):
        from torchvision.models.resnet import BasicBlock, ResNet
        net = ResNet(BasicBlock, blocks, num_classes=classes)
        if shape[-1] <= 64:
            net.conv1, net.maxpool = nn.Conv2d(shape[0], 64, 3, padding=first_pad(shape), bias=False), nn.Identity()
        elif shape[0] != 3 or average:
            net.conv1 = nn.Conv2d(shape[0], 64, 7, 1 if average else 2, padding=3, bias=False)
            net.maxpool = nn.AvgPool2d(4) if average else net.maxpool
        for block in net.modules():
            if isinstance(block, nn.Conv2d):
                block.reset_parameters()
            if average and isinstance(block, BasicBlock) and block.stride == 2:
                block.conv1.stride = block.downsample[0].stride = (1, 1)
                block.conv2 = nn.Sequential(nn.AvgPool2d(2), block.conv2)
                block.downsample = nn.Sequential(block.downsample[0], nn.AvgPool2d(2), block.downsample[1])
        return net

    return build


def build_densenet121(shape, classes):
    """torchvision's DenseNet121; up to 64 pixels with a 3x3 stem and no pool: 6,956,426 parameters."""
    from torchvision.models import densenet121
    net = densenet121(num_classes=classes)
    if shape[-1] <= 64:
        net.features.conv0 = nn.Conv2d(shape[0], 64, 3, padding=first_pad(shape), bias=False)
        net.features.pool0 = nn.Identity()
    elif shape[0] != 3:
        net.features.conv0 = nn.Conv2d(shape[0], 64, 7, 2, padding=3, bias=False)
    return net


def build_efficientnet(shape, classes):
    """torchvision's EfficientNet-B0, up to 64 pixels with a stem of stride 1: 4,020,358 parameters."""
    from torchvision.models import efficientnet_b0
    net = efficientnet_b0(num_classes=classes, stochastic_depth_prob=0.)
    net.classifier = nn.Linear(net.classifier[1].in_features, classes)
    stride, pad = (1, first_pad(shape)) if shape[-1] <= 64 else (2, 1)
    net.features[0][0] = nn.Conv2d(shape[0], 32, 3, stride, pad, bias=False)
    return net


NETWORKS = {"convnet": common.ConvNet, "alexnet": build_alexnet, "vgg11": build_vgg11,
            "resnet18": build_resnet([2, 2, 2, 2]), "resnet10": build_resnet([1, 1, 1, 1]),
            "resnetap10": build_resnet([1, 1, 1, 1], average=True), "densenet121": build_densenet121,
            "efficientnet-b0": build_efficientnet}


# ------------------------------------------------------------------------------------------ core-sets

def train_features(data, data_dir, seed):
    """Train a ConvNet on the real set, once for all runs with this `data_dir` -> (ConvNet, forgetting events (n,)).

    SGD, lr 0.01, momentum 0.9, DSA. A forgetting event: a training image is classified rightly after an epoch and
    wrongly after the next (Toneva et al. 2019, who look at it whenever it is in a batch). The checkpoint is the cache;
    a kill costs a minute or the epoch under way."""
    device, images, labels = data.device, data.train, data.train_labels
    net = common.seeded((seed, "features"), common.ConvNet, data.shape, len(data.classes)).to(device)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    right, forgotten = (torch.zeros(len(images), device=device) for _ in range(2))
    order = hashlib.sha256(labels.cpu().numpy())  # the counts are by number: the same images in the same order
    order.update(images[:, :, images.shape[2] // 2].cpu().contiguous().numpy())
    path = pathlib.Path(data_dir) / "coresets" / f"{data.name}_{order.hexdigest()[:16]}_seed{seed}.ckpt"
    same, watch = common.identity("core-sets", data, 0, {}, seed), {"loss": torch.zeros(())}
    state = {"net": net, "sgd": sgd, "right": right, "forgotten": forgotten}
    parameters = {name: p[None] for name, p in net.named_parameters()}  # one network "side by side"
    for epoch in common.iterations(FEATURE_EPOCHS, path, same, state, watch):
        order = torch.randperm(len(images), generator=common.rng(seed, "features", epoch, device=device), device=device)
        for step, index in enumerate(order.split(256)):
            draw = common.draw_dsa(len(index), seed, "features", epoch, step, device=device, flip=data.flip)
            sgd.zero_grad()
            common.accumulate_gradient(net, parameters, common.dsa(images[index], *draw)[None], labels[index][None])
            sgd.step()
        with torch.no_grad(), common.autocast(device):
            now = torch.cat([net(x).argmax(1) for x in images.split(common.chunk_size(images))]) == labels
        forgotten += right * ~now
        right.copy_(now)
        watch["loss"] = 1 - right.mean()
    return net, forgotten


def herding(features, count):
    """Numbers (count,) of the rows of features (n, F) that, taken one after another, keep the mean of what was taken
    nearest to the mean of all."""
    mean, lengths, taken, total = features.mean(0), features.square().sum(1), [], torch.zeros_like(features[0])
    for k in range(1, count + 1):
        # || mean - (total + f) / k ||^2 = const + (||f||^2 - 2 f . (k mean - total)) / k^2
        distance = lengths - 2 * features @ (k * mean - total)
        taken.append(distance.index_fill(0, torch.stack(taken), torch.inf).argmin() if taken else distance.argmin())
        total = total + features[taken[-1]]
    return torch.stack(taken)


def k_center(features, count):
    """Numbers (count,) of rows of features (n, F): the one nearest to the mean, then, greedily, the one farthest from
    all that were taken."""
    taken = [(features - features.mean(0)).square().sum(1).argmin()]
    nearest = torch.full_like(features[:, 0], torch.inf)
    while len(taken) < count:
        nearest = torch.minimum(nearest, (features - features[taken[-1]]).square().sum(1))
        taken.append(nearest.argmax())
    return torch.stack(taken)


def choose_coreset(kind, data, ipc, data_dir, seed):
    """Indices (C * ipc,) of training images in class order. Forgetting: those with the most forgetting events, ties at
    random; images that were never right have none (Toneva et al. put those first). Raises UserError where a class has
    fewer than ipc images."""
    data.random_real(ipc)  # enough images? before the network is trained
    net, forgotten = train_features(data, data_dir, seed)
    chosen = []
    for label in range(len(data.classes)):
        members = torch.nonzero(data.train_labels == label)[:, 0]
        if kind == "forgetting":
            tie = torch.rand(len(members), generator=common.rng(seed, "ties", label)).to(data.device)
            chosen.append(members[(forgotten[members] + tie).topk(ipc).indices])
        else:
            features = common.features(net, data.train[members])
            chosen.append(members[{"herding": herding, "k-center": k_center}[kind](features, ipc)])
    return torch.cat(chosen)


def open_coreset(kind, data, ipc, args):
    """A core-set in the form of a distilled file and its sampler -> (dict, draw, count)."""
    if kind == "whole":
        sets = [(data.train, data.train_labels)]
    elif kind == "random":  # other images for every network, those that all other sets are compared with
        sets = [data.random_real(ipc, args.seed, "random real", run) for run in range(args.runs)]
    else:
        index = choose_coreset(kind, data, ipc, args.data_dir, args.seed)
        sets = [(data.train[index], data.train_labels[index])]
    per_class = len(sets[0][0]) / len(data.classes)
    described = {"method": kind, "dataset": data.name, "per_class": round(per_class), "step_size": None,
                 "stored_per_class": per_class * math.prod(data.shape), "settings": {}, "iterations": 0, "seconds": 0,
                 "seed": args.seed}

    def draw(run, index, *key):
        images, labels = sets[run % len(sets)]
        return images[index], labels[index]

    return described, draw, len(sets[0][0])


# ------------------------------------------------------------------------------------------ scores

@dataclasses.dataclass
class Set:
    """What can be scored: a distilled file or a core-set. draw and count: its sampler, as in common.train_and_test."""
    stem: str
    data: common.Dataset
    described: dict
    draw: object
    count: int
    method: object = None  # the module of a distilled file

    def protocol(self, name, args):
        """The method's protocol with network `name` (None: its own) and the norm and augmentation of the flags."""
        found = getattr(self.method, "PROTOCOL", common.PROTOCOL)
        found = dict(found(self.count) if callable(found) else found)
        if name or args.norm == "batch" and found["network"] is common.ConvNet:  # FRePo's network has no norm
            found["network"] = build_network(name or "convnet", args.norm)
        plain = args.no_dsa or self.described.get("augmentation") == "none"  # haba.py --no-dsa
        return found | ({"augment": ()} if plain else {})

    @property
    def variant(self):
        """What is not as in the method's main table: the translator's mode, HaBa's objective and ablations."""
        return self.method.variant(self.described["settings"]) if hasattr(self.method, "variant") else None

    def epochs(self, protocol, args):
        """--epochs, or the protocol's; of the whole real set at most WHOLE_EPOCHS."""
        epochs = args.epochs or protocol["epochs"]
        return min(epochs, WHOLE_EPOCHS) if self.described["method"] == "whole" else epochs


def open_sets(args):
    """Load all files and core-sets of the command line -> list of Set. Raises UserError for one that does not fit."""
    device, datasets, sets = common.pick_device(args.device), {}, []

    def load(name, size, zca):
        key = name, size, zca
        if key not in datasets:
            datasets[key] = common.load_dataset(name, args.data_dir, zca, size, device)
            check_networks(datasets[key], args)
        return datasets[key]

    for path, stem in zip(args.files, stems([pathlib.Path(path) for path in args.files])):
        distilled = common.load_distilled(path)
        if distilled["method"] not in METHODS:
            raise common.UserError(f"{path} was made by {distilled['method']!r}, which is none of {', '.join(METHODS)}")
        zca = {"zca": True, "zca-trace": "trace"}.get(distilled["preprocess"], False)
        data = load(args.dataset or distilled["dataset"], args.size or distilled["settings"]["size"], zca)
        check_fit(path, distilled, data)
        method = importlib.import_module(distilled["method"])  # its sampler turns what is stored into training images
        draw, count = method.sampler(distilled, data.device)
        sets.append(Set(stem, data, distilled, draw, count, method))
    for kind in args.coreset or ():
        if not (args.dataset or sets):
            raise common.UserError("--coreset needs the data set that it is taken from: add --dataset, e.g. cifar10")
        size = args.size or (sets[0].described["settings"].get("size") if sets else None)
        data = load(args.dataset or sets[0].described["dataset"], size, False)  # never whitened, as in the papers
        described, draw, count = open_coreset(kind, data, args.ipc, args)
        sets.append(Set(f"{kind}_{data.name}_ipc{args.ipc}", data, described, draw, count))
    return sets


def check_networks(data, args):
    """Raise UserError for a network of --network that does not fit the images: before the hours of the others."""
    for network in args.network or ():
        network_label({"network": build_network(network, args.norm)}, data)


def stems(paths):
    """Names of files for curves and pictures: with their folder, or a number, where two have the same."""
    names = [path.stem for path in paths]
    names = [name if names.count(name) == 1 else f"{path.absolute().parent.name}_{name}"
             for name, path in zip(names, paths)]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names, 1)]


def check_fit(path, distilled, data):
    """Raise UserError where a distilled file and a data set differ in image shape, classes or preprocessing."""
    for what, theirs, ours in (("image shape", tuple(distilled["shape"]), data.shape),
                               ("classes", list(distilled["classes"]), data.classes),
                               ("preprocessing", distilled["fingerprint"], data.preprocess.fingerprint)):
        if theirs != ours:
            theirs, ours = (str(v) if len(str(v)) < 60 else f"{len(v)} classes, {v[0]} ..." for v in (theirs, ours))
            raise common.UserError(f"{path} has {what} {theirs}, the data set {data.name} has {ours}: score it on the "
                                   "data it was distilled from (--dataset, --data-dir, --size)")


def network_label(protocol, data):
    """What a protocol's network for `data` is called in results, e.g. convnet3, resnet18, and its norm."""
    with torch.device("meta"):
        net = protocol["network"](data.shape, len(data.classes))
    kinds = {nn.BatchNorm2d: "batch", nn.GroupNorm: "instance"}
    norms = [kinds[type(layer)] for layer in net.modules() if type(layer) in kinds]
    return f"{net.kind}{net.depth}", norms[0] if norms else "none"


def score_sets(sets, args):
    """A row for every set, network and budget: printed, and a line in OUT/results.jsonl; with --steps also a curve."""
    known, curves = {}, {}
    for one in sets:
        for name in args.network or (None,):
            protocol = one.protocol(name, args)
            label, norm = network_label(protocol, one.data)
            for steps in args.steps or (None,):
                epochs = one.epochs(protocol, args)
                if steps:  # whole epochs, the number that is nearest
                    an_epoch = math.ceil(one.count / protocol["batch"])
                    epochs = max(1, round(steps / an_epoch))
                    steps = epochs * an_epoch
                # Sets of the same storage are compared with the same random images: those are trained on once.
                storage = math.ceil(one.described["stored_per_class"] / math.prod(one.data.shape))
                key = (one.data.preprocess.fingerprint, storage, label, norm, protocol["adam"], protocol["augment"],
                       steps or (epochs if protocol["adam"] else epochs / protocol["epochs"]))
                random = {} if one.described["method"] in ("random", "whole") else known.get(key)
                line = common.score(one.data, one.described | {"network": label}, one.draw, one.count, out_folder(args),
                                    epochs, args.runs, args.seed, protocol, steps, random, args.together,
                                    {"norm": norm, "variant": one.variant} | ({"steps": steps} if steps else {}))
                if one.described["method"] != "whole":
                    known[key] = {name: value for name, value in line.items() if name.startswith("random_")}
                if steps:
                    batch = protocol["batch"] if protocol["adam"] else common.PROTOCOL["batch"]
                    an_epoch = math.ceil(line["random_images_per_class"] * len(one.data.classes) / batch)
                    for what, point in ((one.stem, (steps, line["accuracy"], line["std"])),
                                        (f"random real as {one.stem}", (line["random_epochs"] * an_epoch,
                                                                        line["random_accuracy"], line["random_std"]))):
                        curves.setdefault(f"{what}, {label}", []).append(point)
    if args.steps:
        draw_curves(out_folder(args) / "steps.png", "accuracy over the training budget", "SGD steps", curves)


def out_folder(args):
    """--out, or the folder of the first file, or out."""
    return pathlib.Path(args.out or (pathlib.Path(args.files[0]).parent if args.files else "out"))


# ------------------------------------------------------------------------------------------ the table

def paper_number(line, targets):
    """The paper's accuracies for a line of results: "48.3 +- 0.8 (haba Tab.1 (BPC 1))", or "" where there is none. HaBa's
    rows are found by their bases a class, the others' by images; the translator's by its mode, in FRePo's network."""
    modes = {None: "", "adapted": "", "adapted ds": "-ds", "one-net": "-1net", "scratch": "-wo-pretrain",
             "autoencoder": "-ae", "no-adaptation": "-wo-ada", "bilevel": "-bilevel"}
    method, network, variant = line["method"], line["network"], line.get("variant")
    if line.get("norm") == "batch" or not line.get("augment", True) or line.get("steps"):
        return ""
    if method == "translator_fewshot" and network.startswith("frepo-"):
        method, network = f"translator{modes.get(variant, '?')}", network.removeprefix("frepo-")
    elif variant not in (None, "mtt"):  # another objective of HaBa's, an ablation
        return ""

    def fits(row):
        bases = re.search(r"BPC (\d+)", row["source"]) if row["method"] == "haba" else None
        budget = int(bases[1] if bases else row["images_per_class"])
        ours, theirs = (re.sub(r"convnet\d", "convnet", name) for name in (network, row["network"]))  # depth: by size
        return (row["method"].replace("kcenter", "k-center"), row["dataset"], theirs, budget) == (
            method, line["dataset"], ours, line["per_class"])

    return "; ".join(f"{row['mean']} +- {row['std']} ({row['source']})" for row in targets if fits(row))


def markdown_table(lines):
    """Lines of results.jsonl as a Markdown table, core-sets first; of a file scored twice alike the last one counts."""
    path = pathlib.Path(__file__).parent / "results" / "targets.csv"
    targets = list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []
    rows = {}
    for line in lines:
        order = CORESETS.index(line["method"]) if line["method"] in CORESETS else len(CORESETS)
        norm, augment = line.get("norm", "instance"), line.get("augment", True)  # older lines lack some
        gain = line.get("gain", round(line["accuracy"] - line["random_accuracy"], 2))
        name = f"{line['method']} {line.get('variant') or ''}".strip()
        steps = line.get("steps")
        key = (line["dataset"], order, name, line["per_class"], line["network"], norm, not augment, line["iterations"],
               steps or 0, line["epochs"], line["runs"], line.get("seed", 0), line.get("scoring_seed", 0),
               line.get("seconds", 0))  # of distilling: one file, one number
        rows[key] = (line["dataset"], name, line["per_class"], line["network"], norm, "yes" if augment else "no",
                     line["iterations"] or "", f"{line['runs']} x {f'{steps} steps' if steps else line['epochs']}",
                     f"{line['accuracy']:.2f} +- {line['std']:.2f}",
                     f"{line['random_accuracy']:.2f} +- {line['random_std']:.2f} ({line['random_images_per_class']})",
                     f"{gain:+.2f}", paper_number(line, targets))
    head = ("data", "set", "a class", "network", "norm", "DSA", "iterations", "runs x epochs", "accuracy",
            "random real (a class)", "gain", "the paper")
    return "\n".join("| " + " | ".join(map(str, row)) + " |"
                     for row in (head, ["---"] * len(head), *(rows[key] for key in sorted(rows)))) + "\n"


def read_results(path):
    """The scores in a results.jsonl -> list of dicts. Raises UserError where it is missing or broken."""
    needed = {"method", "dataset", "per_class", "network", "accuracy", "std", "runs", "epochs", "iterations",
              "random_accuracy", "random_std", "random_images_per_class"}
    lines = []
    try:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            line = json.loads(text)
            if "kind" in line:  # corruption and continual learning have other rows
                continue
            if not needed <= line.keys():
                raise ValueError
            lines.append(line)
    except OSError:
        raise common.UserError(f"{path} does not exist: score something first, or give its folder with --out") from None
    except (ValueError, TypeError, AttributeError):
        raise common.UserError(f"line {number} of {path} is not a score: remove that line") from None
    return lines


# ------------------------------------------------------------------------------------------ corrupted test images

# Levels 1 to 5 of CIFAR-10-C's gaussian noise, gaussian blur and contrast, as its authors' code has them.
MADE = {"noise": (.04, .06, .08, .09, .10), "blur": (.4, .6, .7, .8, 1.), "contrast": (.75, .5, .4, .3, .15)}


def corrupt(pixels, kind, level, *key):
    """Pixels (n, c, h, w) in [0, 1] -> the same corrupted, level 1 to 5, in 256 steps."""
    strength = MADE[kind][level - 1]
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=common.rng("corruption", level, *key)).to(pixels.device)
        pixels = pixels + strength * noise
    elif kind == "blur":
        from torchvision.transforms.functional import gaussian_blur
        pixels = gaussian_blur(pixels, 9, strength)  # four standard deviations each way, as there
    else:
        level_of = pixels.mean((2, 3), keepdim=True)
        pixels = level_of + strength * (pixels - level_of)
    return (pixels.clamp(0, 1) * 255).round() / 255


def load_corruptions(where, data):
    """Corrupted test images -> ({kind: level 1..5 -> preprocessed images (n, c, h, w)}, labels (n,)).

    where: "made", or a folder in the layout of CIFAR-10-C: KIND.npy (5 n, h, w, c) uint8, the levels one after another,
    and labels.npy (5 n,), numbers in alphabetical order of the classes. Raises UserError."""
    if where == "made":
        def make(kind, level):
            return torch.cat([data.preprocess(corrupt(data.preprocess.undo(part).clamp(0, 1), kind, level, i))
                              for i, part in enumerate(data.test.split(2048))])
        return {kind: (lambda level, kind=kind: make(kind, level)) for kind in MADE}, data.test_labels
    folder, arrays = pathlib.Path(where), {}
    try:
        labels = torch.from_numpy(np.load(folder / "labels.npy")).long().to(data.device)
        assert labels.ndim == 1 and 0 <= labels.min() and labels.max() < len(data.classes)
        for path in sorted(folder.glob("*.npy")):
            if path.name != "labels.npy":
                arrays[path.stem] = np.load(path, mmap_mode="r")
                assert arrays[path.stem].dtype == np.uint8
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, AssertionError):
        raise common.UserError(f"--corruption {where} cannot be used: give a folder with labels.npy (numbers of the "
                               "classes) and a .npy (uint8) for each corruption, as in CIFAR-10-C, or made") from None
    c, h, w = data.shape
    for kind, array in arrays.items():
        if array.shape != (len(labels), h, w, c) or len(labels) % 5:
            raise common.UserError(f"{folder / kind}.npy has shape {array.shape}, not ({len(labels)}, {h}, {w}, {c}), "
                                   "5 levels: take the corruptions of the data set that the file was distilled from")
    if not arrays:
        raise common.UserError(f"{folder} has no corruption beside labels.npy: put KIND.npy files there")
    n = len(labels) // 5

    def read(kind, level):
        part = torch.from_numpy(np.array(arrays[kind][n * (level - 1):n * level])).permute(0, 3, 1, 2)
        return data.preprocess(part.to(data.device))
    return {kind: (lambda level, kind=kind: read(kind, level)) for kind in arrays}, labels[:n]


def score_corruption(sets, args):
    """Accuracy on corrupted test images, mean over corruptions, level 0 (clean) to 5, of networks trained on each set
    and on random real images of the same storage (HaBa supplement, Fig. 2): lines in results.jsonl, and a curve."""
    curves = {}
    for one in sets:
        kinds, labels = load_corruptions(args.corruption, one.data)
        for name in args.network or (None,):
            protocol = one.protocol(name, args)
            label, norm = network_label(protocol, one.data)
            epochs = one.epochs(protocol, args)

            def test(net, parameters):  # -> accuracies (kinds, 6)
                clean = common.accuracy(net, parameters, one.data.test, one.data.test_labels)
                return [[clean] + [common.accuracy(net, parameters, images(level), labels) for level in range(1, 6)]
                        for images in kinds.values()]

            found = common.train_and_test(one.data, one.draw, one.count, protocol, one.described["step_size"], epochs,
                                          args.runs, args.seed, args.together, test)
            results = [(one.stem, one.described["method"], one.described["per_class"], found)]
            if one.described["method"] not in ("random", "whole"):
                per_class, _, found = common.score_random(one.data, one.described["stored_per_class"], protocol, epochs,
                                                          args.runs, args.seed, None, args.together, test)
                results.append((f"random real as {one.stem}", "random", per_class, found))
            for what, method, per_class, found in results:
                levels = np.array(found).mean(1)                                       # (runs, 6)
                each = {kind: np.array(found)[:, i].mean(0).round(2).tolist() for i, kind in enumerate(kinds)}
                line = {"kind": "corruption", "method": method, "dataset": one.data.name, "per_class": per_class,
                        "network": label, "norm": norm, "augment": bool(protocol["augment"]), "runs": args.runs,
                        "epochs": epochs, "level_accuracy": levels.mean(0).round(2).tolist(),
                        "level_std": levels.std(0).round(2).tolist(),
                        "corruptions": each, "folder": args.corruption, "scoring_seed": args.seed}
                common.append_line(json.dumps(line), out_folder(args) / "results.jsonl")
                print(f"{what}, {label}: clean, then levels 1 to 5, mean of {len(kinds)} corruptions: "
                      + ", ".join(f"{a:.2f}" for a in line["level_accuracy"]))
                curves[f"{what}, {label}"] = list(zip(range(6), line["level_accuracy"], line["level_std"]))
    draw_curves(out_folder(args) / "corruption.png", "accuracy on corrupted test images", "level of corruption", curves)


# ------------------------------------------------------------------------------------------ continual learning

def restrict(data, classes):
    """The images of some classes (a list of numbers), numbered anew in that order -> Dataset. Its fingerprint is its
    own: experts, means and checkpoints of other classes are not taken for its."""
    new = torch.full((len(data.classes),), -1, device=data.device)
    new[torch.tensor(classes)] = torch.arange(len(classes), device=data.device)
    train_labels, test_labels = new[data.train_labels], new[data.test_labels]
    of_train, of_test = train_labels >= 0, test_labels >= 0
    old = data.preprocess.fingerprint
    digest = hashlib.sha256(f"{old} {classes}".encode()).hexdigest()[:16]
    return dataclasses.replace(
        data, classes=[data.classes[c] for c in classes], train=data.train[of_train],
        train_labels=train_labels[of_train], test=data.test[of_test], test_labels=test_labels[of_test],
        preprocess=dataclasses.replace(data.preprocess, fingerprint=f"{data.preprocess.kind}-{digest}"))


def distil_stage(method, part, settings, args, path, first):
    """Distil the classes of one stage with the method's own function, or read what an earlier run left in `path`
    -> distilled dict. first: of KFS the first stage's, whose decoders the others keep (its appendix A). Raises
    UserError where `path` was made with other settings."""
    if path.exists():
        distilled = common.load_distilled(path)
        check_fit(path, distilled, part)
        # A file's settings tell more than was asked for; one that is younger than the file is as it was before it was there.
        same = settings | {name: value for name, value in distilled["settings"].items() if name in settings}
        if (same, distilled["seed"], distilled["per_class"]) != (settings, args.seed, args.ipc):
            raise common.UserError(f"{path} was distilled with other settings: remove its folder or take another --out")
        return distilled
    more = {"fixed": method.open_decoders(first, part.device)[1]} if first and method.METHOD == "kfs" else {}
    return method.distill_to_file(path, part, args.ipc, settings, args.seed, args.data_dir, **more)


def prepare_stages(method, args):
    """Load the data set, and the method's own settings for it with --set name=value in their place (objective=dm takes
    HaBa's for DM) -> Dataset, settings. Raises UserError."""
    given = dict(text.partition("=")[::2] for text in args.set or ())
    objective, device = given.get("objective", "mtt"), common.pick_device(args.device)
    if method.METHOD == "kfs":  # its settings follow from the size of the images
        data = common.load_dataset(args.dataset, args.data_dir, False, args.size, device)
        settings = method.settings_of(data.name, data.shape, args.ipc)
    else:
        table = getattr(method, "SETTINGS" if objective == "mtt" else f"{objective.upper()}_SETTINGS", None)
        if table is None:
            raise common.UserError(f"--set objective={objective}: {method.METHOD} has none such; HaBa has mtt, dm, dc")
        settings = getattr(method, "PAPER", {}) | common.settings_for(table, args.dataset, args.ipc)
        if method.METHOD == "translator_fewshot":  # without a file of a translator: one network, no translation
            settings["translator"] = None
        if "zca" in given:
            raise common.UserError("--set zca: whitening goes with the method and the data set: leave it out")
        data = common.load_dataset(args.dataset, args.data_dir, settings["zca"], args.size, device)
    for name, text in given.items():
        if name not in settings:
            raise common.UserError(f"--set {name}: {method.METHOD} has no such setting; it has {', '.join(settings)}")
        settings[name] = read_setting(name, text, settings[name])
    if method.METHOD == "translator_fewshot":
        settings["iterations"] = settings["steps"] + settings["adapt_steps"]  # in one network: T + S' steps
    return data, settings | {"size": args.size}


MAY_BE_0 = ("hallucinators", "depth", "max_start", "net_epochs")  # of the settings that count something


def read_setting(name, text, default):
    """The value of --set name=text: of the kind that `default` is, a number not below 0, or 1 where it counts something.
    Raises UserError."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if type(default) is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e3
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    value = tuple(value) if isinstance(value, list) else value
    least = 1 if type(default) is int and default and name not in MAY_BE_0 else 0
    if default is not None and type(value) is not type(default) or isinstance(value, (int, float)) and value < least:
        kind = "a number" if type(default) in (int, float) else "a value"
        raise common.UserError(f"--set {name}={text}: give {kind} like {json.dumps(default)}, at least {least}")
    return value


def join_samplers(parts, device):
    """Samplers of stages (draw, count, classes) as one -> (draw, count). Labels are numbered through; a soft label gets
    its own lowest number for the classes of other stages."""
    counts, classes = [count for _, count, _ in parts], [n for _, _, n in parts]
    ends, width = np.cumsum(counts), sum(classes)

    def draw(run, index, *key):
        images, labels = [], []
        for stage, (one, count, n) in enumerate(parts):
            own = index[(index >= ends[stage] - count) & (index < ends[stage])] - (ends[stage] - count)
            if len(own) == 0:
                continue
            x, y = one(run, own, *key, stage)
            before = sum(classes[:stage])
            if y.ndim == 2:
                wide = y.min(1, keepdim=True).values.expand(-1, width).clone()
                wide[:, before:before + n] = y
            images.append(x)
            labels.append(wide if y.ndim == 2 else y + before)
        return torch.cat(images), torch.cat(labels)

    return draw, int(ends[-1])


def continual(args):
    """Classes come --classes-per-step at a time in --orders random orders (numpy seeds 0, 1, ...): only the new ones
    are distilled, a fresh network is trained on all distilled sets so far and tested on all classes seen. Beside it
    random real images of the same storage. Files and scores of every stage are kept: the same command goes on.
    (Preprocessing is that of the whole data set from the first stage on.)"""
    if not args.dataset:
        raise common.UserError("--continual needs a data set: add --dataset, e.g. mnist")
    method, name = importlib.import_module(args.continual), pathlib.Path(args.dataset).name
    data, settings = prepare_stages(method, args)
    classes, per_step = len(data.classes), args.classes_per_step
    if per_step == 1 or classes % per_step == 1:
        raise common.UserError(f"--classes-per-step {per_step} leaves a stage of one class, of {classes}: take another "
                               "number")
    check_networks(data, args)
    folder = out_folder(args) / f"continual_{args.continual}_{name}_{args.ipc}_by{per_step}"
    scores = {}                                                            # {network: [order][stage] -> (ours, random)}
    for order in range(args.orders):
        permutation = np.random.RandomState(order).permutation(classes).tolist()
        stages, parts = [permutation[i:i + per_step] for i in range(0, classes, per_step)], []
        kept = []
        for stage, new in enumerate(stages):
            path = folder / f"order{order}_stage{stage}.pt"
            part = restrict(data, new)
            print(f"order {order}, stage {stage + 1} of {len(stages)}: {', '.join(part.classes)}", flush=True)
            kept.append(distil_stage(method, part, settings, args, path, kept[0] if kept else None))
            parts.append((*method.sampler(kept[-1], data.device), len(new)))
            seen = restrict(data, permutation[:stage * per_step + len(new)])
            for network in args.network or (None,):
                label, found = score_stage(method, seen, parts, kept, network, args, path)
                rows = scores.setdefault(label, [[] for _ in range(args.orders)])
                rows[order].append(found)
    curves = {}
    for label, rows in scores.items():
        table = np.array(rows)                                             # (orders, stages, 2)
        mean, std = table.mean(0), table.std(0)
        seen = [min((stage + 1) * per_step, classes) for stage in range(len(mean))]
        line = {"kind": "continual", "method": args.continual, "dataset": name, "per_class": args.ipc, "network": label,
                "classes_seen": seen, "orders": args.orders, "stage_accuracy": mean[:, 0].round(2).tolist(),
                "stage_std": std[:, 0].round(2).tolist(), "random_accuracy": mean[:, 1].round(2).tolist(),
                "random_std": std[:, 1].round(2).tolist(), "runs": args.runs, "epochs": args.epochs,
                "norm": args.norm, "augment": not args.no_dsa, "settings": settings, "scoring_seed": args.seed}
        common.append_line(json.dumps(line), out_folder(args) / "results.jsonl")
        for i, what in enumerate((args.continual, "random real")):
            curves[f"{what}, {label}"] = list(zip(seen, mean[:, i], std[:, i]))
            print(f"{what}, {label}, accuracy on {seen} classes: "
                  + ", ".join(f"{m:.2f} +- {s:.2f}" for m, s in zip(mean[:, i], std[:, i])))
    title = f"continual learning, {name}, {args.ipc} a class, {args.orders} orders"
    draw_curves(folder.with_name(f"{folder.name}.png"), title, "classes seen", curves)


def score_stage(method, seen, parts, kept, network, args, path):
    """Train on all distilled sets so far, test on all classes seen; the same with random real images of the same
    storage -> (network's label, (accuracy, accuracy of random)), kept in a file beside `path`."""
    draw, count = join_samplers(parts, seen.device)
    one = Set(path.stem, seen, kept[-1], draw, count, method)
    protocol = one.protocol(network, args)
    label, norm = network_label(protocol, seen)
    epochs = one.epochs(protocol, args)
    digest = hashlib.sha256()  # tells a stage that was distilled anew
    for tensor in (t for distilled in kept for t in distilled.values() if torch.is_tensor(t)):
        digest.update(tensor.contiguous().numpy())
    setting = {"network": label, "norm": norm, "augment": bool(protocol["augment"]), "runs": args.runs, "epochs": epochs,
               "seed": args.seed, "stages": digest.hexdigest()}
    record = path.with_name(f"{path.stem}_{label}_{norm}{'_no-dsa' * args.no_dsa}.json")
    if record.exists():
        stored = json.loads(record.read_text())
        if stored["setting"] == setting:
            return label, stored["accuracy"]
    rates = [distilled["step_size"] for distilled in kept]  # learned in every stage: their mean
    lr = None if None in rates else sum(rates) / len(rates)
    found = common.train_and_test(seen, draw, count, protocol, lr, epochs, args.runs, args.seed, args.together)
    storage = sum(t.numel() for stage, distilled in enumerate(kept) for name, t in distilled.items()
                  if torch.is_tensor(t) and t.is_floating_point() and name != "labels"
                  and not (stage and name.startswith("decoders."))) / len(seen.classes)  # KFS's decoders are kept once
    _, _, random = common.score_random(seen, storage, protocol, epochs, args.runs, args.seed, None, args.together)
    accuracy = [float(np.mean(found)), float(np.mean(random))]
    common.write(json.dumps({"setting": setting, "accuracy": accuracy}).encode(), record)
    return label, accuracy


# ------------------------------------------------------------------------------------------ pictures

PALETTE = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def write_image(image, path):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    common.write(buffer.getvalue(), path)
    print(f"wrote {path}")


def name_rows(path, classes):
    """Put the class names to the left of a picture whose rows are in class order."""
    from PIL import Image, ImageDraw
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    margin = 16 + int(max(font(18).getlength(name) for name in classes))
    named = Image.new("RGB", (picture.width + margin, picture.height), "white")
    named.paste(picture, (margin, 0))
    for i, name in enumerate(classes):
        ImageDraw.Draw(named).text((8, picture.height * (i + .5) / len(classes)), name, "black", font(18), anchor="lm")
    write_image(named, path)


def draw_pictures(sets, args):
    """--picture: `images`, a row a class; `factors`, what HaBa and KFS make images of; `plane`, a PCA of features."""
    for one in sets:
        for kind in args.picture:
            path = out_folder(args) / f"{one.stem}_{kind}.png"
            if kind == "plane":
                draw_plane(path, one, args)
                continue
            if kind == "images":
                index, labels = first_of_class(one, 10)
                images, _ = one.draw(0, index, args.seed, "picture")
                if one.described["method"] == "haba":  # brightness and contrast drift, see haba.picture
                    std, mean = torch.std_mean(images, (2, 3), keepdim=True)
                    real_std, real_mean = torch.std_mean(one.data.train[::50], (0, 2, 3), keepdim=True)
                    images = (images - mean) / (std + 1e-6) * real_std + real_mean
                common.save_picture(path, one.data, images, len(index) // len(one.data.classes))
            elif one.described["method"] == "haba":
                one.method.picture(path, one.data, one.described)
            elif one.described["method"] == "kfs":
                one.method.picture(path, one.data, *one.method.open_decoders(one.described, one.data.device))
            else:
                raise common.UserError(f"{one.stem} has no factors: bases and codes are in files of haba.py and kfs.py")
            name_rows(path, one.data.classes)


def first_of_class(one, most):
    """Entries of a set in class order, as many of every class (at most `most`) -> (indices, class numbers)."""
    every = torch.arange(one.count, device=one.data.device)
    labels = torch.cat([one.draw(0, part, "labels")[1] for part in every.split(4096)])
    labels = labels.argmax(1) if labels.ndim == 2 else labels
    count = min([most, *labels.bincount(minlength=len(one.data.classes)).tolist()])
    if count == 0:
        raise common.UserError(f"{one.stem} has a class without images by its soft labels: it cannot be drawn by class")
    index = torch.cat([torch.nonzero(labels == c)[:count, 0] for c in range(len(one.data.classes))])
    return index, labels[index]


def draw_plane(path, one, args):
    """Real images (dots) and those of the set (squares) by the first two principal components of the real ones'
    features, in a network trained on the real set. The papers use t-SNE, which bends distances; a plane does not."""
    from PIL import Image, ImageDraw
    net, _ = train_features(one.data, args.data_dir, args.seed)
    real, labels = one.data.random_real(min(200, one.data.train_labels.bincount().min().item()), "plane")
    index, own_labels = first_of_class(one, 50)
    real, own = common.features(net, real), common.features(net, one.draw(0, index, args.seed, "plane")[0])
    mean = real.mean(0)
    axes = torch.linalg.svd(real - mean, full_matrices=False)[2][:2].T          # (F, 2)
    points, own_points = ((f - mean) @ axes for f in (real, own))
    low, high = (torch.stack([f(0).values for f in (torch.cat([points, own_points]).min,
                                                    torch.cat([points, own_points]).max)]))
    side, margin = 1400, 60
    place = lambda p: ((p - low) / (high - low) * (side - 2 * margin) + margin).cpu().tolist()  # noqa: E731
    image = Image.new("RGB", (side + 300, side), "white")
    pen = ImageDraw.Draw(image)
    for (x, y), label in zip(place(points), labels.tolist()):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), lighten(PALETTE[label % 10]))
    for (x, y), label in zip(place(own_points), own_labels.tolist()):
        pen.rectangle((x - 9, y - 9, x + 9, y + 9), PALETTE[label % 10], "black", 2)
    for i, name in enumerate(one.data.classes[:30]):
        pen.rectangle((side + 10, 60 + 44 * i, side + 34, 84 + 44 * i), PALETTE[i % 10])
        pen.text((side + 46, 72 + 44 * i), name, "black", font(30), anchor="lm")
    title = f"features of real images (dots) and of {one.described['method']} (squares), PCA"
    pen.text((margin, 30), title, "black", font(30), anchor="lm")
    write_image(half(image), path)


def lighten(colour):
    """A colour "#rrggbb" half way to white."""
    return "#" + "".join(f"{(int(colour[i:i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


def draw_curves(path, title, x_label, curves):
    """Accuracy curves with their spread as a PNG. curves: {name: [(x, mean, std), ...]}."""
    from PIL import Image, ImageDraw
    xs = sorted({x for curve in curves.values() for x, _, _ in curve})
    heights = [m + sign * s for curve in curves.values() for _, m, s in curve for sign in (-1, 1)]
    image = Image.new("RGB", (1320, 1020 + 44 * len(curves)), "white")
    pen = ImageDraw.Draw(image)
    place = draw_axes(pen, (160, 100, 1100, 760), title, x_label, xs, heights, " %")
    for i, (name, curve) in enumerate(curves.items()):
        colour, at = PALETTE[i % len(PALETTE)], 1000 + 44 * i
        draw_curve(pen, place, curve, colour)
        pen.line((160, at, 220, at), colour, 6)
        pen.text((240, at), name, "black", font(), anchor="lm")
    write_image(half(image), path)


def draw_training(args):
    """--curves: for each checkpoint its loss over the iterations (means of a hundredth of them), and beside it the
    accuracies in its own network that OUT/results.jsonl has of its method, data set, budget and seed after so many
    iterations."""
    from PIL import Image, ImageDraw
    path = out_folder(args) / "results.jsonl"
    lines, height = read_results(path) if path.exists() else [], 560
    image = Image.new("RGB", (2200, height * len(args.curves)), "white")
    pen = ImageDraw.Draw(image)
    for i, checkpoint in enumerate(args.curves):
        stored = common.load(checkpoint, "a checkpoint")
        try:
            same = stored["settings"]
            method, dataset, per_class, seed = (same[key] for key in ("method", "dataset", "per class", "seed"))
            assert stored["losses"].isfinite().any()
        except (KeyError, TypeError, AttributeError, AssertionError):
            raise common.UserError(f"{checkpoint} has no losses: give the .ckpt of a distillation by this project"
                                   ) from None
        edges = np.linspace(0, stored["iteration"], min(100, stored["iteration"]) + 1).round().astype(int)
        means = [(int(end), stored["losses"][start:end].nanmean().item(), 0) for start, end in zip(edges, edges[1:])]
        means = [point for point in means if math.isfinite(point[1])]
        scored = {line["iterations"]: (line["iterations"], line["accuracy"], line["std"]) for line in lines
                  if (line["method"], line["dataset"], line["per_class"], line.get("seed")) == (
                      method, dataset, per_class, seed) and "convnet" in line["network"] and not line.get("steps")}
        for left, what, curve, unit in ((160, "loss", means, ""), (1260, "accuracy", sorted(scored.values()), " %")):
            if curve:
                place = draw_axes(pen, (left, 90 + height * i, 860, height - 200), f"{method}, {dataset}, {per_class} a "
                                  f"class: {what}", "iterations", ticks(0, max(x for x, _, _ in curve)),
                                  [m + sign * s for _, m, s in curve for sign in (-1, 1)], unit)
                draw_curve(pen, place, curve, PALETTE[0], dots=what == "accuracy")
    write_image(half(image), out_folder(args) / "curves.png")


def ticks(low, high):
    """Four to eleven round numbers from at or below low to at or above high."""
    rough = max(high - low, 1e-9) / 5
    step = min((m * 10. ** math.floor(math.log10(rough)) for m in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return [step * k for k in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def draw_axes(pen, box, title, x_label, xs, ys, unit):
    """Title, grid and numbers of a panel -> place(x, y) in pixels. box: its left, top, width, height; xs: the numbers to
    write below it; ys: what it has to hold."""
    left, top, width, height = box
    ys = ticks(min(ys), max(ys))
    scale = math.log if min(xs) > 0 and max(xs) / min(xs) > 20 else float        # budgets of 100 to 10000 steps

    def place(x, y):
        across = (scale(x) - scale(xs[0])) / ((scale(xs[-1]) - scale(xs[0])) or 1)
        return left + width * (.03 + .94 * across), top + height * (1 - (y - ys[0]) / ((ys[-1] - ys[0]) or 1))

    pen.text((left, top - 50), title, "black", font(), anchor="lm")
    for y in ys:
        at = place(xs[0], y)[1]
        pen.line((left, at, left + width, at), "#dddddd", 2)
        pen.text((left - 16, at), f"{y:.4g}{unit}", "black", font(), anchor="rm")
    for x in xs:
        pen.text((place(x, 0)[0], top + height + 30), f"{x:g}", "black", font(), anchor="mm")
    pen.text((left + width / 2, top + height + 80), x_label, "black", font(), anchor="mm")
    return place


def draw_curve(pen, place, curve, colour, dots=True):
    """A line through [(x, mean, std), ...]; dots: with a dot and the spread at each."""
    pen.line([place(x, mean) for x, mean, _ in curve], colour, 6, "curve")
    for x, mean, std in curve if dots else ():
        (px, py), above, below = place(x, mean), place(x, mean + std)[1], place(x, mean - std)[1]
        pen.line((px, above, px, below), colour, 3)
        pen.line((px - 10, above, px + 10, above), colour, 3)
        pen.line((px - 10, below, px + 10, below), colour, 3)
        pen.ellipse((px - 8, py - 8, px + 8, py + 8), colour)


def font(size=32):
    from PIL import ImageFont
    return ImageFont.load_default(size)


def half(image):
    """Pictures are drawn at twice their size: smooth lines without a library."""
    from PIL import Image
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


# ------------------------------------------------------------------------------------------ command line

def main():
    parser = argparse.ArgumentParser(description="Score distilled files and core-sets.",
                                     formatter_class=common.HelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", help="distilled files, e.g. out/haba_cifar10_bpc9.pt")
    add("--coreset", nargs="+", choices=CORESETS, metavar="NAME", help="real images to score: " + " ".join(CORESETS))
    add("--ipc", type=common.positive, default=1, help="images a class of core-sets; --continual: or HaBa's bases (1)")
    add("--dataset", help="where the real data are, if not under the name in the file")
    add("--data-dir", default="data", help="data sets and caches live here (data)")
    add("--size", type=common.positive, help="resize and crop a folder's pictures (as in the file)")
    add("--network", nargs="+", choices=NETWORKS, metavar="NAME",
        help="a row for each of: " + " ".join(NETWORKS) + " (the method's own)")
    add("--norm", choices=("instance", "batch"), default="instance", help="the networks' norm (instance)")
    add("--no-dsa", action="store_true", help="train without augmentation")
    add("--steps", type=common.positive, nargs="+", help="accuracy after training for as many SGD steps, and its curve")
    add("--corruption", help="accuracy on corrupted test images: a folder like CIFAR-10-C, or made (here)")
    add("--continual", choices=METHODS, metavar="METHOD", help="distil the classes of --dataset a few at a time")
    add("--classes-per-step", type=common.positive, default=2, metavar="N", help="new classes in a stage of it (2)")
    add("--orders", type=common.positive, default=5, help="orders of the classes with --continual (5)")
    add("--set", nargs="+", metavar="NAME=VALUE", help="settings of the method with --continual, e.g. iterations=100")
    add("--picture", nargs="+", choices=("images", "factors", "plane"), metavar="NAME",
        help="draw instead of scoring: images, factors (of HaBa, KFS), plane (PCA of features)")
    add("--curves", nargs="+", metavar="CKPT", help="draw loss and accuracy over iterations (OUT/results.jsonl)")
    add("--table", action="store_true", help="Markdown table of OUT/results.jsonl, kept as OUT/table.md")
    add("--together", choices=("yes", "no"), help="train a row's networks side by side (on a GPU yes, on a CPU no)")
    add("--seed", type=int, default=0, help="starts of the networks, order, augmentation (0)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--out", help="folder for results.jsonl (the first file's, or out)")
    common.add_scoring_arguments(parser)
    args = parser.parse_args()
    args.together = {"yes": True, "no": False}.get(args.together)
    args.network = list(dict.fromkeys(args.network or ())) or None
    if args.together and args.norm == "batch":
        raise common.UserError("--together yes is for instance norm: batch norm keeps averages; leave it out")

    if args.continual:
        continual(args)
    elif args.curves:
        draw_training(args)
    elif args.files or args.coreset:
        sets = open_sets(args)
        if args.picture:
            draw_pictures(sets, args)
        elif args.corruption:
            score_corruption(sets, args)
        else:
            score_sets(sets, args)
    elif not args.table:
        raise common.UserError("nothing to do: give distilled files, --coreset, --continual, --curves or --table")
    if args.table:
        table = markdown_table(read_results(out_folder(args) / "results.jsonl"))
        common.write(table.encode(), out_folder(args) / "table.md")
        print(table, end="")


if __name__ == "__main__":
    common.run(main)
