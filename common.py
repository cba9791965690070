"""What every method needs: settings, data, DSA, the ConvNet, training and scoring, files.

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
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.datasets.folder import make_dataset
from torchvision.transforms.functional import pil_to_tensor

# ------------------------------------------------------------ settings, random numbers, device


class UserError(Exception):
    """Invalid user input; shown as one line, exit status 2."""


def arg(default, text, least=None):
    """Declare a setting: default, help text, least valid number (None: 1 for int, else 0)."""
    least = int(type(default) is int) if least is None else least
    return field(default=default, metadata={"help": f"{text} [{default}]", "least": least})


@dataclass
class Args:
    """Settings of every method. Each is a flag."""

    dataset: str = arg("glyphs", "glyphs, cifar10, cifar100, svhn, mnist, fashionmnist or a folder")
    data_dir: str = arg("data", "folder of data sets, experts and caches")
    size: int = arg(0, "center-crop images to squares and resize to this side; 0: keep them", 0)
    zca: bool = arg(False, "whiten the images")
    flip: bool = arg(True, "mirrored images keep their class (mnist, svhn: False)")
    seed: int = arg(0, "random seed; 0: file names get no _seed suffix", 0)
    device: Literal["auto", "cpu", "cuda"] = arg("auto", "auto: a GPU if there is one")
    out: str = arg("out", "folder for the distilled file, picture, checkpoint and results.jsonl")
    iterations: int = arg(1000, "iterations of the distillation; 0: none", 0)
    runs: int = arg(5, "networks trained for the score")
    epochs: int = arg(0, "training epochs of each of these networks; 0: the protocol's", 0)
    eval_every: int = arg(0, "score two networks every so many iterations; 0: at the end only", 0)
    compile: bool = arg(True, "compile networks by torch.compile; needs g++, a minute (glyphs: no)")

    # Preprocess.kind with --zca
    whitening = "zca"
    # the setting that counts images (HaBa: bases) per class
    budget = "ipc"
    # paths and device: left out of files and rows; Run compares a path's content (`inputs`)
    places = ("data_dir", "device", "out")
    # a resumed run may change these
    free = ("iterations", "runs", "epochs", "eval_every", "compile")

    @property
    def method(self):
        """Name of the script that defines these settings."""
        return pathlib.Path(inspect.getfile(type(self))).stem

    def stored(self):
        """List the settings for files and rows: {name: value}."""
        return {name: value for name, value in asdict(self).items() if name not in self.places}


def parse_args(cls, presets, argv=None):
    """Make flags from the dataclass `cls`. A flag beats a preset, a preset beats the default.

    presets: {(data set, images per class): settings}, or {objective: presets}. The nearest budget
    (in ratio) of the data set counts; a data set without presets takes CIFAR-10's, except `zca`.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.usage = "%(prog)s [--flag value]"
    parser.description = inspect.getmodule(cls).__doc__.partition("\n")[0]
    parser.epilog = "Presets replace defaults in brackets; a run prints the values in use."
    flags = {"--" + setting.name.replace("_", "-"): setting for setting in fields(cls)}
    for flag, setting in flags.items():
        options = {"type": type(setting.default), "choices": get_args(setting.type) or None}
        if setting.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif setting.type is tuple:
            options = {"type": int, "nargs": "*"}
        parser.add_argument(flag, help=setting.metadata["help"], default=setting.default, **options)

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        hint = "".join(f", or {flag} ({flags[flag].metadata['help']})" for flag in near)
        raise UserError(f"unknown argument {unknown[0]}: see --help{hint}")
    for flag, setting in flags.items():
        value = getattr(given, setting.name)
        least = setting.metadata["least"]
        if setting.type in (int, float) and not least <= value < math.inf:
            raise UserError(f"{flag} {value}: use {least} or more")

    presets = presets.get(getattr(given, "objective", None), presets)
    name = pathlib.Path(given.dataset).name
    own = [key for key in presets if key[0] == name]
    similar = own or [key for key in presets if key[0] == "cifar10"]
    budget = getattr(given, cls.budget)
    preset = presets[min(similar, key=lambda key: abs(math.log(budget / key[1])))]
    if not own:
        preset = preset | {"zca": cls.zca}
    parser.set_defaults(flip=name not in ("mnist", "svhn"), compile=name != "glyphs", **preset)
    args = cls(**vars(parser.parse_args(argv)))
    print(json.dumps(asdict(args)), flush=True)
    return args


