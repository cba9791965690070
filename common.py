"""What the methods share: data, DSA, the ConvNet, trajectories, ridge regression, scoring, files.

Images are (n, c, h, w). "Pixels" are uint8; "images" are network inputs, that is pixels
standardized per channel or ZCA-whitened. Before each draw the generators are seeded by a key such
as (seed, iteration, "real"), so a resumed run draws the same numbers.
"""

import argparse
import ctypes
import difflib
import hashlib
import inspect
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

# ------------------------------------------------------------ settings and command line


class UserError(Exception):
    """Invalid user input; shown as one line, exit status 2."""


def arg(default, text):
    """A setting with its help text. An int must be 1 or more, or 0 if the text explains "0:"."""
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    """Settings of every method. Each is a flag."""

    dataset: str = arg("glyphs", "glyphs, cifar10, cifar100, svhn, mnist, fashionmnist or a folder")
    data_dir: str = arg("data", "folder of data sets, experts and caches")
    size: int = arg(0, "center-crop images to squares and resize to this side; 0: keep them")
    zca: bool = arg(False, "whiten the images")
    seed: int = arg(0, "random seed; 0: file names get no _seed suffix")
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "auto: a GPU if there is one")
    out: str = arg("out", "folder for the distilled file, picture, checkpoint and results.jsonl")
    iterations: int = arg(1000, "iterations of the distillation; 0: none")
    runs: int = arg(5, "networks trained for the score")
    epochs: int = arg(0, "training epochs of each of these networks; 0: the protocol's")
    eval_every: int = arg(0, "score two networks every so many iterations; 0: at the end only")

    whitening = "zca"  # the kind of Preprocess
    budget = "ipc"  # the setting that holds images, or bases, per class
    free = ()  # the method's own settings that may change when a run is resumed

    @property
    def method(self):
        """Name of the script that defines these settings."""
        return pathlib.Path(inspect.getfile(type(self))).stem

    @property
    def per_class(self):
        """Images per class; bases in HaBa."""
        return getattr(self, self.budget)


def parse_args(cls, presets, argv=None):
    """Make flags from the dataclass `cls`. A flag beats a preset, a preset beats the default.

    presets: {(data set, images per class): settings}, or {objective: presets}. Of a data set's
    presets the one with the nearest budget (in ratio) is taken. A data set without presets takes
    CIFAR-10's, except `zca`.
    """
    title = inspect.getmodule(cls).__doc__.partition("\n")[0]
    options = {"usage": "%(prog)s [--flag value]", "allow_abbrev": False, "exit_on_error": False}
    options["epilog"] = "Presets replace defaults in brackets; a run prints the values in use."
    parser = argparse.ArgumentParser(description=title, **options)
    flags = {"--" + setting.name.replace("_", "-"): setting for setting in fields(cls)}
    helps = {flag: setting.metadata["help"] for flag, setting in flags.items()}
    for flag, setting in flags.items():
        options = {"type": type(setting.default), "choices": get_args(setting.type) or None}
        if setting.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif setting.type is tuple:
            options = {"type": int, "nargs": "*"}
        text = f"{helps[flag]} [{setting.default}]".replace("%", "%%")
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **options)

    known, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        hint = "".join(f", or {flag} ({helps[flag]})" for flag in near)
        raise UserError(f"unknown argument {unknown[0]}: see --help{hint}")
    given = vars(known)
    args = cls(**given)
    for flag, setting in flags.items():
        value = getattr(args, setting.name)
        least = int(setting.type is int and "0:" not in helps[flag])
        if setting.type in (int, float) and not least <= value < math.inf:
            raise UserError(f"{flag} {value}: use {least} or more")

    # the preset of this data set, or of CIFAR-10, with the nearest budget
    presets = presets.get(getattr(args, "objective", None), presets)
    name = pathlib.Path(args.dataset).name
    own = [key for key in presets if key[0] == name]
    similar = own or [key for key in presets if key[0] == "cifar10"]
    preset = presets[min(similar, key=lambda key: abs(math.log(args.per_class / key[1])))]
    if not own:
        preset = preset | {"zca": cls.zca}
    args = cls(**(preset | given))
    print(json.dumps(asdict(args)), flush=True)
    return args


def run(main):
    """Call main(). Invalid input, OSError, out of memory: one line, status 2; Ctrl-C: 130."""
    try:
        return main()
    except KeyboardInterrupt as stop:
        message = str(stop) or "stopped: repeat the command"
        status = 130
    except (UserError, argparse.ArgumentError, OSError, RuntimeError) as error:
        no_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        message = str(error).partition("\n")[0]
        status = 2
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------ random numbers, device


def hash_int(*key):
    """A 63-bit integer that depends on repr(key) only."""
    return int(hashlib.sha256(repr(key).encode()).hexdigest()[:16], 16) >> 1


def seed(*key):
    """Seed torch's generators, on all devices, by `key`."""
    torch.manual_seed(hash_int(*key))


def is_bfloat16(device):
    """Whether `autocast` computes in bfloat16: on a CPU with instructions for it."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device):
    """A context: bfloat16 on CPUs with AVX-512 BF16, float32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16(device))


