"""What the methods share: data, ZCA, DSA, the ConvNet, experts, the trajectory unroll, scoring, files.

A method file (mtt.py, haba.py, ...) imports this module and nothing else of ours; copy the two together and
they run. Images are (n, channels, height, width) everywhere. "Pixels" are uint8 0..255 or floats in [0, 1];
"preprocessed" images are what networks see: standardised per channel, or ZCA-whitened.
Papers: HaBa = Liu et al. 2022, MTT = Cazenavette et al. 2022, DSA = Zhao & Bilen 2021.
"""
import argparse
import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
import io
import json
import math
import os
import pathlib
import signal
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


class UserError(Exception):
    """A mistake of the user's, told in one line that says what to do; `run` turns it into exit status 2."""


# ------------------------------------------------------------------------------------------ random numbers, device

def rng(*key, device="cpu"):
    """A torch.Generator that depends on `key` alone, e.g. (seed, "dsa", iteration): a run that was killed and
    goes on draws what the unbroken run would have drawn. Drawing on `device` copies nothing from the host."""
    return torch.Generator(device).manual_seed(hash_int(key))


def hash_int(key):
    """A 63-bit integer that depends on repr(key) alone (Python's own hash differs from process to process)."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seeded(key, build, *args, **kwargs):
    """build(*args, **kwargs) with torch's global generator seeded by `key` meanwhile: how networks start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_int(key))
        return build(*args, **kwargs)