def cli(main):
    """Call main(). Invalid input, no memory, no compiler: one line, status 2; Ctrl-C: 130."""
    try:
        return main()
    except KeyboardInterrupt:
        message = "stopped: the same command continues from the last checkpoint, if there is one"
        status = 130
    except (UserError, argparse.ArgumentError, OSError, RuntimeError, MemoryError) as error:
        message = str(error).partition("\n")[0] or "out of memory"
        status = 2
        no_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message
        # torch's class is private
        if type(error).__name__ == "InductorError":
            message += ": use --no-compile"
        elif isinstance(error, RuntimeError) and not no_memory:
            raise
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def hash_int(*key):
    """A 63-bit integer that depends on repr(key) only."""
    return int(hashlib.sha256(repr(key).encode()).hexdigest()[:16], 16) >> 1


def seed(*key):
    """Seed torch's generators by `key`: torch.manual_seed's numbers, 70 times faster."""
    number = hash_int(*key)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def setup(args):
    """Set up cuDNN, torch.compile and malloc for this process -> device. Raises UserError."""
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.device not in ("auto", device):
        raise UserError(f"--device {args.device} is not available: use --device cpu")
    torch.backends.cudnn.benchmark = True
    # each batch size is compiled by itself, so a resumed run computes the same
    torch._dynamo.config.recompile_limit = 100
    compiling(args.compile)
    # malloc keeps freed memory, which saves page faults: M_MMAP_MAX = 0, M_TRIM_THRESHOLD = -1
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)
        libc.mallopt(-1, -1)
    return torch.device(device)


def compiling(on):
    """Let torch.compile compile or not, from here on or as a context."""
    return torch.compiler.set_stance("default" if on else "force_eager")


def fast_type(x):
    """bfloat16 for float32 on CPUs with AVX-512 BF16; else x.dtype (GPU: TF32 in convolutions)."""
    fast = x.dtype == torch.float32 and not x.is_cuda and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else x.dtype


