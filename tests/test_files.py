"""Files, checkpoints, the command line and folders of images, as a user meets them."""

import ast
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import Args, make_data
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

import common


def test_save_is_atomic(tmp_path, monkeypatch):
    """A save that dies on the way leaves the old file whole; the next one replaces it."""
    path = tmp_path / "new folder" / "file.pt"
    common.save({"x": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os.stat("no such file"))
        with pytest.raises(OSError):
            common.save({"x": 2}, path)
    assert common.load(path, "a file") == {"x": 1}
    common.save({"x": 3}, path)
    assert common.load(path, "a file") == {"x": 3}
    with pytest.raises(OSError):
        common.save(1, path / "below a file")


@pytest.mark.parametrize("content", [None, b"junk", b"PK\3\4", pathlib.Path("code")])
def test_load_of_a_bad_file(content, tmp_path):
    """Missing, broken, cut off, or with pickled code: one line with the file's name."""
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(common.UserError, match=r"file\.pt[^\n]*a checkpoint[^\n]*$"):
        common.load(path, "a checkpoint")


@pytest.fixture(autouse=True)
def default_interrupt():
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def distill(folder, data, event=lambda *_: None, iterations=6, experts=None, **settings):
    """A toy: momentum SGD on a tensor and a module, keyed noise -> run, iterations, tensors."""
    args, done = Args(iterations=iterations, **settings), []
    common.seed("start")
    images, module = torch.randn(4, 3).requires_grad_(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD([images, *module.parameters()], lr=0.1, momentum=0.9)
    state = {"images": images, "module": module, "optimizer": optimizer}
    run = common.Run(folder / "toy.pt", data, args, state, lambda k: images.sum().item(), experts)
    for it in range(run.start, iterations):
        common.seed(it)
        loss = module(images + torch.randn(4, 3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        event(it, loss, images, module.weight)
        run.step(it, loss.detach())
        done.append(it)
    return run, done, torch.cat([images.flatten(), module.weight.flatten(), module.bias])


def test_interrupt_and_continue(data, tmp_path):
    """Ctrl-C ends an iteration and saves; continued, and for longer, it is the unbroken run."""
    unbroken, _, whole = distill(tmp_path / "a", data, eval_every=2)
    with pytest.raises(KeyboardInterrupt, match="3 iterations.*continue"):
        distill(tmp_path / "b", data, lambda it, *_: it == 2 and interrupt(), eval_every=2)
    run, done, continued = distill(tmp_path / "b", data, eval_every=2)
    assert done == [3, 4, 5] and torch.equal(continued, whole)
    assert [n for n, _ in run.record["evaluations"]] == [2, 4, 6]
    assert run.record["evaluations"] == unbroken.record["evaluations"]
    header, *rows = (tmp_path / "b" / "toy.csv").read_text().splitlines()
    first, last = rows[0].split(","), rows[-1].split(",")
    assert header == "iteration,loss,seconds" and (first[0], last[0]) == ("1", "6")
    assert 0 < float(last[1]) < float(first[1]) and 0 <= float(last[2]) < 60
    _, done, longer = distill(tmp_path / "b", data, iterations=9)  # without eval_every
    assert done == [6, 7, 8]
    assert torch.equal(longer, distill(tmp_path / "c", data, iterations=9, eval_every=2)[2])
    with pytest.raises(common.UserError, match="iterations"):
        distill(tmp_path / "b", data, eval_every=2)  # fewer


def test_saved_once_a_minute(data, tmp_path, monkeypatch):
    """A run that is killed continues from the last minute."""
    clock = iter(range(0, 10**6, 25))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with pytest.raises(ZeroDivisionError):
        distill(tmp_path, data, lambda it, *_: 1 / (it - 5))
    _, done, continued = distill(tmp_path, data)
    assert 0 < done[0] <= 5 and done[-1] == 5
    assert torch.equal(continued, distill(tmp_path / "whole", data)[2])


def test_interrupt_stops(data, tmp_path):
    """A second Ctrl-C stops at once; scoring, after the loop, stops at the first one."""
    with pytest.raises(KeyboardInterrupt):
        distill(tmp_path, data, lambda *_: [interrupt(), interrupt(), pytest.fail("went on")])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in range(2):  # the second time the loop has been finished before
        distill(tmp_path, data)
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_other_settings(data, tmp_path):
    """A checkpoint of other settings is named and left alone; where files lie is free."""
    distill(tmp_path, data, experts=torch.ones(9))
    checkpoint = (tmp_path / "toy.ckpt").read_bytes()
    changes = {"lr": {"lr": 0.2}, "seed": {"seed": 1}, "experts": {"experts": torch.ones(8)}}
    for name, change in (changes | {"data": {"data": make_data(tmp_path, 13)}}).items():
        with pytest.raises(common.UserError, match=rf"toy\.ckpt[^\n]*{name}[^\n]*$"):
            distill(tmp_path, **({"data": data, "experts": torch.ones(9)} | change))
    assert (tmp_path / "toy.ckpt").read_bytes() == checkpoint
    assert distill(tmp_path, data, experts=torch.ones(9), out="x", data_dir="y", runs=1)[1] == []


@pytest.mark.parametrize("part", [0, 1, 2], ids=["loss", "tensor", "module"])
def test_not_finite(part, data, tmp_path):
    """A loss or a state that is not finite is refused; the last good checkpoint is kept."""
    distill(tmp_path, data, iterations=2)
    checkpoint = (tmp_path / "toy.ckpt").read_bytes()
    with pytest.raises(common.UserError, match="not finite"):
        distill(tmp_path, data, lambda it, *parts: it == 5 and parts[part].data.fill_(torch.nan))
    assert (tmp_path / "toy.ckpt").read_bytes() == checkpoint


PRESETS = {("cifar10", 1): {"lr": 1.0, "zca": True}, ("cifar10", 10): {"lr": 10.0, "zca": True}}
PRESETS |= {("cifar10", 50): {"lr": 50.0}, ("cifar100", 1): {"lr": 100.0, "zca": True}}
ANT = "train/ant/0.png"


@pytest.mark.parametrize(
    "argv, lr, zca",
    [
        ("--dataset cifar10 --ipc 25", 50, False),
        ("--dataset cifar100 --ipc 50", 100, True),
        ("--dataset svhn --ipc 10", 10, False),
        ("--dataset some/folder --zca", 1, True),
        ("--dataset cifar10 --no-zca --lr 7 --no-mirrors --iterations 0 --seed 0", 7, False),
    ],
)
def test_presets(argv, lr, zca, capsys):
    """A flag beats a preset, a preset the default; the nearest budget in ratio."""
    for _ in range(2):
        args = common.parse_args(Args, PRESETS, argv.split())
        mirrors, iterations = "--no-mirrors" not in argv, 0 if "--iterations 0" in argv else 1000
        assert (args.lr, args.zca, args.mirrors, args.iterations) == (lr, zca, mirrors, iterations)
        assert json.loads(capsys.readouterr().out) == dataclasses.asdict(args)


@pytest.mark.parametrize("method", "mtt dm haba kfs frepo translator_fewshot".split())
def test_help(method, capsys, monkeypatch):
    """Every flag with the text of its field."""
    module = importlib.import_module(method)
    monkeypatch.setenv("COLUMNS", "999")
    with pytest.raises(SystemExit):
        common.parse_args(module.Args, module.PRESETS, ["--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(module.Args):
        text, flag = field.metadata["help"], "--" + field.name.replace("_", "-")
        assert text and re.search(rf"{flag}\b[^\n]*\s+{re.escape(text)}", out), flag


METHODS = """
dm cifar10 50 lr=1
dm cifar10 100 lr=10
dm cifar100 100 lr=1 zca=False
mtt cifar10 1 zca=True
haba cifar10 1 max_start=2 student_steps=50 lr_hallucinators=100 zca=True
kfs cifar10 1 high_res=False scoring="idc"
kfs cifar10 10 high_res=True
frepo cifar10 1 zca=True mirror=True batch_pool=500
frepo cifar10 100 mirror=True batch_pool=1000
frepo cifar100 10 mirror=False batch_pool=1000
frepo tinyimagenet 10 mirror=False
frepo mnist 10 zca=False
translator_fewshot fashionmnist 1 zca=False
translator_fewshot cifar100 1 zca=True lr=1e-3
"""


@pytest.mark.parametrize("line", METHODS.strip().splitlines())
def test_presets_of_the_methods(line):
    """The authors' settings by data set and budget (protocols.md, section 9)."""
    method, dataset, budget, *expected = line.split()
    module = importlib.import_module(method)
    argv = ["--dataset", dataset, "--bpc" if method == "haba" else "--ipc", budget]
    args = common.parse_args(module.Args, module.PRESETS, argv)
    for name, value in [pair.split("=") for pair in expected]:
        assert getattr(args, name) == ast.literal_eval(value), name


def test_protocols():
    """Scores: FRePo's network, augmentation and AdamW, the translator's variant; KFS's epochs."""
    for method, decay, more in (("frepo", 0, {}), ("translator_fewshot", 5e-4, {"scale": True})):
        protocol = importlib.import_module(method).protocol({}, 10)
        network = protocol.network((3, 32, 32), 10)
        assert network.kind == "frepo-convnet3"
        assert not any(isinstance(layer, nn.GroupNorm) for layer in network.modules())
        assert (protocol.optimizer, protocol.weight_decay) == (torch.optim.AdamW, decay)
        augment = functools.partial(protocol.augment)
        assert (augment.func, augment.keywords) == (common.frepo_augment, more)
    kfs = importlib.import_module("kfs").protocol({"scoring": "idc"})
    rates = [kfs.rate(epoch, 1280) for epoch in (0, 132, 133, 165, 166, 199)]
    assert kfs.epochs == 200 and rates == pytest.approx([0.01] * 2 + [0.002] * 2 + [0.0004] * 2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """tmp_path/own: two pictures each to train and test on ant and bee, 16x16 noise."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for i, place in enumerate(["train/ant", "train/bee", "test/ant", "test/bee"] * 2):
        path = tmp_path / "own" / f"{place}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "own"


def test_folder(folder, tmp_path):
    """Pictures with their classes, by name or path; val/ does for test/."""
    found = common.read_images("own", Args(data_dir="."))
    for split, pixels, labels in (("train", *found[:2]), ("test", *found[2:4])):
        files = sorted(folder.glob(f"{split}/*/*"))
        assert torch.equal(pixels, torch.stack([pil_to_tensor(Image.open(f)) for f in files]))
        assert labels.tolist() == [0, 0, 1, 1] and found[4] == ["ant", "bee"]
    (folder / "test").rename(folder / "val")
    for place in ({"dataset": "own", "data_dir": str(tmp_path)}, {"dataset": f"{folder}/"}):
        data = common.load_dataset(Args(device="cpu", **place))
        assert data.name == "own" and data.classes == ["ant", "bee"]
        torch.testing.assert_close(data.preprocess.undo(data.test), found[2] / 255)


def test_folder_cache(folder):
    """The second read does not open the pictures; a picture that is newer is read."""
    train, path = common.read_images("own", Args())[0], folder / ANT
    written = path.stat().st_mtime_ns
    Image.new("RGB", (16, 16), (9, 9, 9)).save(path)
    os.utime(path, ns=(written, written))
    assert torch.equal(common.read_images("own", Args())[0], train)
    os.utime(path, ns=(written, written + 10**9))
    assert (common.read_images("own", Args())[0][0] == 9).all()


def test_folder_size(folder):
    """--size: the middle square of each picture, resized; each size has its cache."""
    wide = np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(wide).save(folder / ANT)
    square = torch.from_numpy(wide).permute(2, 0, 1)[:, :, 4:20]
    for size in (16, 20, 16, 20):
        train = common.read_images("own", Args(size=size))[0]
        assert train.shape == (4, 3, size, size) and (size > 16 or torch.equal(train[0], square))


SPOILS = {
    "one class": ("classes", lambda path: [shutil.rmtree(bee) for bee in path.glob("*/bee")]),
    "class not in test": ("classes", lambda path: shutil.rmtree(path / "test/bee")),
    "sizes": ("--size", lambda path: Image.new("RGB", (20, 16)).save(path / ANT)),
    "half a picture": ("cannot be read", lambda path: os.truncate(path / ANT, 200)),
    "nothing there": ("glyphs", shutil.rmtree),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_bad_folder(spoil, folder, tmp_path):
    word, change = SPOILS[spoil]
    change(folder)
    with pytest.raises(common.UserError, match=rf"^[^\n]*{word}[^\n]*$") as caught:
        common.load_dataset(Args(dataset="own", data_dir=str(tmp_path), device="cpu"))
    assert "own" in str(caught.value)