def pick_device(name):
    """The torch.device for --device; "auto" is a CUDA GPU where there is one. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {name} cannot be used here: take --device cpu or cuda") from None
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = True  # convolutions alone: whitening and ridge regression stay float32
        torch.backends.cudnn.benchmark = True
    return device


def chunk_size(images):
    """How many of images (..., h, w) to push through a network at once. The ConvNet's norm does not mix images, so a
    gradient over a batch is the sum over chunks, exactly; on a CPU chunks that stay in the cache are 2.5 times faster."""
    return max(1, (32 if images.device.type == "cpu" else 4096) * 1024 // max(1024, images.shape[-1] * images.shape[-2]))


def autocast(device):
    """bfloat16 convolutions where the CPU has the instructions (1.9 times faster); float32, or TF32, elsewhere."""
    fast = torch.device(device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16) if fast else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------ data

STATS = {  # mean and standard deviation per channel, as published with MTT and DM (the README's "Protocols")
    "cifar10": ((.4914, .4822, .4465), (.2023, .1994, .2010)),
    "cifar100": ((.5071, .4866, .4409), (.2673, .2564, .2762)),
    "svhn": ((.4377, .4438, .4728), (.1980, .2010, .1970)),
    "mnist": ((.1307,), (.3081,)),
    "fashionmnist": ((.2861,), (.3530,)),
}
NO_FLIP = ("mnist", "fashionmnist", "svhn")  # by the authors' custom: digits change their meaning in a mirror


@dataclasses.dataclass
class Dataset:
    """A data set on the device. `train` and `test` are preprocessed float32 images, labels are int64."""
    name: str
    classes: list
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    preprocess: "Preprocess"

    @property
    def flip(self):
        """Whether an image and its mirror image mean the same: DSA flips only then."""
        return self.name not in NO_FLIP

    @property
    def shape(self):
        """(channels, height, width) of one image."""
        return tuple(self.train.shape[1:])

    @property
    def device(self):
        return self.train.device

    def random_real(self, per_class, *key):
        """`per_class` random training images of every class -> images (C * per_class, c, h, w), labels, in
        class order. Raises UserError where a class has fewer."""
        order = torch.randperm(len(self.train), generator=rng(*key)).to(self.device)
        chosen = []
        for label, name in enumerate(self.classes):
            of_class = order[self.train_labels[order] == label]
            if not 1 <= per_class <= len(of_class):
                raise UserError(f"{per_class} images a class were asked for, but class {name!r} of {self.name} "
                                f"has {len(of_class)}: choose a number from 1 to that")
            chosen.append(of_class[:per_class])
        index = torch.cat(chosen)
        return self.train[index].clone(), self.train_labels[index]


def load_dataset(name, data_dir="data", zca=False, size=None, device="cpu"):
    """Load a data set by name or path and preprocess it -> Dataset.

    zca: False, True (MTT, HaBa) or "trace" (FRePo, translator), see Preprocess.

    `name` is glyphs (drawn here), a folder with train/<class>/* and test/<class>/* or val/<class>/* (a path, or
    a name under data_dir), or cifar10, cifar100, svhn, mnist, fashionmnist (torchvision downloads on first use).
    Raises UserError for an unknown name, an unreadable folder or image, or images of several sizes."""
    folder = next((p for p in (pathlib.Path(name), pathlib.Path(data_dir) / name) if (p / "train").is_dir()), None)
    if name == "glyphs":
        arrays = draw_glyphs(500, 0) + draw_glyphs(100, 1) + (list(GLYPHS),)
    elif folder is not None:
        arrays, name = read_folder(folder, size), folder.resolve().name
    elif pathlib.Path(name).is_dir() or (pathlib.Path(data_dir) / name).is_dir() and name not in STATS:
        raise UserError(f"folder {name} has no train/ in it: put pictures in train/<class>/ and test/<class>/")
    elif name in STATS:
        arrays = read_torchvision(name, data_dir)
    else:
        raise UserError(f"unknown data set {name!r}: take glyphs, {', '.join(STATS)}, or a folder with "
                        "train/<class>/ and test/<class>/ in it")
    train, train_labels, test, test_labels, classes = arrays
    if train.shape[2] != train.shape[3] or not 16 <= train.shape[2] <= 256:
        raise UserError(f"{name} has images of {train.shape[3]}x{train.shape[2]} pixels; networks take squares of "
                        "16 to 256: add --size 32 (or 64, 128)")
    train, test = train.to(device), test.to(device)
    preprocess = Preprocess.fit(name, train, zca, data_dir)
    train, test = (preprocess.kept(pixels, data_dir) for pixels in (train, test))
    return Dataset(name, list(classes), train, train_labels.to(device), test, test_labels.to(device), preprocess)


def read_torchvision(name, data_dir):
    """uint8 train images, labels, test images, labels, class names through torchvision. Raises UserError."""
    import torchvision
    kind = getattr(torchvision.datasets, {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN",
                                          "mnist": "MNIST", "fashionmnist": "FashionMNIST"}[name])
    arrays = ()
    for train in (True, False):
        where = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            part = kind(data_dir, download=True, **where)
        except ModuleNotFoundError:
            raise UserError("torchvision reads SVHN with scipy, which is not installed: pip install scipy") from None
        except Exception as error:  # no network, a broken archive, no room: torchvision raises many kinds
            raise UserError(f"{name} could not be read or downloaded into {data_dir} ({str(error).splitlines()[0]}): "
                            "check --data-dir and the network") from None
        images, labels = torch.as_tensor(part.data), torch.as_tensor(getattr(part, "targets", getattr(part, "labels", None)))
        if images.ndim == 3:
            images = images[:, None]
        elif images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        arrays += images.contiguous(), labels.long()
    return arrays + (getattr(part, "classes", [str(c) for c in range(10)]),)


def read_folder(folder, size=None):
    """Decode train/<class>/* and test/<class>/* (or val/) once; later runs read a uint8 cache beside them.
    -> as read_torchvision. `size` scales the short side and crops the middle. Raises UserError."""
    splits = [folder / "train", next((folder / s for s in ("test", "val") if (folder / s).is_dir()), None)]
    if splits[1] is None:
        raise UserError(f"{folder} has no test/ and no val/ beside train/: put held-out pictures there")
    classes, others = (sorted(entry.name for entry in os.scandir(split) if entry.is_dir()) for split in splits)
    if len(classes) < 2:
        raise UserError(f"{splits[0]} holds {len(classes)} class folders and two are the least: one folder a class")
    for odd in sorted({*classes} ^ {*others}):
        has, lacks = splits if odd in classes else reversed(splits)
        raise UserError(f"class {odd!r} is in {has} but not in {lacks}: add its pictures there, or remove it")
    files, labels, stored_bytes, stamp = [], [[], []], 0, hashlib.sha256(repr((size, classes)).encode())
    for split in (0, 1):
        for label, name in enumerate(classes):
            entries = sorted(os.scandir(splits[split] / name), key=lambda entry: entry.name)
            entries = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
            if not entries:
                raise UserError(f"{splits[split] / name} has no pictures in it: add some or remove the folder")
            for entry in entries:
                info = entry.stat()
                stamp.update(f"{split} {entry.name} {info.st_size} {info.st_mtime_ns}".encode())
                stored_bytes += info.st_size
            files += [entry.path for entry in entries]
            labels[split] += [label] * len(entries)
    cache, stamp = folder / f".cache_{size or 'as_is'}.pt", stamp.hexdigest()
    with contextlib.suppress(Exception):  # a cache that cannot be read is made anew
        stored = torch.load(cache, weights_only=True, mmap=True)
        if stored["stamp"] == stamp:
            return *(stored[k].clone() for k in ("train", "train_labels", "test", "test_labels")), classes
    # Threads help with photographs, whose decoders let go of Python's lock; with thumbnails they fight for it (3 x slower).
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor() as pool:
        run = pool.map if stored_bytes > 20_000 * len(files) else map
        decoded = list(run(lambda path: decode(path, size), files))
    sizes = {image.shape[:2] for image, _ in decoded}
    if len(sizes) > 1:
        raise UserError(f"the pictures in {folder} have {len(sizes)} sizes: add --size 32 (or 64, 128)")
    images = torch.from_numpy(np.stack([image for image, _ in decoded])).permute(0, 3, 1, 2)
    images = images[:, :1] if all(grey for _, grey in decoded) else images  # any picture in colour: all in colour
    images, n = images.contiguous(), len(labels[0])
    arrays = images[:n].clone(), torch.tensor(labels[0]), images[n:].clone(), torch.tensor(labels[1])
    with contextlib.suppress(UserError):  # a read-only folder works too, without a cache
        save(dict(zip(("train", "train_labels", "test", "test_labels"), arrays), stamp=stamp), cache)
    return *arrays, classes


def decode(path, size=None):
    """A picture as (uint8 array (h, w, 3), whether it is grey). Raises UserError where it cannot be read."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as picture:
            grey = picture.mode in ("1", "L", "LA", "I", "I;16", "F")
            picture = picture.convert("RGB")
            if size:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
            return np.asarray(picture), grey
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{path} is not a picture that can be read: remove or replace it") from None


GLYPHS = ("disc", "ring", "square", "frame", "triangle", "plus", "star", "crescent", "ell", "bars")


def draw_glyphs(per_class, split):
    """A small data set that needs no download: uint8 images (10 * per_class, 3, 32, 32) and labels.

    One shape of GLYPHS an image, with random place, scale, rotation and colours, over a shaded background with
    pieces of other shapes at the border, and noise. `split` 0 and 1 draw different images. The shapes are signed
    distances to outlines (negative inside), so that all images are drawn at once."""
    n, g = 10 * per_class, rng("glyphs", split)
    labels = torch.arange(10).repeat_interleave(per_class)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    axis = (torch.arange(32) - 15.5) / 16
    y, x = axis.view(1, 32, 1).expand(n, 32, 32), axis.view(1, 1, 32).expand(n, 32, 32)

    def shape_mask(kind, cx, cy, scale, angle):
        """Coverage in [0, 1] of glyph kind[i] in image i, (n, 32, 32)."""
        c, s = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        dx, dy, scale = x - cx.view(-1, 1, 1), y - cy.view(-1, 1, 1), scale.view(-1, 1, 1)
        u, v = (c * dx + s * dy) / scale, (c * dy - s * dx) / scale
        r, box = (u * u + v * v).sqrt(), torch.maximum(u.abs(), v.abs())
        polar = torch.atan2(u, v)
        wedge = (polar + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5  # angle from the nearest of 5 star points
        distance = torch.stack([
            r - .9,                                                               # disc
            (r - .72).abs() - .2,                                                 # ring
            box - .8,                                                             # square
            (box - .68).abs() - .18,                                              # frame
            torch.maximum(v - .6, (.866 * u.abs() - .5 * v) - .55),               # triangle
            torch.maximum(torch.minimum(u.abs(), v.abs()) - .24, box - .9),       # plus
            r * wedge.abs().cos() * .5 + r * wedge.abs().sin() * 1.1 - .5,        # star
            torch.maximum(r - .9, .75 - ((u - .45) ** 2 + v * v).sqrt()),         # crescent
            torch.maximum(box - .85, torch.minimum(u + .3, .3 - v) * 1.0),        # ell
            torch.maximum(box - .85, .22 - u.abs()),                              # bars
        ])
        chosen = distance[kind, torch.arange(n)]
        return (.5 - chosen * scale * 16).clamp(0, 1)

    ramp = (x * uniform(-1, 1, 1, 1) + y * uniform(-1, 1, 1, 1))[:, None]
    image = uniform(.1, .9, 3, 1, 1) + .25 * ramp * uniform(-1, 1, 3, 1, 1)
    image = image + F.interpolate(uniform(-.15, .15, 3, 5, 5), size=32, mode="bilinear")
    for _ in range(2):  # neighbours, mostly outside the image
        around, far = uniform(0, 2 * math.pi), uniform(.95, 1.2)
        other = shape_mask(torch.randint(0, 10, (n,), generator=g), far * around.cos(), far * around.sin(),
                           uniform(.25, .4), uniform(0, 2 * math.pi))[:, None]
        image = image * (1 - other) + uniform(0, 1, 3, 1, 1) * other
    colour = uniform(0, 1, 3, 1, 1)
    behind = image.mean((2, 3), keepdim=True)
    lift = torch.where(behind.mean(1, keepdim=True) > .5, -.4, .4)  # enough contrast to be seen
    colour = torch.where((colour - behind).abs().mean(1, keepdim=True) < .25, (behind + lift), colour)
    mask = shape_mask(labels, uniform(-.3, .3), uniform(-.3, .3), uniform(.4, .7), uniform(-.6, .6))[:, None]
    image = image * (1 - mask) + colour * mask
    image = image + .08 * torch.randn(n, 3, 32, 32, generator=g)
    return (image.clamp(0, 1) * 255).round().byte(), labels


@dataclasses.dataclass
class Preprocess:
    """Pixels to what networks see, and back. `fingerprint` depends on the kind, its constants and the training
    pixels, not on their order: two files fit together when it is equal. kind is
    "standardise": (x - mean) / std, per channel;
    "zca" (MTT, HaBa): (x - mean image) W, W = U diag(1 / sqrt(s + 0.1)) U^T for the covariance U diag(s) U^T;
    "zca-trace" (FRePo): the same for standardised pixels, with 0.1 * the mean of s in place of 0.1."""
    kind: str
    fingerprint: str
    mean: torch.Tensor  # (c, 1, 1) when standardising, the mean image (c, h, w) with ZCA
    std: torch.Tensor   # (c, 1, 1); None with ZCA
    whiten: torch.Tensor = None  # (d, d), d = c * h * w, to the right of the images as rows: W, or diag(1 / std) W
    restore: torch.Tensor = None  # its inverse

    ZCA_RIDGE = 0.1

    @classmethod
    def fit(cls, name, pixels, zca, data_dir):
        """Fit to uint8 training pixels (n, c, h, w); a ZCA matrix is kept under data_dir for the next run."""
        sums = [torch.zeros(pixels.shape[1:], dtype=torch.float64, device=pixels.device) for _ in range(2)]
        for part in pixels.split(256):  # 256 * 255^2 < 2^24: sums of integers are exact in float32, whatever the order
            x = part.float()
            sums[0] += x.sum(0)
            sums[1] += x.square_().sum(0)
        constants = cls.ZCA_RIDGE if zca is True else STATS.get(name)
        kind = "zca-trace" if zca == "trace" else "zca" if zca else "standardise"
        digest = hashlib.sha256(repr((kind, constants, len(pixels))).encode())
        for total in sums:
            digest.update(total.cpu().numpy().tobytes())
        fingerprint = f"{kind}-{digest.hexdigest()[:16]}"
        n, device = len(pixels), pixels.device
        if constants is None:  # data of the user's own: measured
            mean = sums[0].mean((1, 2)) / n / 255
            std = (sums[1].mean((1, 2)) / n / 255 ** 2 - mean ** 2).clamp_min(1e-4).sqrt()
            constants = mean.tolist(), std.tolist()
        if not zca:
            mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in constants)
            return cls(kind, fingerprint, mean, std)
        cache = pathlib.Path(data_dir) / ".cache" / f"{fingerprint}.pt"
        with contextlib.suppress(Exception):
            stored = torch.load(cache, map_location=device, weights_only=True)
            return cls(kind, fingerprint, stored["mean"], None, stored["whiten"], stored["restore"])
        mean = (sums[0] / n / 255)
        centred = ((part / 255 - mean.float()).flatten(1).double() for part in pixels.split(4096))
        covariance = sum(x.T @ x for x in centred) / (n - 1)
        std = torch.ones(len(covariance), dtype=torch.float64, device=device)
        if kind == "zca-trace":
            std = torch.tensor(constants[1], device=device).double().repeat_interleave(len(std) // len(constants[1]))
        values, vectors = torch.linalg.eigh(covariance / std / std[:, None])
        ridge = cls.ZCA_RIDGE * (values.mean() if kind == "zca-trace" else 1)
        scale = (values.clamp_min(0) + ridge).sqrt()
        whiten, restore = (vectors / scale @ vectors.T) / std[:, None], (vectors * scale @ vectors.T) * std
        stored = {"mean": mean.float().cpu(), "whiten": whiten.float().cpu(), "restore": restore.float().cpu()}
        with contextlib.suppress(UserError):
            save(stored, cache)
        return cls(kind, fingerprint, mean.float(), None, whiten.float(), restore.float())

    def __call__(self, pixels):
        """Pixels (n, c, h, w), uint8 or floats in [0, 1] -> preprocessed float32 images."""
        top = 1 if pixels.is_floating_point() else 255
        images = torch.empty(pixels.shape, device=pixels.device)
        for part, p in zip(images.split(1024), pixels.split(1024)):  # what lies in between stays in the cache
            if self.kind == "standardise":
                torch.div(p / top - self.mean, self.std, out=part)
            else:
                torch.mm((p / top - self.mean).flatten(1), self.whiten, out=part.flatten(1))
        return images

    def kept(self, pixels, data_dir):
        """self(pixels); on a CPU, where whitening takes seconds, from or to a file of float32 under data_dir."""
        if self.kind == "standardise" or pixels.is_cuda:
            return self(pixels)
        digest = hashlib.sha256(pixels.numpy()).hexdigest()[:16]  # the order of the images counts here
        cache = pathlib.Path(data_dir) / ".cache" / f"{self.fingerprint}_{digest}.float32"
        with contextlib.suppress(OSError, ValueError):
            return torch.from_numpy(np.memmap(cache, np.float32, "c", shape=tuple(pixels.shape)))
        images = self(pixels)
        with contextlib.suppress(UserError):
            write(images.numpy(), cache)
        return images

    def undo(self, images):
        """Preprocessed images -> pixels in [0, 1] (not clamped): for pictures."""
        if self.kind == "standardise":
            return images * self.std + self.mean
        return (images.flatten(1) @ self.restore).view_as(images) + self.mean


# ------------------------------------------------------------------------------------------ DSA

DSA = ("colour", "crop", "cutout", "flip", "scale", "rotate")


def draw_dsa(count, *key, device="cpu", flip=True, names=DSA):
    """One draw of DSA for a batch -> (transform's name, u): u (count, 3) uniform in [0, 1), one row an image;
    count=1 shares the parameters over the batch, which is the Siamese form. Same key, same draw."""
    names = names if flip else tuple(name for name in names if name != "flip")
    name = names[hash_int((*key, "transform")) % len(names)]
    return name, torch.rand(count, 3, generator=rng(*key, device=device), device=device)


def dsa(images, name, u):
    """Differentiable augmentation (DSA, Zhao & Bilen 2021): transform `name` with parameters u (n or 1, 3) from
    draw_dsa, applied to images (n, c, h, w); ranges as in the README. Gradients reach the images."""
    n, _, h, w = images.shape
    if name == "flip":
        return torch.where(u[:, 0].view(-1, 1, 1, 1) < .5, images.flip(3), images)
    if name == "colour":
        brightness, saturation, contrast = (u[:, i].view(-1, 1, 1, 1) for i in range(3))
        images = images + (brightness - .5)
        grey = images.mean(1, keepdim=True)
        images = grey + (images - grey) * 2 * saturation
        level = images.mean((1, 2, 3), keepdim=True)
        return level + (images - level) * (contrast + .5)
    rows, columns = torch.arange(h, device=u.device), torch.arange(w, device=u.device)
    if name == "cutout":  # the square's centre is anywhere in the image
        top, left = (u[:, 0] * (h + 1)).floor() - h // 4, (u[:, 1] * (w + 1)).floor() - w // 4
        in_rows = (rows >= top[:, None]) & (rows < top[:, None] + h // 2)
        in_columns = (columns >= left[:, None]) & (columns < left[:, None] + w // 2)
        return images * ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])
    if name in ("crop", "translate"):  # shift by whole pixels, zeros outside
        reach = round(h * .125)
        down, right = ((u[:, i] * (2 * reach + 1)).floor().long() - reach for i in range(2))
        padded = F.pad(images, (reach,) * 4).permute(0, 2, 3, 1)
        which = torch.arange(n, device=u.device).view(-1, 1, 1)
        return padded[which, (rows + reach + down[:, None])[:, :, None],
                      (columns + reach + right[:, None])[:, None, :]].permute(0, 3, 1, 2).contiguous()
    zero = torch.zeros_like(u[:, 0])
    if name == "scale":
        sx, sy = (1 / 1.2 + u[:, i] * (1.2 - 1 / 1.2) for i in range(2))
        matrix = torch.stack([sx, zero, zero, zero, sy, zero], 1)
    elif name == "rotate":
        angle = (u[:, 0] - .5) * 2 * math.radians(15)
        matrix = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1)
    else:
        raise ValueError(f"unknown transform {name!r}")
    grid = F.affine_grid(matrix.view(-1, 2, 3).to(images.dtype).expand(n, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# ------------------------------------------------------------------------------------------ the ConvNet

class AvgPool(nn.Module):
    """Average pool over squares of 2x2. On a CPU rows are added, then columns: four times as fast as nn.AvgPool2d, which
    took a third of the time of a training step there."""

    def forward(self, x):
        if x.is_cuda:
            return F.avg_pool2d(x, 2)
        h, w = (side // 2 * 2 for side in x.shape[-2:])  # an odd side loses its last row or column, as there
        x = x[..., :h:2, :w] + x[..., 1:h:2, :w]
        return (x[..., ::2] + x[..., 1::2]) / 4


class ConvNet(nn.Module):
    """The field's ConvNet: `depth` blocks of conv 3x3 -> instance norm -> ReLU -> average pool, then one linear
    layer. 320,010 parameters for 3x32x32 and 10 classes. Depth 3 for 28 and 32 pixels, 4 for 64, 5 for 128."""
    kind = "convnet"

    def __init__(self, shape, classes, width=128):
        super().__init__()
        channels, size = shape[0], shape[-1]
        first_pad = 3 if (channels, size) == (1, 28) else 1  # 28x28 digits become 32x32 maps
        size += 2 * (first_pad - 1)
        self.depth = max(1, round(math.log2(size)) - 2)
        blocks = []
        for i in range(self.depth):
            blocks += [nn.Conv2d(channels, width, 3, padding=first_pad if i == 0 else 1),
                       nn.GroupNorm(width, width),  # as many groups as channels: instance norm, no running statistics
                       nn.ReLU(), AvgPool()]
            channels, size = width, size // 2
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * size * size, classes)

    def features(self, images):
        """The features before the linear layer, (n, width * (size / 2^depth)^2)."""
        return self.blocks(images).flatten(1)

    def forward(self, images):
        """Logits (n, classes)."""
        return self.classifier(self.features(images))


class FRePoNet(nn.Module):
    """FRePo's ConvNet: blocks of conv 3x3 -> ReLU -> average pool whose width doubles (128, 256, 512), and one linear
    layer; depth as ConvNet's. norm: batch norm between the blocks, none behind the last, as in FRePo's pool; without
    it, the network that a distilled set is scored with. Weights start as LeCun's: normal, variance 1 / fan-in."""
    kind = "frepo-convnet"

    def __init__(self, shape, classes, norm=False, width=128):
        super().__init__()
        channels, size = shape[0], shape[-1]
        first_pad = 3 if (channels, size) == (1, 28) else 1  # 28x28 digits become 32x32 maps
        size += 2 * (first_pad - 1)
        self.depth = max(1, round(math.log2(size)) - 2)
        blocks = []
        for i in range(self.depth):
            blocks += [nn.Conv2d(channels, width, 3, padding=first_pad if i == 0 else 1)]
            blocks += [nn.BatchNorm2d(width, track_running_stats=False)] * (norm and i < self.depth - 1)
            blocks += [nn.ReLU(), AvgPool()]
            channels, width, size = width, width * 2, size // 2
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels * size * size, classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
                nn.init.zeros_(layer.bias)

    def features(self, images):
        """The features before the linear layer, (n, 512 * (size / 2^depth)^2)."""
        return self.blocks(images).flatten(1)

    def forward(self, images):
        """Predicted labels (n, classes), real numbers."""
        return self.classifier(self.features(images))


def flat_parameters(net):
    """All parameters as one vector (P,), detached; `unflatten` is the way back."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def unflatten(net, flat):
    """A vector (P,) -> {name: tensor} views for functional_call(net, ..., images)."""
    named = dict(net.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}


def accumulate_gradient(net, parameters, images, labels, criterion=F.cross_entropy):
    """Add the gradient of the mean loss (cross-entropy) to .grad of `parameters`, a dict of leaves.

    parameters (R, ...), images (R, n, c, h, w), labels (R, n) or soft (R, n, C): R networks side by side, each with
    its own batch (R = 1: no vmap). A network with batch norm sees the batch as a whole, others in chunks."""
    parts = images.shape[1] if mixes_images(net) else chunk_size(images)
    for x, y in zip(images.split(parts, 1), labels.split(parts, 1)):
        with autocast(images.device):
            if len(images) > 1:
                logits = torch.vmap(lambda p, one: functional_call(net, p, one))(parameters, x)
            else:
                logits = functional_call(net, {name: p[0] for name, p in parameters.items()}, x[0])[None]
        loss = criterion(logits.float().flatten(0, 1), y.flatten(0, 1), reduction="sum")
        (loss / images.shape[1]).backward()


def mixes_images(net):
    """Whether a network's output for an image depends on the others of its batch, as batch norm's does."""
    return any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())


@torch.no_grad()
def accuracy(net, parameters, images, labels):
    """Percentage of images (n, c, h, w) that net, with a dict of parameters, classifies as `labels` say."""
    right = 0
    for x, y in zip(images.split(chunk_size(images)), labels.split(chunk_size(images))):
        with autocast(images.device):
            right = right + (functional_call(net, parameters, x).argmax(1) == y).sum()
    return 100 * (right / len(labels)).item()


# ------------------------------------------------------------------------------------------ experts

def load_experts(data, data_dir, count, epochs, seed):
    """`count` expert trajectories over `epochs` epochs (MTT, Sec. 3.1), trained where they are missing.

    -> float32 (count, epochs + 1, P) on data.device: the parameters at the start and after every epoch. One file
    an expert, rewritten after each epoch, in a folder named after data set, preprocessing and network; several
    processes with different seeds can fill one folder. Experts: SGD, lr 0.01, batch 256, DSA."""
    net = ConvNet(data.shape, len(data.classes)).to(data.device)
    setting = {"preprocess": data.preprocess.fingerprint, "network": f"convnet{net.depth}",
               "shape": list(data.shape), "classes": len(data.classes)}
    folder = pathlib.Path(data_dir) / "experts" / f"{data.name}_{setting['preprocess'][:-8]}_{setting['network']}"
    here = {p.name for p in folder.glob("seed*_expert*.pt")}
    mine = [f"seed{seed}_expert{i:03d}.pt" for i in range(count)]
    # This seed's experts first, then others that lie here, then new ones.
    names = [name for name in mine if name in here] + sorted(here - set(mine))
    names = (names + [name for name in mine if name not in here])[:count]
    progress, trajectories = Progress(count * epochs, "expert epochs"), []
    for name in names:
        path, trajectory = folder / name, None
        if path.exists():
            stored = load(path, "an expert")
            if stored.get("setting") != setting:
                raise UserError(f"{path} is an expert of another setting: move it away, or take another --data-dir")
            trajectory = stored["trajectory"][:epochs + 1].to(data.device)
        if trajectory is None or len(trajectory) <= epochs:
            key = tuple(path.stem.split("_"))  # ("seed0", "expert003"): what its random numbers depend on
            for trajectory in expert_epochs(data, net, trajectory, epochs, key):
                save({"setting": setting, "trajectory": trajectory.cpu()}, path)
                progress(1)
        else:
            progress.skip(epochs)
        trajectories.append(trajectory)
    progress.end()
    return torch.stack(trajectories)


def experts_for(data, data_dir, settings, per_class, seed):
    """The experts that a method's settings ask for -> as load_experts. Raises UserError for what would only be found
    after the hours that they take: too few images in a class, nothing to --compile with."""
    data.random_real(per_class)
    if settings["compile"]:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=data.device))
        except Exception as error:  # no compiler, no headers of Python, an old GPU: they fail in many ways
            raise UserError(f"--compile cannot be used here ({type(error).__name__}): it wants a C++ compiler and Python's "
                            "headers; install these or leave --compile out") from None
    epochs = settings["max_start"] + settings["expert_epochs"]
    return load_experts(data, data_dir, settings["experts"], epochs, seed)


def expert_epochs(data, net, trajectory, epochs, key):
    """Train one expert on the real set from where `trajectory` (E, P) ends; yields it after every epoch."""
    if trajectory is None:
        trajectory = flat_parameters(seeded(key, ConvNet, data.shape, len(data.classes))).to(data.device)[None]
    parameters = {name: p[None].clone().requires_grad_() for name, p in unflatten(net, trajectory[-1]).items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01)
    for epoch in range(len(trajectory) - 1, epochs):
        order = torch.randperm(len(data.train), generator=rng(*key, epoch, device=data.device), device=data.device)
        for step, index in enumerate(order.split(256)):
            draw = draw_dsa(len(index), *key, epoch, step, device=data.device, flip=data.flip)
            optimizer.zero_grad()
            accumulate_gradient(net, parameters, dsa(data.train[index], *draw)[None], data.train_labels[index][None])
            optimizer.step()
        flat = torch.cat([p.detach().flatten() for p in parameters.values()])
        if not flat.isfinite().all():
            raise UserError("an expert's parameters are not finite: check the images for constant or broken ones")
        trajectory = torch.cat([trajectory, flat[None]])
        yield trajectory


# ------------------------------------------------------------------------------------------ the trajectory unroll

def draw_start(experts, settings, *key):
    """A random expert of (K, E + 1, P) and a start epoch t <= max_start -> phi*_t, phi*_{t+M}, each (P,)."""
    expert = experts[hash_int((*key, "expert")) % len(experts)]
    t = hash_int((*key, "start")) % (settings["max_start"] + 1)
    return expert[t], expert[t + settings["expert_epochs"]]


def identity(method, data, per_class, settings, seed, experts=None):
    """What has to be equal for a checkpoint to be continued. More iterations of the same thing may be. `compile` is told
    where it is on: checkpoints from before it was there go on."""
    same = {k: v for k, v in settings.items() if k != "iterations" and (k, v) != ("compile", False)}
    if experts is not None:
        same["experts' norm"] = experts.double().norm().item()  # other experts, another norm
    return {"method": method, "dataset": data.name, "fingerprint": data.preprocess.fingerprint,
            "per class": per_class, "seed": seed, **same}


def settings_for(table, dataset, per_class):
    """The row of a method's settings table for a data set and budget: the nearest budget (in ratio) of the data
    set, or of CIFAR-10 where the data set has no row. Whitening is for CIFAR and SVHN alone."""
    name = pathlib.Path(dataset).name
    rows = {n: row for (of, n), row in table.items() if of == (name if (name, 1) in table else "cifar10")}
    row = dict(rows[min(rows, key=lambda n: abs(math.log(per_class / n)))])
    return row | {"zca": row["zca"] if name in ("cifar10", "cifar100", "svhn") else False}


def student_batch(count, batch, step, *key, device="cpu"):
    """Indices of the synthetic images of student step `step`: all, or `batch` of a shuffled pass over them, in which
    those that do not fill a batch are left out."""
    if not 0 < batch < count:
        return torch.arange(count, device=device)
    per_pass = count // batch
    order = torch.randperm(count, generator=rng(*key, "order", step // per_pass, device=device), device=device)
    return order[step % per_pass * batch:][:batch]


def match_trajectory(net, start, target, step_size, batch, steps, compiled=False):
    """Eq. (7) of HaBa: train a student from `start` for `steps` steps, compare it with `target`, differentiate.

    start, target: expert parameters (P,) at epoch t and t + M. step_size: alpha, a 0-d tensor. batch(n) -> images
    (b, c, h, w) and labels (b,) or soft labels (b, C) of student step n: drawn from n alone and differentiable, for
    it is called twice: going forward without a graph, and going back with one, so that the gradient flows through
    augmentation and hallucinators into whatever leaves it is made of, one step at a time. compiled: see student_step.
    -> (loss 0-d, the gradient with respect to step_size 0-d); the leaves' .grad has been added to.
    Memory does not grow with the steps but for their parameters, P numbers each: no graph spans two steps."""
    gradient_of, pull_back = student_step(net, compiled)
    students, alpha = [start], step_size.detach()
    for n in range(steps):
        with torch.no_grad():
            images, labels = (t.detach() for t in batch(n))  # that may be leaves themselves
        gradient = sum(gradient_of(students[-1], x, y, len(images)) for x, y in student_chunks(images, labels))
        students.append(students[-1] - alpha * gradient)
    scale = (start - target).square().sum()
    loss = (students[-1] - target).square().sum() / scale
    adjoint = 2 * (students[-1] - target) / scale  # dL / d phi_{t+n}, from n = N down to 0
    step_gradient = torch.zeros_like(loss)
    for n in reversed(range(steps)):
        images, labels = batch(n)
        student, through, of_chunks = students.pop(n), torch.zeros_like(adjoint), []
        for x, y in student_chunks(images.detach(), labels.detach()):
            # phi_{n+1} = phi_n - alpha g(phi_n, x, y): one vector-Jacobian product with -alpha times the adjoint
            gradient, of_student, *of_batch = pull_back(student, x, y, len(images), -alpha * adjoint)
            step_gradient -= (gradient * adjoint).sum()
            through += of_student
            of_chunks.append(of_batch)
        adjoint = adjoint + through
        given = [(t, torch.cat(parts)) for t, parts in zip((images, labels), zip(*of_chunks)) if t.requires_grad]
        torch.autograd.backward(*zip(*given))
    return loss, step_gradient


@functools.lru_cache(maxsize=4)  # what was compiled stays so from one iteration to the next
def student_step(net, compiled=False):
    """A student's gradient and the derivative of that gradient, as two functions of parameters (P,), images (b, c, h, w),
    labels (b,) or (b, C), and the number of images that the mean is over, of which these may be a chunk:

    gradient(student, images, labels, count) -> (P,), of cross-entropy. pull_back(student, images, labels, count,
    adjoint (P,)) -> the same gradient, and the products of `adjoint` with its Jacobians for student, images and, if they
    are soft, labels. No bfloat16 here; on a GPU convolutions take TF32.

    compiled: by torch.compile, which fuses what lies between the convolutions and picks their layout; it wants pure
    functions, torch.func's, which by themselves are slower than autograd. It rounds otherwise: 1e-6 from float64, as
    without, unless a ReLU's input is so near to 0 that its sign changes with the rounding. One such unit of 5.5 million,
    at 32 images, makes 3e-3 of the gradient."""
    def gradient(student, images, labels, count, create_graph=False):
        student = student.detach().requires_grad_()
        loss = student_loss(net, student, images, labels, count)
        return torch.autograd.grad(loss, student, create_graph=create_graph)[0]

    def pull_back(student, images, labels, count, adjoint):
        leaves = [t.detach().requires_grad_() for t in (student, images, labels) if t.is_floating_point()]
        images, labels = (*leaves[1:], labels)[:2]
        loss = student_loss(net, leaves[0], images, labels, count)
        found, = torch.autograd.grad(loss, leaves[0], create_graph=True)
        return found.detach(), *torch.autograd.grad(found, leaves, adjoint)

    def pure_gradient(student, images, labels, count):
        return torch.func.grad(student_loss, argnums=1)(net, student, images, labels, count)

    def pure_pull_back(student, images, labels, count, adjoint):
        if labels.is_floating_point():
            found, pull = torch.func.vjp(lambda p, x, y: pure_gradient(p, x, y, count), student, images, labels)
        else:
            found, pull = torch.func.vjp(lambda p, x: pure_gradient(p, x, labels, count), student, images)
        return found, *pull(adjoint, retain_graph=False)

    if not compiled:
        return gradient, pull_back
    return tuple(torch.compile(f, dynamic=False) for f in (pure_gradient, pure_pull_back))


def student_loss(net, student, images, labels, count):
    """Cross-entropy of net with parameters `student` (P,), a sum over the images divided by `count`."""
    logits = functional_call(net, unflatten(net, student), images)
    return F.cross_entropy(logits, labels, reduction="sum") / count


def student_chunks(images, labels):
    """Chunks of a student's batch, of equal size where that is possible: other sizes would be compiled anew."""
    count = math.ceil(len(images) / chunk_size(images))
    return zip(images.chunk(count), labels.chunk(count))


def student_gradient(net, student, images, labels, create_graph=False):
    """The gradient (P,) of the mean cross-entropy at parameters `student` (P,), chunk by chunk; with create_graph
    differentiable where images are."""
    gradient, _ = student_step(net)
    return sum(gradient(student, x, y, len(images), create_graph) for x, y in student_chunks(images, labels))


# ------------------------------------------------------------------------------------------ distribution matching

@torch.no_grad()
def start_anew(net, *key):
    """Give `net` the random parameters that depend on `key` alone: as torch's layers start, uniform in
    +-1 / sqrt(fan-in), FRePoNet's as LeCun's, normal with variance 1 / fan-in; norms at 1 and 0. Drawn on net's
    device, so nothing is copied to it; -> net."""
    generator = rng(*key, device=next(net.parameters()).device)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            bound = layer.weight[0].numel() ** -0.5
            if isinstance(net, FRePoNet):
                layer.weight.normal_(0, bound, generator=generator)
                layer.bias.zero_()
            else:
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
        elif isinstance(layer, (nn.GroupNorm, nn.BatchNorm2d)):
            layer.reset_parameters()
    return net


def class_members(data):
    """Which training images belong to each class: indices (C, largest class) in which a shorter class repeats -1 at
    its end, and the size of the smallest class."""
    members = [torch.nonzero(data.train_labels == label)[:, 0] for label in range(len(data.classes))]
    padded = nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=-1)
    return padded, min(len(m) for m in members)


def draw_members(members, per_class, *key):
    """`per_class` different training images of every class, at most the smallest class's size -> indices
    (C * per_class,) in class order, drawn on the device."""
    score = torch.rand(members.shape, generator=rng(*key, device=members.device), device=members.device)
    return members.gather(1, score.masked_fill(members < 0, -1).topk(per_class).indices).flatten()


@torch.no_grad()
def features(net, images):
    """net's features of images (n, c, h, w) -> (n, F) float32; no graph, in bfloat16 where `autocast` has it."""
    with autocast(images.device):
        return torch.cat([net.features(x).float() for x in
                          images.split(len(images) if mixes_images(net) else chunk_size(images))])


@torch.no_grad()
def mean_features(net, images, labels, classes, draw=None, half=True):
    """Mean over each class of net's features of images (n, c, h, w) -> (C, F) float32; no graph, in chunks, in
    bfloat16 where `autocast` has it and `half`. draw: a Siamese draw of `draw_dsa` for all of them."""
    sums, each = 0, torch.arange(classes, device=labels.device)[:, None]
    for x, y in zip(images.split(chunk_size(images)), labels.split(chunk_size(images))):
        with autocast(images.device) if half else contextlib.nullcontext():
            features = net.features(dsa(x, *draw) if draw else x)
        sums = sums + (each == y).float() @ features.float()
    return sums / (each == labels).sum(1, keepdim=True)


def match_means(net, real, images, part=None, half=False, room=64):
    """Compare class means of features, and differentiate, with the memory of a few chunks.

    real (C, F): means to reach. images (C * n, c, h, w) in class order, n a class; the graph they hang on is left
    alone. -> (squared distance of the means of every class (C,), gradient of its sum with respect to `images`).
    part (C * m, c, h, w): some of them, m a class, in class order: the means are over all `images`, the gradient is
    with respect to `part` alone, times n / m: unbiased when they are drawn uniformly (KFS, Sec. 3.2).
    The gradient at an image's features is known once the means are, so each chunk goes back on its own; the graphs
    of the first `room` chunks are kept from the way forth, the others are computed again."""
    size, values, kept = chunk_size(images), [], []

    def features(x):
        with autocast(x.device) if half else contextlib.nullcontext():
            return net.features(x).float()

    for x in images.detach().split(size):
        if part is None and len(kept) < room:
            x = x.detach().requires_grad_()
            kept.append((x, features(x)))
            values.append(kept[-1][1].detach())
        else:
            with torch.no_grad():
                values.append(features(x))
    gap = torch.cat(values).unflatten(0, (len(real), -1)).mean(1) - real
    part = images if part is None else part
    # d ||gap_c||^2 / d the features of one of n images = 2 gap_c / n; n / m times that for a part: 2 gap_c / m
    m, gradient = len(part) // len(real), []
    for x, adjoint in zip(part.detach().split(size), (2 / m * gap).repeat_interleave(m, 0).split(size)):
        if kept:
            x, value = kept.pop(0)
        else:
            x = x.detach().requires_grad_()
            value = features(x)
        gradient.append(torch.autograd.grad(value, x, adjoint)[0])
    return gap.square().sum(1), torch.cat(gradient)


# ------------------------------------------------------------------------------------------ kernel ridge regression

def krr(support, labels, target, ridge=1e-6):
    """Kernel ridge regression on features (survey Eq. 14; FRePo): K = support support^T, then the prediction
    target support^T (K + ridge * trace(K) / n * I)^-1 labels, differentiable in all three.

    support (n, F), labels (n, C), target (m, F) -> (m, C) in target's type. Solved by Cholesky in float64: the ridge
    is smaller than float32's rounding of K. Raises UserError (on a GPU, which is not waited for: gives NaN) where the
    matrix is not positive definite."""
    wide = support.double()
    kernel = wide @ wide.T
    trace = kernel.diagonal().sum()  # the derivatives of .trace() would wait for the GPU
    kernel = kernel + ridge * trace / len(kernel) * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    if failed.device.type == "cpu" and failed:
        raise UserError("the features' kernel matrix is not positive definite: images are equal or not finite; take a "
                        "larger ridge or smaller learning rates")
    factor = torch.where(failed > 0, torch.nan, factor)
    weights = wide.T @ torch.cholesky_solve(labels.double(), factor)  # w* of translator Eq. (2)
    return target @ weights.to(target.dtype)


def nfr_loss(support, labels, target, target_labels, ridge=1e-6):
    """Neural feature regression, translator Eq. (2): half the squared error of the prediction that the synthetic set's
    features `support` (n, F) and labels (n, C) make for real features (m, F), summed over classes, a mean over m."""
    return squared_error(krr(support, labels, target, ridge), target_labels) / len(target)


# ------------------------------------------------------------------------------------------ scoring

PROTOCOL = dict(network=ConvNet, epochs=1000, batch=256, lr=0.01, adam=False, augment=DSA,
                drops=((1 / 2, 0.1),))  # drops: (share of the epochs, factor of the learning rate)


def frepo_protocol(count):
    """How FRePo and the translator score `count` distilled images: squared error on soft labels, Adam, warm-up and
    cosine, their own network without norm. The epochs are theirs at the count that is nearest in ratio: as many steps
    up to 500 images, which are one batch; 1000 images make two, so 10000 steps are 5000 epochs."""
    epochs = {10: 1000, 100: 2000, 200: 20000, 400: 5000, 500: 5000, 1000: 5000}
    return dict(network=FRePoNet, epochs=epochs[min(epochs, key=lambda n: abs(math.log(count / n)))], batch=500,
                lr=3e-4, adam=True, augment=("colour", "crop", "cutout", "flip", "rotate", "translate"), drops=())


def targets(labels, classes):
    """Class numbers (n,) -> one-hot - 1 / C, (n, C): what FRePo predicts for real images."""
    return F.one_hot(labels, classes) - 1 / classes


def centre_labels(labels, classes):
    """Class numbers (n,) -> soft labels (n, C) as FRePo's synthetic images start: targets / sqrt(C / 10)."""
    return targets(labels, classes) / math.sqrt(classes / 10)


def learning_rate(protocol, lr, epoch, epochs, steps=1):
    """The rate of an epoch of `steps` steps: lr with drops; with Adam 500 steps of linear warm-up (at most half of the
    training), then a cosine to 1 %."""
    if not protocol["adam"]:
        return lr * math.prod(factor for share, factor in protocol["drops"] if epoch >= math.ceil(share * epochs - 1e-9))
    warm = min(500 / steps, epochs / 2)
    falling = (1 + math.cos(math.pi * max(0, epoch - warm) / (epochs - warm))) / 2
    return lr * (min(1, (epoch + 1) / warm) if epoch < warm else .01 + .99 * falling)


def train_and_test(data, draw, count, protocol=PROTOCOL, lr=None, epochs=None, runs=5, seed=0, side_by_side=None,
                   test=None):
    """Train `runs` fresh networks on a distilled set and test them (the README, "Protocols") -> list of percentages,
    or of what test(net, parameters), a dict, returns in place of the accuracy on the test set.

    draw(run, index (b,), *key) -> preprocessed images (b, c, h, w) and labels of entries `index` of 0..count-1;
    what it draws at random depends on `key`. protocol: as PROTOCOL, SGD with momentum 0.9 and weight decay 5e-4 on
    the cross-entropy, or as frepo_protocol gives it; its lr and epochs can be replaced. The accuracy is that after the
    last epoch. On a GPU networks without batch norm train side by side."""
    device, classes, build = data.device, len(data.classes), protocol["network"]
    lr, epochs, batch = lr or protocol["lr"], epochs or protocol["epochs"], protocol["batch"]
    test = test or (lambda net, parameters: accuracy(net, parameters, data.test, data.test_labels))
    criterion, steps = squared_error if protocol["adam"] else F.cross_entropy, math.ceil(count / batch)
    if side_by_side is None:
        side_by_side = device.type == "cuda" and not mixes_images(build(data.shape, classes))
    progress, result = Progress(runs * epochs, "scoring epochs"), []
    for group in torch.arange(runs).split(runs if side_by_side else 1):
        group = group.tolist()
        nets = [seeded((seed, "score", run), build, data.shape, classes).to(device) for run in group]
        net, starts = nets[0], [dict(net.named_parameters()) for net in nets]
        parameters = {name: torch.stack([s[name].detach() for s in starts]).requires_grad_() for name in starts[0]}
        optimizer = torch.optim.Adam(parameters.values()) if protocol["adam"] else torch.optim.SGD(
            parameters.values(), momentum=0.9, weight_decay=5e-4)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = learning_rate(protocol, lr, epoch, epochs, steps)
            orders = [torch.randperm(count, generator=rng(seed, "order", run, epoch, device=device), device=device)
                      for run in group]
            for step in range(0, count, batch):
                batches = []
                for run, order in zip(group, orders):
                    key = (seed, "score", run, epoch, step)
                    with torch.no_grad():
                        images, labels = draw(run, order[step:step + batch], *key)
                        if protocol["augment"]:
                            images = dsa(images, *draw_dsa(len(images), *key, device=device, flip=data.flip,
                                                           names=protocol["augment"]))
                        if protocol["adam"] and labels.ndim == 1:
                            labels = centre_labels(labels, classes)
                    batches.append((images, labels))
                optimizer.zero_grad()
                accumulate = protocol.get("accumulate", accumulate_gradient)  # HaBa's Table 4 adds a term to the loss
                accumulate(net, parameters, *(torch.stack(part) for part in zip(*batches)), criterion)
                optimizer.step()
            progress(len(group))
        net.eval()
        result += [test(net, {name: p.detach()[i] for name, p in parameters.items()}) for i in range(len(group))]
    progress.end()
    return result


def squared_error(predicted, labels, reduction="sum"):
    """Half the squared error, summed over classes and images: FRePo's loss."""
    return 0.5 * (predicted - labels).square().sum()


def image_sampler(distilled, device):
    """What `score` draws batches from, for a file of plain images: (draw(run, index, *key) -> images, labels; number of
    entries)."""
    images, labels = distilled["images"].to(device), distilled["labels"].to(device)
    return lambda run, index, *key: (images[index], labels[index]), len(images)


def score_random(data, stored_per_class, protocol, epochs, runs=5, seed=0, steps=None, side_by_side=None, test=None):
    """Score random real images of the same storage, rounded up -> (images a class, epochs, list as of train_and_test).

    They get FRePo's protocol where `protocol` is that, and PROTOCOL with the network and augmentation of `protocol`
    elsewhere; over the same share of the protocol's epochs that `epochs` are, or over as many `steps`."""
    per_class = math.ceil(stored_per_class / math.prod(data.shape))
    per_class = min(per_class, data.train_labels.bincount().min().item())  # a small class may have no more
    sets = [data.random_real(per_class, seed, "random real", run) for run in range(runs)]
    own = protocol if protocol["adam"] else PROTOCOL | {key: protocol[key] for key in ("network", "augment")}
    epochs = max(1, round(epochs * own["epochs"] / protocol["epochs"]))
    if steps:
        epochs = max(1, round(steps / math.ceil(len(sets[0][0]) / own["batch"])))
    return per_class, epochs, train_and_test(data, lambda run, index, *key: (sets[run][0][index], sets[run][1][index]),
                                             len(sets[0][0]), own, None, epochs, runs, seed, side_by_side, test)


def score(data, distilled, draw, count, out, epochs=None, runs=5, seed=0, protocol=PROTOCOL, steps=None, random=None,
          side_by_side=None, more=()):
    """Score a distilled file's set beside random real images of the same storage, print both and add a line of JSON to
    out/results.jsonl -> that line as a dict. `protocol` is the method's, or gives it for `count`; the random images' is
    score_random's. steps: for the random images, in place of the same share of epochs. random: what an earlier line says
    of them, its random_... keys; {} where the set itself is random or whole. more: keys to add or replace."""
    began = time.time()
    protocol = protocol(count) if callable(protocol) else protocol
    epochs = epochs or protocol["epochs"]
    found = train_and_test(data, draw, count, protocol, distilled["step_size"], epochs, runs, seed, side_by_side)
    if random is None:
        per_class, random_epochs, percentages = score_random(data, distilled["stored_per_class"], protocol, epochs, runs,
                                                             seed, steps, side_by_side)
    else:
        per_class, random_epochs, percentages = distilled["per_class"], epochs, found
    line = {key: distilled[key] for key in ("method", "dataset", "per_class", "stored_per_class", "network")}
    line |= {"augment": bool(protocol["augment"]), "accuracy": np.mean(found).round(2), "std": np.std(found).round(2),
             "runs": runs, "epochs": epochs, "random_images_per_class": per_class,
             "random_accuracy": np.mean(percentages).round(2), "random_std": np.std(percentages).round(2),
             "random_epochs": random_epochs, **(random or {}),
             "iterations": distilled["iterations"], "experts": distilled["settings"].get("experts"),
             "seconds": distilled["seconds"], "scoring_seconds": round(time.time() - began, 1),
             "device": device_name(data.device), "torch": torch.__version__, "seed": distilled["seed"],
             "scoring_seed": seed, "command": " ".join(["python", *sys.argv]), **dict(more)}
    line["gain"] = round(line["accuracy"] - line["random_accuracy"], 2)
    print(f"{line['method']} on {line['dataset']}, {line['per_class']} a class: {line['accuracy']:.2f} +- "
          f"{line['std']:.2f} % on the test set ({runs} networks, {line['network']}, {epochs} epochs)\n"
          f"random real images, {line['random_images_per_class']} a class (the same storage, rounded up): "
          f"{line['random_accuracy']:.2f} +- {line['random_std']:.2f} %; gain {line['gain']:+.2f}")
    append_line(json.dumps(line), pathlib.Path(out) / "results.jsonl")
    return line


def device_name(device):
    """"NVIDIA H100 ..." or "cpu, 4 threads"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------ files

def save(content, path):
    """torch.save beside `path`, then rename: a kill never leaves half a file. Raises UserError."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(buffer.getvalue(), path)


def write(content, path):
    """Write bytes beside `path`, then rename. Raises UserError where the folder or the disk refuses. What a killed
    process left beside it goes away, when it is a minute old: a younger one may be another process at work."""
    path = pathlib.Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 60:
                    left.unlink()
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        advice = "free some space or " * (error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)) + "take another folder"
        raise UserError(f"{path} cannot be written ({error.strerror}): {advice}; what was written before is whole") from None


def append_line(text, path):
    """Add one line to a text file, in one write. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): free some space or take another --out") from None


def load(path, what):
    """torch.load(weights_only=True) of one of our files. Raises UserError where it is missing, broken or foreign."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path} does not exist: give the path of {what}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        assert isinstance(content, dict)
        return content
    except Exception:  # pickle, zip and tensors fail in many ways
        advice = "give another file" if what == "a distilled file" else "remove it or give another file"
        raise UserError(f"{path} cannot be read as {what}: it is broken or another program's; {advice}") from None


def save_distilled(path, data, method, per_class, tensors, step_size, settings, seconds, seed, protocol=PROTOCOL):
    """Write a distilled file: everything that is needed to use it. `tensors` {name: tensor} is what is stored and
    counted (labels are not, as in the papers); `step_size` is the learned learning rate or None; `protocol` the one to
    train with. Raises UserError."""
    stored = sum(t.numel() for name, t in tensors.items() if t.is_floating_point() and name != "labels")
    network = protocol["network"](data.shape, len(data.classes))
    constants = (None, None) if data.preprocess.whiten is not None else (
        v.flatten().tolist() for v in (data.preprocess.mean, data.preprocess.std))
    distilled = {
        "format": "distilled 1", "method": method, "dataset": data.name, "classes": data.classes,
        "shape": list(data.shape), "per_class": per_class, "stored_per_class": stored / len(data.classes),
        "preprocess": data.preprocess.kind, "fingerprint": data.preprocess.fingerprint,
        **dict(zip(("mean", "std"), constants)),
        "augmentation": f"DSA: one of {' '.join(t for t in protocol['augment'] if data.flip or t != 'flip')} a batch"
        if protocol["augment"] else "none",
        "step_size": step_size, "network": f"{network.kind}{network.depth}",
        "settings": settings, "iterations": settings["iterations"], "seconds": round(seconds, 1), "seed": seed,
        "torch": str(torch.__version__), **{name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}}
    save(distilled, path)
    return distilled


def load_distilled(path):
    """Read a distilled file -> dict. Raises UserError where it is missing, broken or foreign."""
    distilled = load(path, "a distilled file")
    needed = {"method", "dataset", "classes", "shape", "per_class", "stored_per_class", "preprocess", "fingerprint",
              "step_size", "network", "settings", "iterations", "seconds", "seed"}
    if distilled.get("format") != "distilled 1" or not needed <= distilled.keys():
        raise UserError(f"{path} is not a distilled file of this project: give one that mtt.py, haba.py, ... wrote")
    return distilled


def save_picture(path, data, images, per_row):
    """A PNG of preprocessed images (n, c, h, w), `per_row` in a row: whitening undone, clamped to [0, 1]."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid
    scale = max(1, 64 // data.shape[-1])
    pixels = data.preprocess.undo(images.detach().to(data.device)).clamp(0, 1).cpu()
    pixels = F.interpolate(pixels, scale_factor=scale, mode="nearest")
    buffer = io.BytesIO()
    to_pil_image(make_grid(pixels, nrow=per_row, padding=2, pad_value=1)).save(buffer, format="PNG")
    write(buffer.getvalue(), path)


# ------------------------------------------------------------------------------------------ long work

class Progress:
    """A line on stderr with the count, the rate and the time left; `text` is called only when it is shown."""

    def __init__(self, total, what):
        self.total, self.what, self.done, self.fresh = total, what, 0, 0
        self.began = self.shown = time.time()
        self.every = 1 if sys.stderr.isatty() else 20

    def skip(self, steps):
        """Count steps that an earlier run did: they tell nothing of the rate."""
        self.done += steps

    def __call__(self, steps=1, text=lambda: ""):
        self.done, self.fresh = self.done + steps, self.fresh + steps
        if time.time() - self.shown >= self.every:
            self.show(text())

    def show(self, text=""):
        self.shown = time.time()
        rate = self.fresh / max(self.shown - self.began, 1e-9)
        left = (self.total - self.done) / rate if rate else 0
        clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate if rate else 0:.1f} s each"
        start, end = ("\r\x1b[K", "") if self.every == 1 else ("", "\n")
        print(f"{start}{self.what} {self.done}/{self.total}  {speed}  {clock} left  {text}", end=end,
              file=sys.stderr, flush=True)

    def end(self):
        """Close the line, with the time it took."""
        if self.fresh:
            start, end = ("\r\x1b[K", "\n") if self.every == 1 else ("", "\n")
            print(f"{start}{self.what} {self.done}/{self.total}  done in {time.time() - self.began:.0f} s", end=end,
                  file=sys.stderr, flush=True)


def iterations(total, path, settings, state, watch, every=60):
    """Yield the iteration numbers of a distillation that can be killed: `for it in iterations(...)`.

    state: {name: tensor, Module or Optimizer}, read from the checkpoint `path` in place when there is one and
    written to it every `every` seconds, at the end and on Ctrl-C (which waits for the iteration under way).
    watch: {"loss": 0-d tensor, "seconds": float}, the caller's: the loss is looked at only when it is shown, so
    that a GPU is not waited for; seconds of work add up over runs. Every loss is in the checkpoint, for evaluate.py
    --curves. Raises UserError where a checkpoint belongs to other settings or the loss is not finite, and then keeps the
    last good checkpoint."""
    done, spent, interrupted, losses = 0, 0.0, [], []
    if pathlib.Path(path).exists():
        stored = load(path, "a checkpoint")
        if stored.get("settings") != settings:
            old = stored.get("settings") or {}
            other = [f"{k} {old.get(k)!r} there, {v!r} here" for k, v in settings.items() if old.get(k) != v]
            raise UserError(f"{path} is a checkpoint of other settings ({'; '.join(other) or 'more there'}): remove it "
                            "or take another --out")
        done, spent = stored["iteration"], stored["seconds"]
        losses.append(stored.get("losses", torch.full((done,), math.nan)))
        if done > total:
            raise UserError(f"{path} is at iteration {done} already, past --iterations {total}: remove it or take "
                            "another --out")
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                with torch.no_grad():
                    value.copy_(stored["state"][name])
            else:
                value.load_state_dict(stored["state"][name])
    began, saved, progress = time.time(), time.time(), Progress(total, "iterations")
    watch["seconds"] = spent
    progress.skip(done)

    def checkpoint(iteration):
        loss = float(watch["loss"])
        learned = [t for v in state.values() if not isinstance(v, torch.optim.Optimizer)
                   for t in (v.parameters() if isinstance(v, nn.Module) else [v])]
        if not math.isfinite(loss) or not all(t.isfinite().all() for t in learned):
            raise UserError(f"the loss is not finite at iteration {iteration} (loss {loss}): take smaller learning "
                            f"rates and another --out; {path} still holds the last good state if it was written")
        kept = {name: v.detach().cpu() if torch.is_tensor(v) else v.state_dict() for name, v in state.items()}
        watch["seconds"] = spent + time.time() - began
        losses[:] = [torch.cat([part.float().cpu() for part in losses])]
        save({"settings": settings, "iteration": iteration, "seconds": watch["seconds"], "losses": losses[0],
              "state": kept}, path)

    def on_interrupt(*_):
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)
        print("\nstopping after this iteration (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        for iteration in range(done, total):
            yield iteration
            losses.append(watch["loss"].detach().flatten())
            progress(1, lambda: f"loss {float(watch['loss']):.4f}")
            if time.time() - saved >= every or iteration + 1 == total or interrupted:
                checkpoint(iteration + 1)
                saved = time.time()
            if interrupted:
                raise UserStop(f"stopped at iteration {iteration + 1} of {total}, kept in {path}: the same command "
                               "goes on from there")
    finally:
        signal.signal(signal.SIGINT, previous)
    progress.end()


class UserStop(Exception):
    """Ctrl-C after a checkpoint was written; `run` prints the message and exits with status 130."""


# ------------------------------------------------------------------------------------------ command line

def positive(text):
    """An argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def amount(text):
    """An argparse type: a number from 0 to what float32 holds."""
    if not 0 <= float(text) <= 1e30:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1e30")
    return float(text)


class HelpFormatter(argparse.HelpFormatter):
    """Short enough for --help to fit a screen."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=112)

    def _format_usage(self, usage, actions, groups, prefix):
        return f"usage: python {self._prog} [--flag value ...]\n\n"


def add_arguments(parser, per_class="ipc", symbol="images a class", several=False):
    """The flags that every method has. several: a list of budgets."""
    parser.description += " In brackets: the paper's values for CIFAR-10."
    add = parser.add_argument
    add("--dataset", default="glyphs", help="glyphs (drawn here), a folder, cifar10, mnist, ... (glyphs)")
    add("--data-dir", default="data", help="data sets, caches and experts live here (data)")
    add("--size", type=positive, help="resize and crop a folder's pictures to a square of this side")
    add(f"--{per_class}", type=positive, help=symbol + " (1)", **dict(nargs="+", default=[1]) if several else dict(default=1))
    add("--seed", type=int, default=0, help="everything random follows from it (0)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--out", default="out", help="folder for the distilled file, its picture, results.jsonl (out)")
    add_scoring_arguments(parser)


def add_scoring_arguments(parser):
    """--runs and --epochs of a score."""
    parser.add_argument("--runs", type=positive, default=5, help="networks trained for the score (5)")
    parser.add_argument("--epochs", type=positive, help="epochs of each of them (1000; KFS: 200)")


def add_trajectory_arguments(parser, iterations):
    """The flags of the methods that match trajectories; what is not given comes from their tables."""
    add = parser.add_argument
    add("--iterations", type=positive, help=f"distillation iterations ({iterations})")
    add("--experts", type=positive, help="expert trajectories; trained when they are missing (100)")
    add("--student-steps", type=positive, help="N: student steps an iteration")
    add("--expert-epochs", type=positive, help="M: expert epochs that these N steps are to match")
    add("--max-start", type=positive, help="T+: the last epoch t that a student starts from")
    add("--step-size", type=amount, help="alpha at the start; learned, and used to train with afterwards")
    add("--compile", action="store_true", default=None, help="compile the student's steps: wants a C++ compiler (off)")


def merge_settings(settings, args):
    """The table's settings with what the command line gives in their place."""
    given = {name: value for name, value in vars(args).items() if name in settings and value is not None}
    return settings | given | {"size": args.size}


def output_path(method, args, budget):
    """The path of the distilled file to be, e.g. out/dm_cifar10_ipc10.pt; budget: "ipc10". Raises UserError now, not
    after hours, where its folder cannot be written."""
    seed = f"_seed{args.seed}" if args.seed else ""
    probe = pathlib.Path(args.out) / f".probe{os.getpid()}"
    write(b"", probe)
    probe.unlink()
    return probe.with_name(f"{method}_{pathlib.Path(args.dataset).name}_{budget}{seed}.pt")


def run(main):
    """Call main() for the command line: mistakes end with one line and status 2, Ctrl-C with 130."""
    program = pathlib.Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        sys.exit(complain(program, error, 2))
    except UserStop as stop:
        sys.exit(complain(program, stop, 130))
    except KeyboardInterrupt:
        sys.exit(complain(program, "stopped; the files that were written are whole, the same command goes on from them", 130))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        sys.exit(complain(program, "out of memory: take fewer images a class or a larger device", 2))


def complain(program, text, status):
    print(f"\n{program}: {text}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit("common.py holds what the methods share; run one of them, e.g. python haba.py --help")
