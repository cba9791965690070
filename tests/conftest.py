"""What the tests share: the repository on sys.path, settings, a tiny data set."""

import contextlib
import pathlib
import sys
from dataclasses import dataclass

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # more only wait for each other

import common  # noqa: E402
from common import arg  # noqa: E402


@dataclass
class Args(common.Args):
    ipc: int = arg(1, "images a class")
    experts: int = arg(1, "expert trajectories")
    expert_epochs: int = arg(1, "M: epochs from start to target")
    max_start: int = arg(1, "T+: start epochs are below it")
    lr: float = arg(0.1, "learning rate of the images")
    mirrors: bool = arg(True, "whether mirror images go in")


def make_data(per_class=12, name="tiny"):
    """A Dataset of 3 classes of random pixels, 3x16x16; the classes alternate."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(3).repeat(per_class)
    pixels = torch.randint(256, (2, len(labels), 3, 16, 16), generator=generator).byte()
    preprocess = common.Preprocess.fit(pixels[0], "standardize", None, None)
    arrays = preprocess(pixels[0]), labels, preprocess(pixels[1]), labels
    prints = f"standardize-{per_class}", "test"
    return common.Dataset(name, ["ant", "bee", "cat"], *arrays, preprocess, *prints)


@pytest.fixture
def data():
    return make_data()


@pytest.fixture
def exact(monkeypatch):
    """Compute in float32 where a CPU would take bfloat16."""
    monkeypatch.setattr(common, "autocast", lambda device: contextlib.nullcontext())


def find(images, pool):
    """Index in `pool` of each image; each has to occur."""
    found = (images[:, None] == pool).flatten(2).all(2).nonzero()
    assert found[:, 0].tolist() == list(range(len(images)))
    return found[:, 1]


def relative(ours, theirs):
    """Relative distance of two tensors."""
    assert ours.shape == theirs.shape and theirs.norm() > 0
    return ((ours - theirs).norm() / theirs.norm()).item()
