"""Files, checkpoints, the command line and folders of images, as a user meets them."""

import ast
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Args, make_data
from torch import nn

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


def distill(folder, data, event=lambda *_: None, iterations=6, inputs=None, **settings):
    """A toy: momentum SGD on a tensor and a module, keyed noise -> run, iterations, tensors."""
    args, done = Args(iterations=iterations, **settings), []
    common.seed("start")
    images, module = torch.randn(4, 3).requires_grad_(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD([images, *module.parameters()], lr=0.1, momentum=0.9)
    state = {"images": images, "module": module, "optimizer": optimizer}
    run = common.Run(folder / "toy.pt", data, args, inputs=inputs)
    run.restore(state, lambda k: (None, images.sum().item() + k))
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


def test_continue(data, tmp_path):
    """A run that goes on after its end, with another --eval-every, is the unbroken run."""
    unbroken, _, whole = distill(tmp_path / "a", data, eval_every=2)
    distill(tmp_path / "b", data, eval_every=2, iterations=4)
    run, done, continued = distill(tmp_path / "b", data, eval_every=2)
    assert done == [4, 5] and torch.equal(continued, whole)
    found = dict(run.record["evaluations"])
    assert list(found) == [2, 4, 6] and found == dict(unbroken.record["evaluations"])
    assert found[6] == round(whole[:12].sum().item() + 0.5, 2)  # the mean of networks 0 and 1
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


def test_two_at_once(data, tmp_path):
    """Of two runs with one checkpoint the second to save is refused; the first one's file stays."""
    with pytest.raises(common.UserError, match=r"another run.*toy\.ckpt.*--out"):
        distill(tmp_path, data, lambda it, *_: it == 2 and distill(tmp_path, data))
    assert distill(tmp_path, data)[1] == []


def test_full_disk(tmp_path):
    """A file that does not fit raises OSError; the old one stays, nothing else is left."""
    path = tmp_path / "file.pt"
    common.save({"x": 1}, path)
    code = "import resource, signal, sys, torch, common\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
    code += "common.cli(lambda: common.save({'x': torch.ones(10**6)}, sys.argv[1]))"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert common.load(path, "a file") == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_other_settings(data, tmp_path):
    """A checkpoint of other settings is named and left alone; where files lie is free."""
    distill(tmp_path, data, inputs=torch.ones(9))
    checkpoint = (tmp_path / "toy.ckpt").read_bytes()
    changes = {"lr": {"lr": 0.2}, "seed": {"seed": 1}, "inputs": {"inputs": torch.ones(8)}}
    changes["flip"] = {"flip": False}
    changes["test data"] = {"data": dataclasses.replace(data, test_fingerprint="other")}
    for name, change in (changes | {"data": {"data": make_data(13)}}).items():
        with pytest.raises(common.UserError, match=rf"toy\.ckpt[^\n]*{name}[^\n]*$"):
            distill(tmp_path, **({"data": data, "inputs": torch.ones(9)} | change))
    assert (tmp_path / "toy.ckpt").read_bytes() == checkpoint
    assert distill(tmp_path, data, inputs=torch.ones(9), out="x", data_dir="y", runs=1)[1] == []


@pytest.mark.parametrize("part", [0, 1, 2], ids=["loss", "tensor", "module"])
def test_not_finite(part, data, tmp_path):
    """A loss or a state that is not finite is refused; the last good checkpoint is kept."""
    distill(tmp_path, data, iterations=2)
    checkpoint = (tmp_path / "toy.ckpt").read_bytes()
    with pytest.raises(common.UserError, match="diverged.*lr"):
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
        module = importlib.import_module(method)
        protocol = module.protocol(module.Args())
        network = protocol.network((3, 32, 32), 10)
        assert network.kind == "frepo-convnet3"
        assert not any(isinstance(layer, nn.GroupNorm) for layer in network.modules())
        assert (protocol.optimizer, protocol.weight_decay) == (torch.optim.AdamW, decay)
        augment = functools.partial(protocol.augment)
        assert (augment.func, augment.keywords) == (module.frepo_augment, more)
    kfs = importlib.import_module("kfs")
    kfs = kfs.protocol(kfs.Args())
    rates = [kfs.rate(epoch, 1280) for epoch in (0, 132, 133, 165, 166, 199)]
    assert kfs.epochs == 200 and rates == pytest.approx([0.01] * 2 + [0.002] * 2 + [0.0004] * 2)
