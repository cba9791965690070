"""What the tests share: the repository on sys.path, settings, a tiny data set."""

import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # more only wait for each other
os.environ["TORCH_COMPILE_DISABLE"] = "1"  # a minute a shape; tests that compile switch it on

import common  # noqa: E402


def make_data(per_class=12, device="cpu"):
    """A Dataset of 3 classes of random pixels, 3x16x16; the classes alternate."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(3).repeat(per_class)
    pixels = torch.randint(256, (2, len(labels), 3, 16, 16), generator=generator).byte()
    preprocess = common.Preprocess.fit(pixels[0], "standardize", None, None)
    arrays = preprocess(pixels[0]), labels, preprocess(pixels[1]), labels
    arrays = [array.to(device) for array in arrays]
    preprocess.mean, preprocess.std = preprocess.mean.to(device), preprocess.std.to(device)
    prints = f"standardize-{per_class}", "test"
    return common.Dataset("tiny", ["ant", "bee", "cat"], *arrays, preprocess, *prints)


@pytest.fixture
def data():
    return make_data()


@pytest.fixture
def exact(monkeypatch):
    """Compute in float32 where a CPU would take bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.fixture
def compiler():
    """Let torch.compile compile, without what an earlier run has cached."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    fresh = torch._inductor.config.patch(force_disable_caches=True)
    enabled = torch._dynamo.config.patch(disable=False)
    with enabled, fresh, torch.compiler.set_stance("default"):
        yield


def find(images, pool):
    """Index in `pool` of each image; each has to occur."""
    found = (images[:, None] == pool).flatten(2).all(2).nonzero()
    assert found[:, 0].tolist() == list(range(len(images)))
    return found[:, 1]


def relative(ours, theirs):
    """Relative distance of two tensors."""
    assert ours.shape == theirs.shape and theirs.norm() > 0
    return ((ours - theirs).norm() / theirs.norm()).item()


def spy(monkeypatch, owner, name, note):
    """Call note(result, *arguments) after each call of owner.name."""
    function = getattr(owner, name)

    def call(*args, **options):
        result = function(*args, **options)
        note(result, *args)
        return result

    monkeypatch.setattr(owner, name, call)