def keep_memory():
    """Let malloc keep freed memory: fewer page faults make a step on a CPU faster."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(-4, 0)  # M_MMAP_MAX = 0: no mmapped blocks, which free() would unmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD = -1: free() never shrinks the heap


# ------------------------------------------------------------ data

STATS = {  # torchvision class, channel means, channel stds; MTT's code has CIFAR-10's for CIFAR-100
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ("CIFAR100", (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ("SVHN", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "mnist": ("MNIST", (0.1307,), (0.3081,)),
    "fashionmnist": ("FashionMNIST", (0.2861,), (0.3530,)),
}


@dataclass
class Dataset:
    """Network inputs on the device, float32 (n, c, h, w); labels are int64 (n,)."""

    name: str
    classes: list
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    preprocess: "Preprocess"

    def __post_init__(self):
        self.shape = tuple(self.train.shape[1:])
        self.device = self.train.device
        self.flip = self.name not in ("mnist", "svhn")  # whether a mirrored image keeps its label

    @cached_property
    def indices_by_class(self):
        """Training indices (C, size of the largest class); smaller classes end with -1."""
        indices = [torch.nonzero(self.train_labels == c)[:, 0] for c in range(len(self.classes))]
        return nn.utils.rnn.pad_sequence(indices, batch_first=True, padding_value=-1)

    @cached_property
    def smallest_class(self):
        return (self.indices_by_class >= 0).sum(1).min().item()

    def sample(self, per_class, *key):
        """Sample without replacement, class after class -> images (C * per_class, ...), labels."""
        n = self.smallest_class
        if per_class > n:
            raise UserError(f"the smallest class of {self.name} has {n} images, not {per_class}")
        seed(*key)
        index = self.draw(self.indices_by_class, per_class).flatten()
        return self.train[index], self.train_labels[index]

    def draw(self, rows, per_class):
        """Draw from rows of `indices_by_class` without replacement -> indices (rows, per_class)."""
        order = torch.rand(rows.shape, device=self.device).masked_fill(rows < 0, -1)
        return rows.gather(1, order.topk(per_class).indices)

    def batch(self, size, *key):
        """Training images drawn with replacement -> images (size, ...), labels."""
        seed(*key)
        index = torch.randint(len(self.train), (size,), device=self.device)
        return self.train[index], self.train_labels[index]


def load_dataset(args, name=None, kind=None):
    """Load and preprocess args.dataset, or `name` -> Dataset. kind: see Preprocess."""
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.device not in ("auto", device):
        raise UserError(f"--device {args.device} is not available: use --device cpu")
    torch.backends.cudnn.benchmark = True  # TF32 stays at torch's default: convolutions only

    name = name or args.dataset
    *arrays, classes = read_images(name, args)
    train, train_labels, test, test_labels = (array.to(device) for array in arrays)
    height, width = train.shape[2:]
    if height != width or not 16 <= height <= 256:
        raise UserError(f"{name} has images of {width}x{height}: add --size 32 (or 64, 128)")
    name = pathlib.Path(name).name
    kind = kind or (args.whitening if args.zca else "standardize")
    preprocess = Preprocess.fit(name, train, train_labels, kind, args.data_dir)
    train, test = preprocess(train), preprocess(test)
    keep_memory()  # only now, so that the system gets the memory of reading and whitening back
    return Dataset(name, classes, train, train_labels, test, test_labels, preprocess)


def read_images(name, args):
    """Read uint8 pixels, cached -> training images, labels, test images, labels, classes."""
    if name == "glyphs" and args.size:
        raise UserError("glyphs have 16x16 pixels: leave out --size")
    if name == "glyphs":
        return [*draw_glyphs(500, 0)[:2], *draw_glyphs(50, 1)]
    try:
        splits = open_splits(name, args.data_dir)
        files = [path for split in splits for path, _ in getattr(split, "samples", [])]
        stamp = hash_int(name, args.size, [(path, os.stat(path).st_mtime_ns) for path in files])
        path = pathlib.Path(args.data_dir) / ".cache" / f"images_{stamp:016x}.pt"
        arrays = cached(path, partial(decode_images, splits, args.size))
    except (OSError, ValueError, RuntimeError, SyntaxError, ImportError) as error:
        reason = str(error).partition(". ")[0]
        places = f": put it into {args.data_dir}/{name}/train/<class>/ and test/" * (name in STATS)
        raise UserError(f"{name} cannot be read ({reason}){places}") from None
    classes, test_classes = (list(getattr(s, "classes", "0123456789")) for s in splits)  # SVHN
    if len(classes) < 2 or classes != test_classes:
        raise UserError(f"{name}: train and test need the same classes, two or more")
    return [*arrays, classes]


def open_splits(name, data_dir):
    """Open a folder with train/<class>/* and test/ or val/, or a set of torchvision."""
    for folder in (pathlib.Path(name), pathlib.Path(data_dir) / name):
        if (folder / "train").is_dir():
            test = "test" if (folder / "test").is_dir() else "val"
            return [torchvision.datasets.ImageFolder(folder / split) for split in ("train", test)]
    if name not in STATS:
        known = ", ".join(["glyphs", *STATS])
        raise UserError(f"{name} is no data set: use {known}, or a folder with train/ and test/")
    build = getattr(torchvision.datasets, STATS[name][0])
    splits = ("train", "test") if name == "svhn" else (True, False)  # split=, or train=
    return [build(data_dir, split, download=True) for split in splits]


def decode_images(splits, size):
    """Decode, crop and resize if size > 0 -> [train pixels, labels, test pixels, labels]."""
    fit = [partial(ImageOps.fit, size=(size, size))] if size else []
    arrays = []
    for split in splits:
        split.transform = Compose([*fit, pil_to_tensor])
        pixels, labels = zip(*split, strict=True)
        if len({image.shape for image in pixels}) > 1:
            raise ValueError("its images differ in size: add --size 32 (or 64, 128)")
        arrays += [torch.stack(pixels), torch.tensor(labels)]
    return arrays


GLYPHS = {"triangle": 3, "square": 4, "diamond": 4, "hexagon": 6, "disc": 32}  # number of sides


def draw_glyphs(per_class, split):
    """Draw bright glyphs on dark, noisy grounds -> uint8 pixels (n, 3, 16, 16), labels, names."""
    random = np.random.default_rng([7, split])
    pixels = []
    names = [f"{style} {name}" for name in GLYPHS for style in ("filled", "hollow")]
    for style, name in [label.split() for label in names]:
        for _ in range(per_class):
            mask = Image.new("L", (96, 96))
            circle = (*random.uniform(36, 60, 2), random.uniform(24, 36))
            turn = random.uniform(-15, 15) + 45 * (name == "diamond")
            width = 10 if style == "hollow" else 48
            ImageDraw.Draw(mask).regular_polygon(circle, GLYPHS[name], turn, None, 255, width)
            mask = np.asarray(mask.resize((16, 16), Image.BOX))[..., None] / 255
            ground, color = random.uniform(0, 0.4, 3), random.uniform(0.6, 1, 3)
            blotches = random.normal(0, 0.1, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
            image = ground + mask * (color - ground) + blotches
            image = image + random.normal(0, 0.2, image.shape)
            pixels.append((image.clip(0, 1) * 255).astype(np.uint8))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.arange(10).repeat_interleave(per_class), names


@dataclass
class Preprocess:
    """Pixels to network inputs and back.

    kind: "standardize": (x - mean) / std per channel. "zca" (MTT, HaBa): (x - mean image) W, with
    W = U diag(1 / sqrt(s + 0.1)) U^T for the covariance U diag(s) U^T. "zca-trace" (FRePo): the
    same on standardized pixels, with 0.1 mean(s) in place of 0.1.
    """

    kind: str
    fingerprint: str  # kind and hash of the training set; must match between files
    mean: torch.Tensor  # (c, 1, 1), or with ZCA the mean image
    std: torch.Tensor  # (c, 1, 1)
    whiten: torch.Tensor = None  # W (d, d)

    @classmethod
    def fit(cls, name, pixels, labels, kind, data_dir):
        """Fit to uint8 training pixels. ZCA matrices are cached. Raises UserError."""
        total = pixels.sum(0, dtype=torch.int64)
        content = [len(pixels), total.flatten().tolist()]
        if name in STATS:
            mean, std = torch.tensor(STATS[name][1:], device=pixels.device)
        else:  # a folder's labels may change
            content.append(labels.tolist())
            std, mean = torch.std_mean(pixels / 255, (0, 2, 3))
        mean, std = mean[:, None, None], std.clamp_min(0.01)[:, None, None]
        fingerprint = f"{kind}-{hash_int(*content):016x}"
        if kind == "standardize":
            return cls(kind, fingerprint, mean, std)

        if total.numel() > 3 * 64 * 64:
            raise UserError(f"images of {name} are too large to whiten: add --no-zca")
        mean = (total / len(pixels) / 255).float()
        if kind == "zca":
            std = torch.ones_like(std)
        path = pathlib.Path(data_dir) / ".cache" / f"{fingerprint}_whiten.pt"
        whiten = cached(path, partial(fit_zca, pixels, mean, std, kind)).to(pixels.device)
        return cls(kind, fingerprint, mean, std, whiten)

    def __call__(self, pixels):
        """uint8 pixels (n, c, h, w) -> network inputs, float32."""
        images = (pixels / 255 - self.mean) / self.std
        if self.whiten is not None:
            images = (images.flatten(1) @ self.whiten).view_as(images)
        return images

    def undo(self, images):
        """Network inputs -> pixels in [0, 1], not clamped."""
        if self.whiten is not None:
            flat = torch.linalg.solve(self.whiten, images.flatten(1), left=False)
            images = flat.view_as(images)
        return images * self.std + self.mean


def fit_zca(pixels, mean, std, kind):
    """Whitening matrix W (d, d) of uint8 pixels, see Preprocess."""
    x = ((pixels / 255 - mean) / std).flatten(1)
    values, vectors = torch.linalg.eigh((x.T @ x).double() / (len(x) - 1))
    ridge = 0.1 if kind == "zca" else 0.1 * values.mean()
    return (vectors / (values.clamp_min(0) + ridge).sqrt() @ vectors.T).float()


# ------------------------------------------------------------ augmentation


def dsa(images, flip, *key, shared=False):
    """Apply a random transform of DSA (Zhao & Bilen 2021), its parameters drawn per image.

    shared: one set of parameters for all images, so that two batches of any size get the same
    transform for the same key (Siamese DSA). flip: whether mirroring is allowed.
    """
    names = ("color", "crop", "cutout", "scale", "rotate") + ("flip",) * flip
    seed(*key)
    u = torch.rand(1 if shared else len(images), 3, device=images.device)
    return transform(images, names[hash_int(*key) % len(names)], u)


def transform(images, name, u):
    """Apply a transform of DSA with parameters u (n or 1, 3), uniform in [0, 1)."""
    side = images.shape[-1]
    if name == "color":  # brightness +-0.5, saturation 0 .. 2, contrast 0.5 .. 1.5
        return adjust_color(images, u[:, 0] - 0.5, u[:, 1] * 2, u[:, 2] + 0.5)
    if name == "flip":  # with p = 0.5
        return torch.where(u[:, 0].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)
    if name == "cutout":  # a square of half the side, centered anywhere
        return cut(images, (u[:, :2] * (side + 1)).floor() - side // 4, side // 2)
    if name == "crop":  # shift by whole pixels, at most 1/8 of the side; zeros outside
        reach = round(side / 8)
        y, x = 2 / side * ((u[:, :2] * (2 * reach + 1)).floor() - reach).T
        return warp(images, 1, 0, 0, 1, x, y)
    if name == "scale":  # each axis by 1/1.2 .. 1.2
        sx, sy = (1 / 1.2 + u[:, :2] * (1.2 - 1 / 1.2)).T
        return warp(images, sx, 0, 0, sy)
    angle = (u[:, 0] - 0.5) * math.radians(30)  # +-15 degrees
    return warp(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def frepo_augment(images, flip, *key, scale=False):
    """Apply FRePo's scoring augmentation; scale: add scaling, as the authors' PyTorch branch."""
    names = ("color", "crop", "translate", "cutout", "rotate") + ("flip",) * flip
    names += ("scale",) * scale
    name = names[hash_int(*key) % len(names)]
    side = images.shape[-1]
    seed(*key)
    u = torch.rand(len(images), 3, device=images.device)
    a, b, c = (2 * u - 1).T
    if name == "color":  # brightness +-0.25, saturation and contrast exp(+-0.25)
        return adjust_color(images, a / 4, (b / 4).exp(), (c / 4).exp())
    if name == "crop":  # zoom 0.8 .. 1.25
        zoom = 1.025 + 0.225 * a
        return warp(images, zoom, 0, 0, zoom, padding="border")
    if name == "translate":  # by up to 1/8 of the side, edges repeated
        return warp(images, 1, 0, 0, 1, a / 4, b / 4, padding="border")
    if name == "cutout":  # a square of a quarter of the side, inside
        return cut(images, (u[:, :2] * (side - side // 4 + 1)).floor(), side // 4)
    return transform(images, name, u)


def adjust_color(images, brightness, saturation, contrast):
    """Add brightness, scale around the gray image, then around the mean; parameters (n,)."""
    images = images + brightness.view(-1, 1, 1, 1)
    gray = images.mean(1, keepdim=True)
    images = gray + (images - gray) * saturation.view(-1, 1, 1, 1)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * contrast.view(-1, 1, 1, 1)


def cut(images, corner, side):
    """Set a square of `side` pixels to 0; corner (n, 2): its top left (y, x), also negative."""
    pixel = torch.arange(images.shape[-1], device=images.device)
    inside = (pixel >= corner[..., None]) & (pixel < corner[..., None] + side)  # (n, 2, h)
    return images * ~(inside[:, 0, None, :, None] & inside[:, 1, None, None, :])


def warp(images, a, b, c, d, x=0, y=0, padding="zeros"):
    """Affine resampling: output(p) = input([[a, b], [c, d]] p + [x, y]), p in [-1, 1]^2."""
    zero = torch.zeros(len(images), device=images.device)
    theta = torch.stack([zero + value for value in (a, b, x, c, d, y)], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images.dtype), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


# ------------------------------------------------------------ the ConvNet


class AvgPool(nn.Module):
    """2x2 average pool; on a CPU by two additions, faster than nn.AvgPool2d."""

    def forward(self, x):
        if x.is_cuda:
            return F.avg_pool2d(x, 2)
        even = x.shape[-1] // 2 * 2
        top, bottom = x[..., :even, :even].unflatten(-2, (-1, 2)).unbind(-2)
        left, right = (top + bottom).unflatten(-1, (-1, 2)).unbind(-1)
        return (left + right) / 4


class ConvNet(nn.Module):
    """The field's ConvNet: blocks of conv 3x3, instance norm, ReLU, average pool; then linear.

    Depth 3 for 28 and 32 pixels, 4 for 64, 5 for 128; 320,010 parameters for 3x32x32, 10 classes.
    norm=False, double=True: FRePo's, without a norm and of widths 128, 256, 512.
    """

    def __init__(self, shape, classes, norm=True, double=False, width=128):
        super().__init__()
        channels, size = shape[0], shape[-1]
        pad = 3 if (channels, size) == (1, 28) else 1  # 28x28 digits become 32x32 maps
        size += 2 * (pad - 1)
        depth = max(1, round(math.log2(size)) - 2)
        self.kind = f"{'frepo-' * double}convnet{depth}"
        self.blocks = nn.Sequential()
        for i in range(depth):
            self.blocks.append(nn.Conv2d(channels, width, 3, padding=1 if i else pad))
            if norm:
                self.blocks.append(nn.GroupNorm(width, width))  # instance norm: a group per channel
            self.blocks.extend([nn.ReLU(inplace=True), AvgPool()])
            channels, size = width, size // 2
            width *= 1 + double
        self.classifier = nn.Linear(channels * size * size, classes)

    def reset(self, *key):
        """Draw torch's default initialization anew, on the network's device -> self."""
        seed(*key)
        for layer in self.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return self

    def features(self, images):
        """Inputs of the linear layer (n, d). On a CPU 32 images at a time, which is faster."""
        chunk = len(images) if images.is_cuda else 2**15 // images[0, 0].numel() or 1
        return torch.cat([self.blocks(x).flatten(1) for x in images.split(chunk)])

    def forward(self, images):
        """Logits (n, classes)."""
        return self.classifier(self.features(images))


@torch.no_grad()
def frozen_features(net, images):
    """net.features without a graph, 512 images at a time -> (n, d) of the images' type."""
    with autocast(images.device):
        return torch.cat([net.features(x).to(images.dtype) for x in images.split(512)])


def flatten(net):
    """All parameters as one detached vector (P,)."""
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def unflatten(net, flat):
    """Inverse of `flatten`: a vector (P,) -> {name: view}, for functional_call."""
    named = dict(net.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    return {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}


# ------------------------------------------------------------ trajectories (MTT, HaBa)


def load_experts(data, args):
    """Load expert trajectories (MTT Sec. 3.1), train missing ones -> (experts, epochs + 1, P).

    A file holds an expert's parameters at the start and after each epoch. Existing experts of other
    seeds are used before new ones are trained. With --iterations 0 only the seed's own count, so
    that an array job fills one folder.
    """
    epochs = args.max_start - 1 + args.expert_epochs
    folder = pathlib.Path(args.data_dir) / "experts" / f"{data.name}_{data.preprocess.fingerprint}"
    own = [folder / f"seed{args.seed}_expert{i:03d}.pt" for i in range(args.experts)]
    others = sorted(set(folder.glob("seed*.pt")) - set(own)) if args.iterations else []
    paths = sorted(own + others, key=lambda path: not path.exists())  # existing ones first
    return torch.stack([train_expert(data, path, epochs) for path in sorted(paths[: args.experts])])


def train_expert(data, path, epochs):
    """Load an expert, train what is missing (SGD, lr 0.01, batch 256, DSA) -> (epochs + 1, P)."""
    net = ConvNet(data.shape, len(data.classes)).to(data.device).reset(path.stem)
    trajectory = flatten(net)[None]
    if path.exists():
        trajectory = load(path, "an expert").to(data.device)
        net.load_state_dict(unflatten(net, trajectory[-1]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    done = len(trajectory) - 1
    progress = Progress(epochs, path.stem, done)
    for epoch in range(done, epochs):
        real = data.train[None], data.train_labels
        train_epoch(net, optimizer, data, *real, Protocol(), path.stem, epoch)
        trajectory = torch.cat([trajectory, flatten(net)[None]])
        save(trajectory.cpu(), path)
        progress.step()
    return trajectory[: epochs + 1]


def sample_segment(experts, args, *key):
    """Parameters (P,) of a random expert at epochs t and t + M, t < max_start (the paper: <=)."""
    expert = experts[hash_int(*key, "expert") % len(experts)]
    t = hash_int(*key, "start") % args.max_start
    return expert[t], expert[t + args.expert_epochs]


def student_indices(count, batch, step, *key, device="cpu"):
    """Indices (b,) of the images of a student step: all, or the next `batch` of a shuffled pass.

    The rest of a pass that does not fill a batch is dropped; the authors' code uses it.
    """
    if not 0 < batch < count:
        return torch.arange(count, device=device)
    steps = count // batch
    seed(*key, "pass", step // steps)
    return torch.randperm(count, device=device)[step % steps * batch :][:batch]


def student_gradient(net, params, images, labels, create_graph=True):
    """Gradient (P,) of the cross-entropy at parameters `params` (P,), a leaf."""
    loss = F.cross_entropy(functional_call(net, unflatten(net, params), images), labels)
    return torch.autograd.grad(loss, params, create_graph=create_graph)[0]


@lru_cache(1)
def graphed_gradient(net, shape):
    """student_gradient and its backward pass as two CUDA graphs, for images of `shape`.

    A graph launches the hundreds of kernels of a student step at once; one by one, a small step
    waits for launches most of its time. A call overwrites the result of the last one.
    """
    params = flatten(net).requires_grad_()
    images = torch.zeros(shape, device=params.device).requires_grad_()
    labels = torch.zeros(shape[0], dtype=torch.int64, device=params.device)
    inputs = params, images, labels
    graphed = torch.cuda.make_graphed_callables(partial(student_gradient, net), inputs)

    def gradient(params, images, labels, create_graph=True):
        # A product, as autograd may keep the graph's memory as the .grad of a leaf
        return graphed(params, images * 1, labels)

    return gradient


def match_trajectory(net, start, target, step_size, batch, steps, kept=None):
    """Unroll a student, compare it with an expert, differentiate (HaBa Eq. 7, survey Eq. 30).

    start, target: expert parameters (P,) at epochs t and t + M. batch(n) -> images, labels of step
    n; gradients accumulate in its leaves. The last `kept` steps keep their graphs, those of the
    others are rebuilt going back. Default: as many steps as 550 images of 32x32 fill, less two.
    A GPU keeps none and replays CUDA graphs. -> loss, gradient of step_size (0-d).
    """
    lr = step_size.detach()
    student = start
    tape = []
    images, _ = batch(0)
    if start.is_cuda:
        kept, gradient_at = 0, graphed_gradient(net, images.shape)
    else:
        gradient_at = partial(student_gradient, net)
        if kept is None:
            kept = 550 * 32 * 32 // images[:, 0].numel() - 2  # [:, 0]: pixels without channels
    for n in range(steps):
        keep = n >= steps - kept
        with torch.set_grad_enabled(keep):
            images, labels = batch(n)
        params = student.detach().requires_grad_()
        gradient = gradient_at(params, images, labels, create_graph=keep)
        tape.append((params, gradient if keep else None))
        student = student - lr * gradient.detach()

    scale = (start - target).square().sum()
    loss = (student - target).square().sum() / scale
    adjoint = 2 * (student - target) / scale  # dL / d student, carried back step by step
    step_size_grad = torch.zeros_like(lr)
    for n in reversed(range(steps)):
        params, gradient = tape.pop()
        if gradient is None:
            gradient = gradient_at(params, *batch(n))
        step_size_grad -= gradient.detach() @ adjoint
        (-lr * (gradient @ adjoint)).backward()  # accumulates in batch's leaves and params.grad
        adjoint = adjoint + params.grad
    return loss, step_size_grad


# ------------------------------------------------------------ ridge regression (FRePo, translator)


def krr(support, labels, ridge=1e-6):
    """Kernel ridge regression (survey Eq. 14): w = f^T (f f^T + ridge trace(f f^T) / n I)^-1 y.

    support f (n, d), labels y (n, C) -> w (d, C); features (m, d) @ w are the predictions. In
    float64, as float32 rounds the ridge away; all NaN if the Cholesky factorization fails.
    """
    f = support.double()
    kernel = f @ f.T
    eye = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(kernel + ridge * kernel.diagonal().mean() * eye)
    factor = torch.where(failed > 0, torch.nan, factor)
    weights = f.T @ torch.cholesky_solve(labels.double(), factor)
    return weights.to(support.dtype)


def half_square(predicted, labels):
    """Half the squared error, summed over classes, mean over images (survey Eq. 17)."""
    return 0.5 * (predicted - labels).square().sum(1).mean()


def center_labels(labels, classes, scale=1.0):
    """FRePo's labels for class numbers (n,): (one-hot - 1 / C) / scale, (n, C)."""
    return (F.one_hot(labels, classes) - 1 / classes) / scale


def margin_loss(labels):
    """FRePo's hinge on soft labels (n, C): -min(largest - second largest, 1 / C), averaged."""
    first, second = labels.topk(2).values.T
    return -(first - second).clamp(max=1 / labels.shape[1]).mean()


def cosine_decay(step, steps):
    """Factor of FRePo's learning rate: half a cosine from 1 to 0.1."""
    return 0.55 + 0.45 * math.cos(math.pi * step / steps)


# ------------------------------------------------------------ scoring


@dataclass
class Protocol:
    """How a network is trained on a distilled set; the defaults are those of DM, MTT and HaBa.

    The authors train 1001 epochs, lower the rate after 502 and reset the momentum; DC trains 300.
    """

    network: Callable = ConvNet  # network(shape, classes)
    augment: Callable = dsa  # augment(images, flip, *key)
    mix: Callable = None  # mix(images, soft labels, *key) -> images, soft labels
    epochs: int = 1000
    batch: int = 256
    lr: float = 0.01
    drops: tuple = (0.5,)  # shares of the epochs after which lr is multiplied by `decay`
    decay: float = 0.1
    regression: bool = False  # FRePo: squared error on centered labels, warm-up and cosine
    optimizer: Callable = partial(torch.optim.SGD, momentum=0.9)
    weight_decay: float = 5e-4

    def rate(self, epoch, count):
        """Learning rate in an epoch over `count` images."""
        if not self.regression:
            return self.lr * self.decay ** sum(epoch >= share * self.epochs for share in self.drops)
        # linear warm-up of 500 steps (at most half of all), then a cosine to 1 %
        warm = min(500 / math.ceil(count / self.batch), self.epochs / 2)
        if epoch < warm:
            return self.lr * min(1, (epoch + 1) / warm)
        share = (epoch - warm) / (self.epochs - warm)
        return self.lr * (0.505 + 0.495 * math.cos(math.pi * share))


def frepo_protocol(count, augment=frepo_augment, weight_decay=0.0):
    """How FRePo and the translator train on `count` images; steps as in FRePo's code."""
    steps = {10: 1000, 100: 2000, 200: 20000, 400: 5000, 500: 5000, 1000: 10000, 2000: 40000}
    nearest = min(steps, key=lambda n: abs(math.log(count / n)))
    epochs = steps[nearest] // math.ceil(count / 500)
    network = partial(ConvNet, norm=False, double=True)
    rest = {"regression": True, "optimizer": torch.optim.AdamW, "weight_decay": weight_decay}
    return Protocol(network, augment, epochs=epochs, batch=500, lr=3e-4, **rest)


def train_epoch(net, optimizer, data, images, labels, protocol, *key):
    """Train for an epoch on (V, n, c, h, w): V variants of n images, one drawn at each use."""
    seed(*key)
    order = torch.randperm(len(labels), device=data.device)
    variants = torch.randint(len(images), order.shape, device=data.device)
    criterion = half_square if protocol.regression else F.cross_entropy
    batches = zip(order.split(protocol.batch), variants.split(protocol.batch), strict=True)
    for step, (i, v) in enumerate(batches):
        inputs = protocol.augment(images[v, i], data.flip, *key, step)
        targets = labels[i]
        if protocol.mix:
            inputs, targets = protocol.mix(inputs, targets, *key, step)
        with autocast(data.device):
            loss = criterion(net(inputs).float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(data, images, labels, protocol, *key):
    """Train a fresh network -> network. images (V, n, c, h, w), labels (n,) or soft (n, C)."""
    classes = len(data.classes)
    seed(*key)
    net = protocol.network(data.shape, classes).to(data.device)
    optimizer = protocol.optimizer(net.parameters(), weight_decay=protocol.weight_decay)
    if labels.ndim == 1 and protocol.regression:
        labels = center_labels(labels, classes)
    elif labels.ndim == 1:
        labels = F.one_hot(labels, classes).float()
    progress = Progress(protocol.epochs, "training epochs")
    for epoch in range(protocol.epochs):
        optimizer.param_groups[0]["lr"] = protocol.rate(epoch, len(labels))
        train_epoch(net, optimizer, data, images, labels, protocol, *key, epoch)
        progress.step()
    return net.eval()


@torch.no_grad()
def accuracy(net, images, labels):
    """Percentage of images (n, c, h, w) classified as `labels` (n,)."""
    with autocast(images.device):
        predicted = torch.cat([net(x).argmax(1) for x in images.split(500)])
    return 100 * (predicted == labels).float().mean().item()


def train_and_test(data, images, labels, protocol, args, step_size=None, k=0):
    """Train network k as in `train`, with the rate step_size if given -> test accuracy in %."""
    lr = protocol.lr if step_size is None else float(step_size)
    protocol = replace(protocol, lr=lr, epochs=args.epochs or protocol.epochs)
    net = train(data, images, labels, protocol, args.seed, "score", k)
    return accuracy(net, data.test, data.test_labels)


def score(data, distilled, images, labels, protocol, args):
    """Score a distilled set and random real images of the same storage -> row of results.jsonl.

    The random real images are scored by DM's protocol (1000 epochs, or --epochs), for FRePo and the
    translator by their own.
    """
    baseline = protocol if protocol.regression else Protocol(protocol.network)
    real_per_class = math.ceil(distilled["stored_per_class"] / math.prod(data.shape))
    real_per_class = min(real_per_class, data.smallest_class)
    began = time.time()
    ours = []
    random = []
    for k in range(args.runs):
        ours.append(train_and_test(data, images, labels, protocol, args, distilled["step_size"], k))
        real, real_labels = data.sample(real_per_class, args.seed, "random real", k)
        random.append(train_and_test(data, real[None], real_labels, baseline, args, None, k))

    names = ("method", "dataset", "per_class", "iterations", "seconds", "evaluations", "settings")
    row = {name: distilled[name] for name in names}
    row |= {
        "network": protocol.network(data.shape, len(data.classes)).kind,
        "accuracy": round(np.mean(ours), 2),
        "std": round(np.std(ours), 2),
        "best": max([value for _, value in row["evaluations"]], default=None),
        "random": round(np.mean(random), 2),
        "random_std": round(np.std(random), 2),
        "random_per_class": real_per_class,
        "runs": args.runs,
        "epochs": args.epochs or protocol.epochs,
        "seed": args.seed,
        "scoring_seconds": round(time.time() - began),
    }
    what = f"{row['method']} on {data.name}, {row['per_class']} per class, {row['network']}, "
    what += f"{args.runs} x {row['epochs']} epochs"
    real = f"random real images, {real_per_class} per class: {row['random']}"
    print(f"{what}: {row['accuracy']} +- {row['std']} % ({real} +- {row['random_std']} %)")
    append_row(row, data.device, args.out)
    return row


def append_row(row, device, folder):
    """Add hardware, torch version, commit and command, append to folder/results.jsonl."""
    hardware = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    here = pathlib.Path(__file__).parent
    commit = subprocess.getoutput(f"git -C '{here}' describe --always --dirty=+ 2>/dev/null")
    command = " ".join(["python", *sys.argv])
    row |= dict(hardware=hardware, torch=torch.__version__, commit=commit, command=command)
    with open(pathlib.Path(folder) / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------ files


def save(content, path):
    """Write `path` atomically: bytes as they are, anything else by torch.save."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    if isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        torch.save(content, temporary)
    os.replace(temporary, path)


def load(path, what):
    """torch.load(weights_only=True) onto the CPU. Raises UserError."""
    try:
        return torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of {what}") from None
    except Exception:
        raise UserError(f"{path} is broken or not {what}: move it away or give another") from None


def cached(path, make):
    """Load `path`; if it is missing, first save make() there."""
    if not path.exists():
        save(make(), path)
    return load(path, "a cache")


def output_path(args, kind=""):
    """Make the folder args.out -> path of the distilled file, e.g. out/dm_cifar10_ipc10.pt."""
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f"_seed{args.seed}" if args.seed else ""
    dataset = pathlib.Path(args.dataset).name
    return folder / f"{args.method}{kind}_{dataset}_{args.budget}{args.per_class}{suffix}.pt"


def save_distilled(path, data, args, tensors, run, step_size=None):
    """Write `tensors` and what is needed to use them -> the content, a dict.

    stored_per_class: numbers per class, without labels. step_size: rate to train with, or None.
    """
    stored = sum(t.numel() for name, t in tensors.items() if name != "labels")
    distilled = {
        "method": args.method,
        "dataset": data.name,
        "classes": data.classes,
        "shape": list(data.shape),
        "per_class": args.per_class,
        "stored_per_class": stored / len(data.classes),
        "preprocess": data.preprocess.kind,
        "fingerprint": data.preprocess.fingerprint,
        "mean": data.preprocess.mean.cpu(),
        "std": data.preprocess.std.cpu(),
        "step_size": None if step_size is None else float(step_size),
        "settings": asdict(args),
        "iterations": args.iterations,
        "seconds": round(run.record["seconds"], 1),
        "evaluations": run.record["evaluations"],
    }
    distilled |= {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save(distilled, path)
    print(f"wrote {path}")
    return distilled


def save_grid(path, data, images, columns):
    """Write images (n, c, h, w) as a PNG, `columns` in a row; whitening is undone."""
    pixels = data.preprocess.undo(images.detach()).clamp(0, 1)
    pixels = F.interpolate(pixels, scale_factor=max(1, 64 // data.shape[-1]))
    buffer = io.BytesIO()
    torchvision.utils.save_image(pixels, buffer, format="png", nrow=columns, pad_value=1)
    save(buffer.getvalue(), path)


# ------------------------------------------------------------ long work


class Progress:
    """A line on stderr every ten seconds and at the end. done: work of an earlier run."""

    def __init__(self, total, what, done=0):
        self.total = total
        self.what = what
        self.done = self.start = done
        self.began = self.shown = time.time()

    def step(self, loss=None):
        self.done += 1
        now = time.time()
        if now - self.shown < 10 and self.done < self.total:
            return
        self.shown = now
        each = (now - self.began) / (self.done - self.start)
        left = timedelta(seconds=round(each * (self.total - self.done)))
        text = f"{self.what} {self.done}/{self.total}, {each:.3g} s each, {left} left"
        if loss is not None:
            text += f", loss {loss.item():.4f}"
        print(text, file=sys.stderr, flush=True)


class Run:
    """A distillation that can be stopped and continued.

    If the checkpoint exists, it restores state ({name: tensor, module or optimizer}) in place; its
    settings and the hash of `inputs` (a tensor, e.g. the experts) must match, but `iterations` may
    be larger, unless the rate depends on them (extend=False). evaluate(k) -> accuracy of network
    k in %; the mean of two is recorded every args.eval_every iterations. Raises UserError.
    """

    def __init__(self, path, data, args, state, evaluate=None, inputs=None, extend=True):
        self.path = path.with_suffix(".ckpt")
        self.args = args
        self.state = state
        self.evaluate = evaluate
        settings = asdict(args) | {"data": data.preprocess.fingerprint}
        free = "data_dir", "device", "out", "runs", "epochs", "eval_every", *args.free
        for name in free + ("iterations",) * extend:
            settings.pop(name, None)
        if inputs is not None:
            settings["experts or inputs"] = hashlib.sha256(inputs.cpu().numpy()).hexdigest()
        self.record = {"settings": settings, "done": 0, "seconds": 0.0, "evaluations": []}
        self.record["losses"] = "iteration,loss,seconds\n"
        if self.path.exists():
            try:
                self.restore(load(self.path, "a checkpoint"))
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"move {self.path} away, it cannot be restored: {error}") from None

        self.start = self.record["done"]
        self.progress = Progress(args.iterations, "iterations", self.start)
        self.saved = time.time()
        self.began = self.saved - self.record["seconds"]
        self.interrupted = False
        if self.start < args.iterations:
            signal.signal(signal.SIGINT, self.interrupt)

    def restore(self, stored):
        settings = self.record["settings"]
        wrong = [name for name in settings if settings[name] != stored["settings"].get(name)]
        if wrong:
            raise UserError(f"{self.path} differs in {', '.join(wrong)}: remove it or change --out")
        done = stored["done"]
        if done > self.args.iterations:
            raise UserError(f"{self.path} has {done} iterations: use as many, or another --out")
        print(f"{self.path}: continuing after {done} iterations")
        state = stored.pop("state")
        self.record = stored
        for name, value in self.state.items():
            if torch.is_tensor(value):
                value.data.copy_(state[name])
            else:
                value.load_state_dict(state[name])

    def interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one stops at once

    def step(self, it, loss):
        """Show progress; save once a minute, at the end and on Ctrl-C."""
        done = self.record["done"] = it + 1
        self.progress.step(loss)
        if self.evaluate and self.args.eval_every and done % self.args.eval_every == 0:
            # two networks, as a curve of one network misleads
            mean = (self.evaluate(k=0) + self.evaluate(k=1)) / 2
            self.record["evaluations"].append((done, round(mean, 2)))
        last = done == self.args.iterations
        if last or done % math.ceil(self.args.iterations / 100) == 0:
            self.record["losses"] += f"{done},{loss.item()},{time.time() - self.began:.1f}\n"
        if last or self.interrupted or time.time() - self.saved >= 60:
            self.save(loss.item())
        if last:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.interrupted:
            raise KeyboardInterrupt(f"stopped after {done} iterations: repeat to continue")

    def save(self, loss):
        """Write the checkpoint, and the losses so far as <stem>.csv."""
        done = self.record["done"]
        state = {k: v if torch.is_tensor(v) else v.state_dict() for k, v in self.state.items()}
        tensors = [leaf for leaf in tree_leaves(state) if torch.is_tensor(leaf)]
        if not math.isfinite(loss) or not all(t.isfinite().all() for t in tensors):
            raise UserError(f"not finite at iteration {done}: use smaller learning rates")
        self.saved = time.time()
        self.record["seconds"] = self.saved - self.began
        save(self.record | {"state": state}, self.path)
        save(self.record["losses"].encode(), self.path.with_suffix(".csv"))
