"""What the tests share: the repository on sys.path, few threads, a tiny data set, a way to call a program."""
import contextlib
import pathlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the images are tiny: more threads only wait for each other

import common  # noqa: E402


def make_folder(folder, classes=("ant", "bee", "cat"), train=8, test=20, size=16, grey=False):
    """Write folder/train/<class>/*.png and folder/test/<class>/*.png: blobs, a place and a tint for each class."""
    random = np.random.default_rng(7)
    y, x = np.mgrid[:size, :size] / size
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                blob = np.exp(-20 * ((x - .2 - .3 * label) ** 2 + (y - random.uniform(.3, .7)) ** 2))
                pixels = 60 + 120 * blob[..., None] * np.roll([1, .6, .3], label) + random.normal(0, 25, (size, size, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                (picture.convert("L") if grey else picture).save(folder / split / name / f"{i:02}.png")
    return folder


def program(monkeypatch, capfd, module, *args):
    """Run module.main for a command line, as its __main__ does -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    capfd.readouterr()
    status = 0
    try:
        common.run(module.main)
    except SystemExit as end:
        status = end.code or 0
    return status, *capfd.readouterr()


@pytest.fixture
def call(monkeypatch, capfd):
    return lambda module, *args: program(monkeypatch, capfd, module, *args)


@pytest.fixture
def exact(monkeypatch):
    """float32 in place of bfloat16, so that two ways of computing the same can be compared."""
    monkeypatch.setattr(common, "autocast", lambda device: contextlib.nullcontext())


@pytest.fixture
def small_data():
    """A common.Dataset of 3 classes of 3x16x16 noise around a mean image of each class."""
    g = torch.Generator().manual_seed(3)
    means = torch.randn(3, 3, 16, 16, generator=g)
    train_labels, test_labels = torch.arange(3).repeat(20), torch.arange(3).repeat(30)
    train = means[train_labels] + 2 * torch.randn(60, 3, 16, 16, generator=g)
    test = means[test_labels] + 2 * torch.randn(90, 3, 16, 16, generator=g)
    return common.Dataset("noise", ["a", "b", "c"], train, train_labels, test, test_labels, None)