def autocast(x):
    """A context in which convolutions and matrix products compute in fast_type(x)."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_type(x) == torch.bfloat16)


# ------------------------------------------------------------ data

# torchvision class, channel means, channel stds; MTT's code has CIFAR-10's for CIFAR-100
STATS = {
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
    fingerprint: str
    test_fingerprint: str
    flip: bool = True

    def __post_init__(self):
        self.shape = tuple(self.train.shape[1:])
        self.device = self.train.device

    @cached_property
    def indices_by_class(self):
        """Training indices (C, size of the largest class); smaller classes end with -1."""
        indices = [torch.nonzero(self.train_labels == c)[:, 0] for c in range(len(self.classes))]
        return nn.utils.rnn.pad_sequence(indices, batch_first=True, padding_value=-1)

    @cached_property
    def smallest_class(self):
        return (self.indices_by_class >= 0).sum(1).min().item()

    def at_most(self, per_class):
        """Limit real images per class to the size of the smallest class; print if that is less."""
        if per_class > self.smallest_class:
            print(f"--batch-real: {self.smallest_class}, the size of the smallest class")
        return min(per_class, self.smallest_class)

    def sample(self, per_class, *key):
        """Sample without replacement, class after class -> images (C * per_class, ...), labels."""
        n = self.smallest_class
        if per_class > n:
            raise UserError(f"the smallest class of {self.name} has {n} images, not {per_class}")
        seed(*key)
        rows = self.indices_by_class
        order = torch.rand(rows.shape, device=self.device).masked_fill(rows < 0, -1)
        index = rows.gather(1, order.topk(per_class).indices).flatten()
        return self.train[index], self.train_labels[index]

    def batch(self, size, *key):
        """Training images drawn with replacement -> images (size, ...), labels."""
        seed(*key)
        index = torch.randint(len(self.train), (size,), device=self.device)
        return self.train[index], self.train_labels[index]


def load_dataset(args, device):
    """Read and preprocess args.dataset -> Dataset. Raises UserError."""
    splits, classes, source = read_images(args)
    name = pathlib.Path(args.dataset).name
    h, w = splits[0][0].shape[2:]
    counts = " + ".join(str(len(labels)) for _, labels in splits)
    print(f"{source}: {counts} images of {w}x{h}, {len(classes)} classes", flush=True)
    if h != w or not 16 <= h <= 256:
        raise UserError(f"{name} has images of {w}x{h}: add --size 32 (or 64, 128)")
    kind = args.whitening if args.zca else "standardize"
    fingerprints = []
    for pixels, labels in splits:
        digest = hashlib.sha256(repr((classes, STATS.get(name), labels.tolist())).encode())
        digest.update(pixels.numpy())
        fingerprints.append(f"{kind}-{digest.hexdigest()[:16]}")
    cache = pathlib.Path(args.data_dir) / ".cache" / f"whiten_{fingerprints[0]}.pt"
    preprocess = Preprocess.fit(splits[0][0].to(device), kind, STATS.get(name), cache)
    train, test = [(preprocess(x.to(device)), labels.to(device)) for x, labels in splits]
    return Dataset(name, classes, *train, *test, preprocess, *fingerprints, args.flip)


def read_images(args):
    """Read args.dataset -> [(train pixels, labels), (test pixels, labels)], classes, source."""
    name = args.dataset
    if name == "glyphs" and args.size:
        raise UserError("glyphs have 16x16 pixels: leave out --size")
    if name == "glyphs":
        return [draw_glyphs(500, 0), draw_glyphs(50, 1)], GLYPHS, name
    # a known name is no path: a folder of that name in the working directory is not taken
    places = [pathlib.Path(name)] * (name not in STATS) + [pathlib.Path(args.data_dir) / name]
    folders = [folder for folder in places if (folder / "train").is_dir()]
    if not folders and name not in STATS:
        raise UserError(f"{name} is no data set: use glyphs, {', '.join(STATS)}, or <folder>/train")
    try:
        if folders:
            return read_folder(folders[0], args)
        build = getattr(torchvision.datasets, STATS[name][0])
        splits = []
        for split in ("train", "test") if name == "svhn" else (True, False):
            found = build(args.data_dir, split, download=True)
            images, labels = zip(*sorted(found, key=lambda sample: sample[1]), strict=True)
            splits.append((to_pixels(images, args.size), torch.tensor(labels)))
        return splits, list(getattr(found, "classes", "0123456789")), f"{name} by torchvision"
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        hint = f": put it into {places[-1]}/train/<class>/ and test/<class>/" * (name in STATS)
        raise UserError(f"{name} cannot be read ({reason}){hint}") from None


def read_folder(folder, args):
    """Read train/<class>/* and test/, or val/ if test/ has other classes -> as read_images."""
    listed = {name: list_images(folder / name) for name in ("train", "test", "val")}
    classes, train = listed["train"]
    same = [name for name in ("test", "val") if listed[name][0] == classes]
    if len(classes) < 2 or not same:
        differ = {*classes} ^ {*(listed["test"][0] or listed["val"][0])}
        found = ", ".join(sorted(differ)[:5]) or "one class at most"
        raise UserError(f"{folder}: train/ and test/ (or val/) need the same classes ({found})")
    paths, labels = zip(*train, *listed[same[0]][1], strict=True)
    channels = 1 if folder.name in ("mnist", "fashionmnist") else 3
    # cache key: path, size and change time of each file
    files = [(os.path.abspath(path), os.stat(path)) for path in paths]
    key = hash_int(args.size, channels, [(x, stat.st_size, stat.st_ctime_ns) for x, stat in files])
    cache = pathlib.Path(args.data_dir) / ".cache" / f"images_{key:016x}.pt"
    if not cache.exists():
        save(to_pixels((open_image(path, channels) for path in paths), args.size), cache)
    tensors = (load(cache, "a cache"), torch.tensor(labels))
    arrays = [tensor.tensor_split([len(train)]) for tensor in tensors]
    return list(zip(*arrays, strict=True)), classes, f"{folder}/train and {same[0]}"


def list_images(folder):
    """List what Pillow opens in <class>/, except hidden files -> classes, [(path, label)]."""
    classes = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    formats = Image.registered_extensions()

    def is_picture(path):
        hidden = f"{os.sep}." in path.removeprefix(str(folder))
        return not hidden and formats.get(os.path.splitext(path)[1].lower()) in Image.OPEN

    numbers = {name: number for number, name in enumerate(classes)}
    return classes, make_dataset(folder, numbers, is_valid_file=is_picture) if classes else []


def open_image(path, channels=3):
    """Open an image as viewers show it, in RGB or gray. Raises ValueError if it can't."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            animated = getattr(file, "n_frames", 1) > 1 and file.format != "MPO"
            sixteen_bit = file.mode.startswith("I;16") or file.format in ("PNG", "PPM")
    except Exception as error:
        raise ValueError(f"{path}: {error}") from None
    if image.mode.startswith("I") and sixteen_bit:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    transparent = image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255
    if animated or transparent or image.mode in ("I", "F"):
        raise ValueError(f"{path} has several frames, transparent pixels or 32 bits: use 8-bit RGB")
    return image.convert("RGB").convert("L" if channels == 1 else "RGB")


def to_pixels(images, size):
    """PIL images, cropped and resized if size > 0 -> uint8 (n, c, h, w). Raises ValueError."""
    if size:
        images = (ImageOps.fit(image, (size, size)) for image in images)
    pixels = [pil_to_tensor(image) for image in images]
    sizes = sorted({f"{image.shape[2]}x{image.shape[1]}" for image in pixels})
    if len(sizes) > 1:
        raise ValueError(f"its images have {sizes[0]} and {sizes[1]} pixels: add --size 32")
    return torch.stack(pixels)


SIDES = {"triangle": 3, "square": 4, "diamond": 4, "hexagon": 6, "disc": 32}
GLYPHS = [f"{style} {name}" for name in SIDES for style in ("filled", "hollow")]


def draw_glyphs(per_class, split):
    """Draw bright glyphs on dark, noisy grounds -> uint8 pixels (n, 3, 16, 16), labels (n,)."""
    random = np.random.default_rng([7, split])
    pixels = []
    for style, name in [label.split() for label in GLYPHS]:
        for _ in range(per_class):
            mask = Image.new("L", (96, 96))
            circle = (*random.uniform(36, 60, 2), random.uniform(24, 36))
            turn = random.uniform(-15, 15) + 45 * (name == "diamond")
            width = 10 if style == "hollow" else 48
            ImageDraw.Draw(mask).regular_polygon(circle, SIDES[name], turn, None, 255, width)
            mask = np.asarray(mask.resize((16, 16), Image.BOX))[..., None] / 255
            ground = random.uniform(0, 0.4, 3)
            color = random.uniform(0.6, 1, 3)
            blotches = random.normal(0, 0.1, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
            noise = random.normal(0, 0.2, blotches.shape)
            image = ground + mask * (color - ground) + blotches + noise
            pixels.append((image.clip(0, 1) * 255).astype(np.uint8))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.arange(10).repeat_interleave(per_class)


@dataclass
class Preprocess:
    """Pixels to network inputs and back. kind "standardize": (x - mean) / std per channel.

    "zca" (MTT, HaBa): (x - mean image) W, W = U diag(1 / sqrt(s + 0.1)) U^T for the covariance
    U diag(s) U^T. "zca-trace" (FRePo): the same on standardized pixels, with 0.1 mean(s) for 0.1.
    """

    kind: str
    mean: torch.Tensor
    std: torch.Tensor
    whiten: torch.Tensor = None

    @classmethod
    def fit(cls, pixels, kind, statistics, cache):
        """Fit to uint8 training pixels; statistics: see STATS, or None. cache: file of W."""
        if statistics:
            mean, std = torch.tensor(statistics[1:], device=pixels.device)[..., None, None]
        else:
            std, mean = torch.stack(torch.std_mean(pixels / 255, (0, 2, 3)))[..., None, None]
        std = std.clamp_min(0.01)
        if kind == "standardize":
            return cls(kind, mean, std)

        if pixels[0].numel() > 3 * 64 * 64:
            raise UserError("the images are too large to whiten: add --no-zca")
        mean = (pixels.sum(0, dtype=torch.int64) / len(pixels) / 255).float()
        if kind == "zca":
            std = torch.ones_like(std)
        if not cache.exists():
            x = ((pixels / 255 - mean) / std).flatten(1)
            values, vectors = torch.linalg.eigh((x.T @ x).double() / (len(x) - 1))
            ridge = 0.1 if kind == "zca" else 0.1 * values.mean()
            save((vectors / (values.clamp_min(0) + ridge).sqrt() @ vectors.T).float(), cache)
        return cls(kind, mean, std, load(cache, "a cache").to(pixels.device))

    def __call__(self, pixels):
        """Pixels 0 .. 255 (n, c, h, w) -> network inputs, float32."""
        images = (pixels / 255 - self.mean) / self.std
        if self.whiten is not None:
            images = (images.flatten(1) @ self.whiten).view_as(images)
        return images

    def undo(self, images):
        """Network inputs -> pixels / 255, not clamped."""
        if self.whiten is not None:
            images = torch.linalg.solve(self.whiten, images.flatten(1), left=False).view_as(images)
        return images * self.std + self.mean


# ------------------------------------------------------------ augmentation


def dsa(images, flip, *key, shared=False):
    """Apply a random transform of DSA (Zhao & Bilen 2021), its parameters drawn per image."""
    names = ("color", "crop", "cutout", "scale", "rotate") + ("flip",) * flip
    seed(*key)
    # shared: Siamese DSA, batches of any size get the same transform for the same key
    u = torch.rand(1 if shared else len(images), 3, device=images.device)
    return transform(images, names[hash_int(*key) % len(names)], u)


def transform(images, name, u):
    """Apply a transform of DSA with parameters u (n or 1, 3), uniform in [0, 1).

    color: brightness +-0.5, saturation 0 .. 2, contrast 0.5 .. 1.5; cutout: a square of half the
    side; crop: a shift of up to side / 8; scale: each axis by 1/1.2 .. 1.2; rotate: +-15 deg.
    """
    side = images.shape[-1]
    if name == "color":
        return adjust_color(images, u[:, 0] - 0.5, u[:, 1] * 2, u[:, 2] + 0.5)
    if name == "flip":
        return torch.where(u[:, 0].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)
    if name == "cutout":
        return cut(images, (u[:, :2] * (side + 1)).floor() - side // 4, side // 2)
    if name == "crop":
        reach = round(side / 8)
        y, x = 2 / side * ((u[:, :2] * (2 * reach + 1)).floor() - reach).T
        return warp(images, 1, 0, 0, 1, x, y)
    if name == "scale":
        sx, sy = (1 / 1.2 + u[:, :2] * (1.2 - 1 / 1.2)).T
        return warp(images, sx, 0, 0, sy)
    angle = (u[:, 0] - 0.5) * math.radians(30)
    return warp(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


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
    inside = (pixel >= corner[..., None]) & (pixel < corner[..., None] + side)
    return images * ~(inside[:, 0, None, :, None] & inside[:, 1, None, None, :])


def warp(images, a, b, c, d, x=0, y=0, padding="zeros"):
    """Affine resampling: output(p) = input([[a, b], [c, d]] p + [x, y]), p in [-1, 1]^2."""
    zero = torch.zeros(len(images), device=images.device)
    theta = torch.stack([zero + value for value in (a, b, x, c, d, y)], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images.dtype), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


# ------------------------------------------------------------ the ConvNet


class ConvNet(nn.Module):
    """The field's ConvNet: blocks of conv 3x3, instance norm, ReLU, average pool; then linear.

    Depth 3 for 28 and 32 pixels, 4 for 64, 5 for 128; 320,010 parameters for 3x32x32, 10 classes.
    frepo: no norm, widths 128, 256, 512.
    """

    def __init__(self, shape, classes, frepo=False, width=128):
        super().__init__()
        channels, _, size = shape
        # 28x28 gray images become 32x32 maps
        pad = 3 if (channels, size) == (1, 28) else 1
        size += 2 * (pad - 1)
        depth = max(1, round(math.log2(size)) - 2)
        self.kind = f"{'frepo-' * frepo}convnet{depth}"
        self.blocks = nn.Sequential()
        for i in range(depth):
            conv = nn.Conv2d(channels, width, 3, padding=1 if i else pad)
            norm = [] if frepo else [nn.GroupNorm(width, width)]
            self.blocks.extend([conv, *norm, nn.ReLU(inplace=True), nn.AvgPool2d(2)])
            channels = width
            width *= 2 if frepo else 1
        self.classifier = nn.Linear(channels * (size // 2**depth) ** 2, classes)

    def reset(self, *key):
        """Draw torch's default initialization anew, on the network's device -> self."""
        seed(*key)
        for layer in self.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return self

    def features(self, images):
        """Inputs of the linear layer (n, d). Uncompiled on a CPU: in chunks of 2^15 pixels."""
        whole = images.is_cuda or torch.compiler.is_compiling()
        chunk = len(images) if whole else 2**15 // images[0, 0].numel() or 1
        return torch.cat([self.blocks(x).flatten(1) for x in images.split(chunk)])

    def forward(self, images):
        return self.classifier(self.features(images))


# gains of torch.compile: results/speed.md
compiled_features = torch.compile(ConvNet.features, dynamic=False)


@torch.no_grad()
def frozen_features(net, images):
    """net.features without a graph, 512 images at a time -> (n, d) of the images' type."""
    parts = []
    with autocast(images):
        for x in images.split(512):
            # a rest of another size is not worth compiling
            parts.append(compiled_features(net, x) if len(x) == 512 else net.features(x))
    return torch.cat(parts).to(images.dtype)


# ------------------------------------------------------------ training and scoring


@dataclass
class Protocol:
    """How a network is trained on a distilled set; the defaults are those of DM, MTT and HaBa.

    network(shape, classes); augment(images, flip, *key); mix(images, soft labels, *key) -> both;
    loss(logits, soft labels); drops: shares of the epochs after which lr is multiplied by `decay`.
    The authors train 1001 epochs, lower the rate after 502 and reset the momentum; DC trains 300.
    """

    network: Callable = ConvNet
    augment: Callable = dsa
    mix: Callable = None
    loss: Callable = F.cross_entropy
    epochs: int = 1000
    batch: int = 256
    lr: float = 0.01
    drops: tuple = (0.5,)
    decay: float = 0.1
    optimizer: Callable = partial(torch.optim.SGD, momentum=0.9)
    weight_decay: float = 5e-4

    def length(self, count):
        """Epochs over `count` images."""
        return self.epochs

    def rate(self, epoch, count):
        """Learning rate in an epoch over `count` images."""
        return self.lr * self.decay ** sum(epoch >= share * self.epochs for share in self.drops)

    def soft_labels(self, labels, classes):
        """Class numbers (n,) -> the (n, C) that `loss` takes."""
        return F.one_hot(labels, classes).float()

    def baseline(self):
        """The protocol of the random real images beside a score: DM's."""
        return Protocol(self.network)


def train_epoch(net, optimizer, data, images, labels, protocol, *key):
    """Train for an epoch on (V, n, c, h, w): V variants of n images, one drawn at each use."""
    seed(*key)
    order = torch.randperm(len(labels), device=data.device)
    variants = torch.randint(len(images), order.shape, device=data.device)
    batches = zip(order.split(protocol.batch), variants.split(protocol.batch), strict=True)
    # in bfloat16 1.4 to 1.7 times as fast, in float32 1.2 times: results/speed.md
    compiled = torch.compile(net, dynamic=False)
    for step, (i, v) in enumerate(batches):
        inputs = protocol.augment(images[v, i], data.flip, *key, step)
        targets = labels[i]
        if protocol.mix:
            inputs, targets = protocol.mix(inputs, targets, *key, step)
        with autocast(inputs):
            loss = protocol.loss(compiled(inputs).float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_and_test(data, images, labels, protocol, args, step_size=None, k=0):
    """Train network k, with the rate step_size if given -> network, test accuracy in %.

    images (V, n, c, h, w), labels (n,) or soft (n, C). Raises UserError if the training diverges.
    """
    lr = protocol.lr if step_size is None else float(step_size)
    protocol = replace(protocol, lr=lr, epochs=args.epochs or protocol.epochs)
    key = (args.seed, "score", k)
    seed(*key)
    net = protocol.network(data.shape, len(data.classes)).to(data.device)
    optimizer = protocol.optimizer(net.parameters(), weight_decay=protocol.weight_decay)
    if labels.ndim == 1:
        labels = protocol.soft_labels(labels, len(data.classes))
    with compiling(args.compile):
        for epoch in progress(range(protocol.length(len(labels))), f"network {k}, epochs"):
            optimizer.param_groups[0]["lr"] = protocol.rate(epoch, len(labels))
            train_epoch(net, optimizer, data, images, labels, protocol, *key, epoch)
    if not all(p.isfinite().all() for p in net.parameters()):
        raise UserError(f"a network diverged in training: is the rate of {lr} too large?")
    return net.eval(), accuracy(net, data.test, data.test_labels)


@torch.no_grad()
def predict(net, images):
    """Predict the classes (n,) of images (n, c, h, w), 500 at a time."""
    with autocast(images):
        return torch.cat([net(x).argmax(1) for x in images.split(500)])


def accuracy(net, images, labels):
    """Percentage of images (n, c, h, w) classified as `labels` (n,)."""
    return 100 * (predict(net, images) == labels).float().mean().item()


def score(data, distilled, images, labels, protocol, args):
    """Score a distilled set and random real images of its storage.

    -> row of results.jsonl, [(network, accuracy in %)] of those trained on the distilled set.
    """
    real_per_class = math.ceil(distilled["stored_per_class"] / math.prod(data.shape))
    real_per_class = min(real_per_class, data.smallest_class)
    began = time.time()
    step_size = distilled["step_size"]
    baseline = protocol.baseline()
    trained = []
    random = []
    for k in range(args.runs):
        trained.append(train_and_test(data, images, labels, protocol, args, step_size, k))
        real, real_labels = data.sample(real_per_class, args.seed, "random real", k)
        random.append(train_and_test(data, real[None], real_labels, baseline, args, k=k)[1])

    ours = [found for _, found in trained]
    names = ("method", "dataset", "per_class", "iterations", "seconds", "settings")
    row = {name: distilled[name] for name in names} | {
        "network": protocol.network(data.shape, len(data.classes)).kind,
        "accuracy": round(np.mean(ours), 2),
        "std": round(np.std(ours), 2),
        "random": round(np.mean(random), 2),
        "random_std": round(np.std(random), 2),
        "random_per_class": real_per_class,
        "runs": args.runs,
        "epochs": args.epochs or protocol.length(len(labels)),
        "seed": args.seed,
        "data": [data.fingerprint, data.test_fingerprint],
        "scoring_seconds": round(time.time() - began),
    }
    text = "{method} on {dataset}, {per_class} per class, {network}, {runs} x {epochs} epochs: "
    text += "{accuracy} +- {std} % "
    text += "(random real images, {random_per_class} per class: {random} +- {random_std} %)"
    print(text.format(**row))
    append_row(row, data.device, args.out)
    return row, trained


def append_row(row, device, folder):
    """Add hardware, torch version, commit, command (without places); append to results.jsonl."""
    hardware = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    here = pathlib.Path(__file__).parent
    commit = subprocess.getoutput(f"git -C '{here}' describe --always --dirty=+ 2>/dev/null")
    # what this parser does not know is the command without the places
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*["--" + name.replace("_", "-") for name in Args.places])
    words = [pathlib.Path(sys.argv[0]).name, *parser.parse_known_args(sys.argv[1:])[1]]
    command = shlex.join(["python", *words])
    row |= dict(hardware=hardware, torch=torch.__version__, commit=commit, command=command)
    with open(pathlib.Path(folder) / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------ files and long runs


def save(content, path):
    """Write `path` atomically: bytes as they are, anything else by torch.save. Raises OSError."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path, what, *keys):
    """torch.load(weights_only=True) onto the CPU; it must hold `keys`. Raises UserError."""
    try:
        content = torch.load(path, "cpu", weights_only=True)
        return content if not keys else {key: content[key] for key in (*content, *keys)}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of {what}") from None
    except Exception:
        raise UserError(f"{path} is broken or not {what}: move it away or give another") from None


def output_path(args, kind=""):
    """Make the folder args.out -> path of the distilled file, e.g. out/dm_cifar10_ipc10.pt."""
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f"_seed{args.seed}" if args.seed else ""
    budget = f"{args.budget}{getattr(args, args.budget)}"
    dataset = pathlib.Path(args.dataset).name
    return folder / f"{args.method}{kind}_{dataset}_{budget}{suffix}.pt"


def save_distilled(path, data, args, tensors, run, step_size=None):
    """Write a distilled file: `tensors`, metadata, step_size (or None) -> its content, a dict."""
    # storage as a count of numbers; labels are not counted
    stored = sum(t.numel() for name, t in tensors.items() if name != "labels")
    distilled = {
        "method": args.method,
        "dataset": data.name,
        "classes": data.classes,
        "shape": list(data.shape),
        "per_class": getattr(args, args.budget),
        "stored_per_class": stored / len(data.classes),
        "preprocess": data.preprocess.kind,
        "fingerprint": data.fingerprint,
        "test_fingerprint": data.test_fingerprint,
        "mean": data.preprocess.mean.cpu(),
        "std": data.preprocess.std.cpu(),
        "step_size": None if step_size is None else float(step_size),
        "settings": args.stored(),
        "experts": run.record.get("experts"),
        "iterations": args.iterations,
        "seconds": round(run.record["seconds"], 1),
        "evaluations": run.record["evaluations"],
    }
    distilled |= {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    save(distilled, path)
    print(f"wrote {path}")
    return distilled


def save_grid(path, data, images, columns):
    """Write images (n, c, h, w) as a PNG, `columns` in a row, preprocessing undone."""
    pixels = data.preprocess.undo(images.detach()).clamp(0, 1)
    pixels = F.interpolate(pixels, scale_factor=max(1, 64 // data.shape[-1]))
    buffer = io.BytesIO()
    torchvision.utils.save_image(pixels, buffer, format="png", nrow=columns, pad_value=1)
    save(buffer.getvalue(), path)


def progress(steps, what):
    """Yield the numbers of a range; every ten seconds and at the end print a line to stderr."""
    began = shown = time.time()
    for step in steps:
        yield step
        now = time.time()
        if now - shown >= 10 or step + 1 == steps.stop:
            shown = now
            each = (now - began) / (step + 1 - steps.start)
            left = each * (steps.stop - step - 1) / 60
            text = f"{what} {step + 1}/{steps.stop}, {each:.3g} s each, {left:.1f} min left"
            print(text, file=sys.stderr)


class Run:
    """A distillation that can be killed and continued from its checkpoint, <stem>.ckpt."""

    def __init__(self, path, data, args, steps=None, inputs=None):
        self.path = path.with_suffix(".ckpt")
        self.args = args
        self.steps = args.iterations if steps is None else steps
        settings = args.stored() | {"data": data.fingerprint, "test data": data.test_fingerprint}
        settings["inputs"] = None
        if inputs is not None:
            settings["inputs"] = hashlib.sha256(inputs.cpu().numpy()).hexdigest()
        self.record = {"settings": settings, "done": 0, "seconds": 0.0, "evaluations": []}
        self.record["losses"] = "iteration,loss,seconds\n"
        self.version = file_version(self.path)
        if self.version:
            self.record = load(self.path, "a checkpoint", *self.record, "state")
        # data, inputs (a tensor) and all settings except args.free must be those of the checkpoint
        stored = self.record["settings"]
        wrong = [x for x in settings if x not in args.free and settings[x] != stored.get(x)]
        if wrong:
            raise UserError(f"{self.path} differs in {', '.join(wrong)}: remove it or change --out")
        self.start = self.record["done"]
        if self.start > self.steps:
            raise UserError(f"{self.path} has {self.start} iterations: use as many, or other --out")

    def restore(self, state, evaluate=None):
        """Restore tensors, modules, optimizers in place. evaluate(k=k) -> network, accuracy."""
        self.state = state
        self.evaluate = evaluate
        if self.start:
            print(f"{self.path}: continuing after {self.start} iterations")
        for name, stored in self.record.pop("state", {}).items():
            if torch.is_tensor(stored):
                state[name].data.copy_(stored)
            else:
                state[name].load_state_dict(stored)
        self.saved = time.time()
        self.began = self.saved - self.record["seconds"]

    def step(self, it, loss):
        """Record iteration `it`; evaluate; write checkpoint and csv each minute and at the end."""
        done = self.record["done"] = it + 1
        last = done == self.steps
        evaluates = self.evaluate and self.args.eval_every and done % self.args.eval_every == 0
        if last or done % math.ceil(self.steps / 100) == 0:
            self.record["losses"] += f"{done},{loss.item()},{time.time() - self.began:.1f}\n"
        if not last and not evaluates and time.time() - self.saved < 60:
            return

        state = {k: v if torch.is_tensor(v) else v.state_dict() for k, v in self.state.items()}
        tensors = [loss, *filter(torch.is_tensor, tree_leaves(state))]
        if not all(tensor.isfinite().all() for tensor in tensors):
            rates = ", ".join(name for name in vars(self.args) if name.startswith("lr"))
            raise UserError(f"diverged before iteration {done}: use a smaller rate ({rates})")
        if evaluates:
            # two networks, as a curve of one network misleads
            found = [self.evaluate(k=k)[1] for k in (0, 1)]
            self.record["evaluations"].append((done, round(sum(found) / 2, 2)))
        if file_version(self.path) != self.version:
            raise UserError(f"another run has written {self.path}: change --out")
        self.saved = time.time()
        self.record["seconds"] = self.saved - self.began
        save(self.record | {"state": state}, self.path)
        self.version = file_version(self.path)
        save(self.record["losses"].encode(), self.path.with_suffix(".csv"))
        print(f"{self.path}: {done} iterations, loss {loss.item():.4f}", file=sys.stderr)


def file_version(path):
    """A number that changes with each atomic write of `path`; None if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else None
