"""Files, checkpoints, settings and presets, as a user meets them."""

import ast
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import resource
import time

import pytest
import torch
from conftest import make_data
from torch import nn

import common
import frepo
import kfs
import translator_fewshot
from dm import Args


def test_save_is_atomic(tmp_path, monkeypatch):
    """A save that dies on the way, or on a full disk, leaves the old file whole, and no other."""
    path = tmp_path / "new folder" / "file.pt"
    common.save({"x": 1}, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os.stat("no such file"))
        pytest.raises(OSError, common.save, {"x": 2}, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, limit[1]))
    try:
        pytest.raises(OSError, common.save, {"x": torch.ones(10**6)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert common.load(path, "a file") == {"x": 1} and list(path.parent.iterdir()) == [path]


def test_load_of_a_bad_file(tmp_path):
    """Missing, broken, cut off, or with pickled code: one line with the file's name."""
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "half").write_bytes(b"PK\3\4")
    torch.save(pathlib.Path("code"), tmp_path / "code")
    for name in ("missing", "junk", "half", "code"):
        with pytest.raises(common.UserError, match=rf"{name}[^\n]*a checkpoint[^\n]*$"):
            common.load(tmp_path / name, "a checkpoint")


def distill(folder, data, event=lambda *_: None, iterations=6, inputs=None, **settings):
    """Train a tensor and a module by momentum SGD, keyed noise -> run, iterations, tensors."""
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


def test_saved_once_a_minute(data, tmp_path, monkeypatch):
    """A run that is killed continues from the last minute."""
    clock = iter(range(0, 10**6, 25))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with pytest.raises(ZeroDivisionError):
        distill(tmp_path, data, lambda it, *_: 1 / (it - 5))
    _, done, continued = distill(tmp_path, data)
    assert 0 < done[0] < 5 and done[-1] == 5
    assert torch.equal(continued, distill(tmp_path / "whole", data)[2])


def test_two_at_once(data, tmp_path):
    """Of two runs with one checkpoint the second to save is refused; the first one's file stays."""
    with pytest.raises(common.UserError, match=r"another run.*toy\.ckpt.*--out"):
        distill(tmp_path, data, lambda it, *_: it == 2 and distill(tmp_path, data))
    assert distill(tmp_path, data)[1] == []


def test_other_settings(data, tmp_path):
    """A checkpoint of other settings is named and left alone; where files lie is free."""
    distill(tmp_path, data, inputs=torch.ones(9))
    checkpoint = (tmp_path / "toy.ckpt").read_bytes()
    changes = {"lr": {"lr": 0.2}, "seed": {"seed": 1}, "inputs": {"inputs": torch.ones(8)}}
    changes |= {"flip": {"flip": False}, "data": {"data": make_data(13)}, "input": {"inputs": None}}
    changes["test data"] = {"data": dataclasses.replace(data, test_fingerprint="other")}
    for name, change in changes.items():
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


PRESETS = {("cifar10", 1): {"lr": 2.0, "zca": True}, ("cifar10", 10): {"lr": 10.0, "zca": True}}
PRESETS |= {("cifar10", 50): {"lr": 50.0}, ("cifar100", 1): {"lr": 100.0, "zca": True}}
LINES = """
test_files --dataset cifar10 --ipc 25 > lr=50 zca=False
test_files --dataset cifar100 --ipc 50 > lr=100 zca=True
test_files --dataset svhn --ipc 10 > lr=10 zca=False flip=False
test_files --dataset some/folder --zca > lr=2 zca=True flip=True iterations=20000
test_files --dataset cifar10 --no-zca --lr 7 > lr=7 zca=False
test_files --no-flip --iterations 7 --seed 0 > flip=False iterations=7 seed=0
dm --dataset cifar10 --ipc 50 > lr=1
dm --dataset cifar10 --ipc 100 > lr=10
dm --dataset cifar100 --ipc 100 > lr=1 zca=False
mtt --dataset cifar10 --ipc 1 > zca=True
haba --dataset cifar10 --bpc 1 > max_start=2 student_steps=50 lr_hallucinators=100 zca=True
kfs --dataset cifar10 --ipc 1 > high_res=False scoring="idc"
kfs --dataset cifar10 --ipc 10 > high_res=True
frepo --dataset cifar10 --ipc 1 > zca=True mirror=True batch_pool=500
frepo --dataset cifar10 --ipc 100 > mirror=True batch_pool=1000
frepo --dataset cifar100 --ipc 10 > mirror=False batch_pool=1000
frepo --dataset tinyimagenet --ipc 10 > mirror=False
frepo --dataset mnist --ipc 10 > zca=False
translator_fewshot --dataset fashionmnist > zca=False
translator_fewshot --dataset cifar100 --ipc 1 > zca=True lr=1e-3
"""


@pytest.mark.parametrize("line", LINES.strip().splitlines())
def test_presets(line, capsys):
    """A flag beats a preset, a preset the default; nearest budget in ratio; authors' settings."""
    flags, expected = line.split(">")
    method, *flags = flags.split()
    module = importlib.import_module(method)
    args = common.parse_args(module.Args, module.PRESETS, flags)
    for name, value in [pair.split("=") for pair in expected.split()]:
        assert getattr(args, name) == ast.literal_eval(value), name
    assert capsys.readouterr().out == json.dumps(dataclasses.asdict(args)) + "\n"


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


def test_protocols():
    """Scores: FRePo's network, augmentation and AdamW, the translator's variant; KFS's epochs."""
    for module, decay, more in ((frepo, 0, {}), (translator_fewshot, 5e-4, {"scale": True})):
        protocol = module.protocol(module.Args())
        assert protocol.network((3, 32, 32), 10).kind == "frepo-convnet3"
        assert (protocol.optimizer, protocol.weight_decay) == (torch.optim.AdamW, decay)
        augment = functools.partial(protocol.augment)
        assert (augment.func, augment.keywords) == (module.frepo_augment, more)
    protocol = kfs.protocol(kfs.Args())
    rates = [protocol.rate(epoch, 1280) for epoch in (0, 132, 133, 165, 166, 199)]
    assert protocol.epochs == 200
    assert rates == pytest.approx([0.01] * 2 + [0.002] * 2 + [0.0004] * 2)
