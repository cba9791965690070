"""The scripts as a user meets them: whole runs, files, kills, mistakes."""

import argparse
import csv
import functools
import importlib
import inspect
import json
import operator
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, find
from PIL import Image

import common
import evaluate
import frepo
import mtt

EXPERT = "--eval-every 2 --experts 1 --max-start 1 --expert-epochs 1 --student-steps 2"
FLAGS = {
    "mtt": EXPERT,
    "dm": "--eval-every 2 --batch-real 4",
    "haba": f"{EXPERT} --lr-bases 1 --lr-hallucinators 0.01",
    "kfs": "--eval-every 2 --pretrain 2 --decoders 2 --codes 2",
    "frepo": "--eval-every 2 --pool 1 --batch-real 16 --max-age 2",
    "translator_fewshot": "--mode autoencoder --ae-steps 2 --adapt-steps 2 --batch-real 16",
}
load = functools.partial(torch.load, weights_only=True)
METHODS = pytest.mark.parametrize("method", FLAGS)
ROW = "method dataset per_class iterations seconds network accuracy std random random_std data "
ROW += "random_per_class runs epochs seed settings scoring_seconds hardware torch commit command"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder of a data set of 3 classes, 12 training and 6 test images each, 3x16x16."""
    folder = tmp_path_factory.mktemp("home") / "tiny"
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for c, name in enumerate(["ant", "bee", "cat"]):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(50 * c, 50 * c + 150, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def run_script(script, words, patch):
    """Run a script in this process -> exit status."""
    patch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
    evaluate.load_data.cache_clear()
    try:
        return common.cli(importlib.import_module(script).main) or 0
    except SystemExit as end:
        return end.code


@pytest.fixture
def call(home, tmp_path, monkeypatch, capsys):
    """Run a script in tmp_path with the flags of a short run and more -> status, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(script, *flags):
        capsys.readouterr()
        status = run_script(script, [*command(script, home), *flags], monkeypatch)
        run.out, err = capsys.readouterr()
        return status, err

    return run


def command(script, home):
    """Flags of a run of a second."""
    flags = f"--epochs 2 --data-dir {home.parent} --device cpu --runs 1"
    if script in FLAGS:
        flags += f" --dataset {home} --iterations 3 {FLAGS[script]}"
    return flags.split()


def distilled_path(method):
    """Where a method writes, below the folder that it runs in."""
    name = "translator_fewshot_autoencoder" if method == "translator_fewshot" else method
    return f"out/{name}_tiny_{'bpc' if method == 'haba' else 'ipc'}1.pt"


@pytest.fixture(scope="session")
def finished(home, tmp_path_factory):
    """method -> the folder of its unbroken run; each runs once."""

    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp(method)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert run_script(method, command(method, home), patch) == 0
        return folder

    return run


def assert_same(ours, theirs):
    """Two distilled files are equal, but for the seconds that they took and where they are."""
    ours, theirs = load(ours), load(theirs)
    assert ours.keys() == theirs.keys() and any(map(torch.is_tensor, ours.values()))
    for key in ours.keys() - {"seconds", "settings"}:
        equal = torch.equal if torch.is_tensor(ours[key]) else operator.eq
        assert equal(ours[key], theirs[key]), key


# ------------------------------------------------------------ whole runs


@METHODS
def test_run(method, finished, call):
    """Distilled file, picture, losses, results row; evaluate.py reads the file and agrees."""
    path = finished(method) / distilled_path(method)
    distilled = load(path)
    scores = dict(distilled["evaluations"])
    assert list(scores) == ([] if method == "translator_fewshot" else [2])
    images, labels = importlib.import_module(method).decode(distilled)
    variants, count = {"haba": (5, 3), "kfs": (1, 12)}.get(method, (1, 3))
    assert images.shape == (variants, count, 3, 16, 16) and images.isfinite().all()
    numbers = labels.argmax(1) if labels.is_floating_point() else labels
    assert len(labels) == count and numbers.unique().tolist() == [0, 1, 2]
    every_image, every_label, info = evaluate.training_set(path)
    assert torch.equal(every_image, images.flatten(0, 1)) and info["method"] == method
    assert torch.equal(every_label.view(variants, *labels.shape)[-1], labels)

    with Image.open(path.with_suffix(".png")) as picture:
        picture.load()
        assert min(picture.size) >= 64 and len(picture.convert("RGB").getcolors(10**6)) > 100
    assert path.with_suffix(".csv").read_text().startswith("iteration,loss,seconds\n1,")

    (row,) = map(json.loads, open(path.parent / "results.jsonl"))
    assert set(ROW.split()) <= row.keys() and (row["runs"], row["epochs"]) == (1, 2)
    assert row["method"] == method and row["dataset"] == "tiny" and 0 <= row["accuracy"] <= 100
    assert not {"out", "data_dir", "device"} & (row["settings"].keys() | distilled["settings"])
    assert str(path.parent.parent) not in row["command"] and "--device" not in row["command"]
    assert row["random_per_class"] == {"haba": 5}.get(method, 1)  # as much storage
    status, err = call("evaluate", path, "--epochs", "0", "1")
    assert status == 0, err
    again, short = map(json.loads, open("out/results.jsonl"))
    assert short["epochs"] == 1
    for key in "accuracy random random_per_class network per_class iterations".split():
        assert again[key] == row[key], key


@METHODS
def test_copied_alone(method, home, tmp_path, monkeypatch):
    """Under another name, with common.py alone in an empty folder, a script runs."""
    source, ours = (ROOT / f"{method}.py").read_text(), {path.stem for path in ROOT.glob("*.py")}
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.M))
    assert imported & {"importlib", *ours} == {"common"}
    (tmp_path / "mine.py").write_text(source)
    shutil.copy(ROOT / "common.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if path not in ("", str(ROOT))]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", ["mine.py", *command(method, home), "--data-dir", "data"])
    runpy.run_path("mine.py", run_name="__main__")
    assert load(distilled_path(method).replace(method, "mine"))["method"] == "mine"


def test_experts_of_others(call, tmp_path):
    """--iterations 0 trains a seed's experts; a run takes any, and keeps them if others come."""
    train = ("mtt", "--data-dir", tmp_path, "--iterations", 0, "--seed")
    run = ("mtt", "--data-dir", tmp_path, "--seed", 9, "--experts", 2, "--lr-images", 1000)
    assert call(*train, 7)[0] == call(*train, 8)[0] == 0 and not list(tmp_path.glob("out/*"))
    assert call(*run)[0] == call(*run, "--iterations", 5, "--out", "unbroken")[0] == 0
    assert call(*train, 6)[0] == 0  # the first by name
    names = [path.name for path in tmp_path.glob("experts/*/*")]
    assert sorted(names) == [f"seed{seed}_expert000.pt" for seed in (6, 7, 8)]
    for _ in range(2):  # continued, and scored again
        assert call(*run, "--iterations", 5)[0] == 0
        assert_same("out/mtt_tiny_ipc1_seed9.pt", "unbroken/mtt_tiny_ipc1_seed9.pt")
    *_, one, again = map(json.loads, open("out/results.jsonl"))
    assert one["accuracy"] == again["accuracy"]


COMPILES = [("glyphs", [], False), ("glyphs", ["--compile"], True)]
COMPILES += [("cifar10", [], True), ("cifar10", ["--no-compile"], False)]


@METHODS
def test_compile(method):
    """Off for glyphs, unless asked for; a resumed run may change it."""
    module = importlib.import_module(method)
    for name, flags, expected in COMPILES:
        args = common.parse_args(module.Args, module.PRESETS, ["--dataset", name, *flags])
        scored = evaluate.compiles(evaluate.parse(["x.pt", *flags]), argparse.Namespace(name=name))
        assert args.compile == scored == expected and "compile" in args.free


TWINS = [("mtt", "haba", mtt.load_experts, mtt.match_trajectory)]
TWINS += [("frepo", "translator_fewshot", frepo.krr, frepo.FrepoProtocol)]


@pytest.mark.parametrize("one, other, first, last", TWINS)
def test_twins(one, other, first, last):
    """Of a part that two scripts share, each function and class is the same to the letter."""
    sources = [inspect.getsource(importlib.import_module(method)) for method in (one, other)]
    first, last = inspect.getsource(first), inspect.getsource(last)
    one, other = [text[text.index(first) : text.index(last) + len(last)] for text in sources]
    assert one == other and len(one.splitlines()) > 90


# ------------------------------------------------------------ killed and continued


@METHODS
def test_interrupted(method, finished, call, monkeypatch):
    """Ctrl-C: one line, status 130. Continued as often as needed, a run ends as an unbroken one."""
    path, step, begun = distilled_path(method), common.Run.step, []
    unbroken = finished(method) / path

    def interrupt_the_second(run, it, loss):
        begun.append(it)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)  # the iteration is lost
        run.saved = 0  # the last checkpoint is more than a minute old
        step(run, it, loss)

    monkeypatch.setattr(common.Run, "step", interrupt_the_second)
    for _ in range(6 if method == "translator_fewshot" else 2):
        status, err = call(method)
        assert status == 130 and "same command" in err.splitlines()[-1]
        assert not os.path.exists(path)
        begun.clear()
    for _ in range(2):  # a finished run may be repeated, too
        assert call(method)[0] == 0
        assert_same(path, unbroken)


def test_two_processes(home, call, tmp_path, monkeypatch):
    """They share the experts' folder; what gets SIGKILL leaves a checkpoint to continue from."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    flags = ["--iterations", "60", "--eval-every", "0"]
    code = "import conftest, common, mtt\n"
    code += "common.Run.saved = property(lambda _: 0, lambda *_: 0)\n"  # save in each iteration
    code += "common.cli(mtt.main)"
    words = [sys.executable, "-c", code, *command("mtt", home), "--data-dir", tmp_path]
    process = subprocess.Popen([*words, *flags])
    other = subprocess.Popen([*words, *"--seed 7 --experts 2 --iterations 0".split()])
    path = tmp_path / distilled_path("mtt")
    checkpoint = path.with_suffix(".ckpt")
    while process.poll() is None and not (checkpoint.exists() and load(checkpoint)["done"] >= 5):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and other.wait() == 0
    assert 5 <= load(checkpoint)["done"] < 60 and not path.exists()
    assert len(list(tmp_path.glob("experts/*/seed7_expert00[01].pt"))) == 2
    for out in ("out", "unbroken"):
        assert call("mtt", "--data-dir", tmp_path, *flags, "--out", out)[0] == 0
    assert_same(path, tmp_path / "unbroken" / path.name)


# ------------------------------------------------------------ networks, tensors, pictures

LAYOUTS = {
    "MTT's": ("mtt", lambda x, y: {"i.pt": x, "l.pt": y}),
    "class after class": ("mtt", lambda x, y: {"i.pt": x.unflatten(0, (3, -1))}),
    "one-hot": ("mtt", lambda x, y: {"i.pt": x, "l.pt": F.one_hot(y, 3)}),
    "arrays": ("mtt", lambda x, y: {"i.npy": x.numpy(), "l.npy": y.int().numpy()}),
    "DM's": ("dm", lambda x, y: {"res.pt": {"data": [[x, y], [x + 1, y]], "acc": np.float64(1)}}),
    "FRePo's": ("frepo", lambda x, y: {"i.npy": x.permute(0, 2, 3, 1).numpy(), "l.npy": y.numpy()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors(layout, finished, home, call):
    """A file of ours in the layout of others, read back: the same set, the same score."""
    method, make = LAYOUTS[layout]
    path = finished(method) / distilled_path(method)
    images, labels, info = evaluate.training_set(path)
    for name, content in make(images, labels).items():
        np.save(name, content) if name.endswith("npy") else torch.save(content, name)
    files = sorted(make(images, labels))
    flags = [*tensor_flags(home, *files, method=method), *["--zca"] * (method == "frepo")]
    flags += ["--step-size", info["step_size"]] * (method == "mtt")
    assert call("evaluate", *flags)[0] == 0
    found = evaluate.training_set(f"out/{files[0].split('.')[0]}_{method}_tiny_ipc1.pt")
    assert torch.equal(found[0], images) and torch.equal(found[1], labels)
    assert call("evaluate", path)[0] == 0
    ours, theirs = map(json.loads, open("out/results.jsonl"))
    assert ours["accuracy"] == theirs["accuracy"] and ours["per_class"] == theirs["per_class"]


@pytest.mark.parametrize("method", ["haba", "kfs"])
def test_continual(method, home, call, tmp_path):
    """A row of the accuracies after each step, by the method's flags; KFS keeps its decoders."""
    shutil.copytree(home, tmp_path / "four")
    for split in ("train", "test"):
        shutil.copytree(home / split / "ant", tmp_path / "four" / split / "dog")
    flags = f"--continual {method} --orders 1 --steps 2 --ipc 1 --dataset four --no-flip"
    flags = [*flags.split(), *FLAGS[method].split(), "--iterations"]
    assert call("evaluate", *flags, 1)[0] == 0
    folder = f"out/continual_{method}_four_1_2_1"
    steps = list(map(json.loads, open(f"{folder}/results.jsonl")))
    (row,) = map(json.loads, open("out/results.jsonl"))
    assert row["classes_seen"] == [2, 4] and not row["settings"]["flip"]
    for name in ("accuracy", "random"):
        assert row[name] == [step[name] for step in steps]
    first, second = (load(f"{folder}/order0_step{i}.pt") for i in range(2))
    order = [["ant", "bee", "cat", "dog"][c] for c in np.random.RandomState(0).permutation(4)]
    assert first["classes"] + second["classes"] == order
    if method == "kfs":
        kept = [name for name in first if "layers" in name]
        assert kept and all(torch.equal(first[name], second[name]) for name in kept)
        assert call("evaluate", *flags, 2)[0] == 0
        for iterations, expected in ((1, 0), (2, 2)):  # from a folder of its own
            file = f"{folder[:-1]}{iterations}/order0_step0.pt"
            status, err = call("kfs", "--dataset", "four", "--fixed-decoders", file)
            assert status == expected and ("differs in inputs" in err) == (iterations == 2)


def test_restrict(data):
    """Some classes, numbered in the order given."""
    part = evaluate.restrict(data, np.array([2, 0]))
    assert part.classes == ["cat", "ant"] and part.fingerprint != data.fingerprint
    for number, c in enumerate((2, 0)):
        assert torch.equal(part.test[part.test_labels == number], data.test[data.test_labels == c])
        train = data.train[data.train_labels == c]
        assert torch.equal(part.train[part.train_labels == number], train)


def test_tensors_that_do_not_fit(finished, home, call):
    """A wrong guess of the preprocessing is said; what is no tensor is refused."""
    assert call("dm", "--zca", "--lr", "0")[0] == 0
    whitened, *_ = evaluate.training_set(distilled_path("dm"))
    images, labels, _ = evaluate.training_set(finished("dm") / distilled_path("dm"))
    flags = tensor_flags(home)
    cases = [(images * 9 + 40, [], 1), (whitened, [], 1), (whitened, ["--zca"], 0)]
    cases.append(((images - images.min()) / 3.5, [], 1))
    frepo = ["--protocol", "frepo"]
    for tensor, more, far in cases + [(images, frepo, 1), (images, [*frepo, "--no-zca"], 0)]:
        torch.save(tensor, "i.pt")
        assert call("evaluate", *flags, *more)[0] == 0 and ("far apart" in call.out) == far
    one_hot = torch.eye(3)[labels]
    several = torch.tensor([[1.0, 1, 0]] * 3)
    forms = [(labels[:, None].to(torch.uint16), labels), (one_hot.bool(), labels)]
    for given, expected in [*forms, (one_hot * 2, one_hot * 2), (several, several)]:
        torch.save([images, given], "i.pt")
        assert call("evaluate", *flags)[0] == 0
        assert torch.equal(evaluate.training_set("out/i_dm_tiny_ipc1.pt")[1], expected)
    for content, word in (
        (pathlib.Path("code"), "save"),
        ([1.0], "no tensors"),
        (images[:, :1], "do not fit"),
        (torch.tensor(0.01), "do not fit"),
        (images.repeat(5, 1, 1, 1)[:4], "labels"),
        ([images, torch.tensor([0, 1, 3])], "labels"),
        ([images, torch.zeros(4)], "labels"),
        ([images, torch.tensor([0, 0.5, 1])], "labels"),
        (torch.stack([images, images]), "do not fit"),
        ([images * torch.nan, torch.zeros(3)], "NaN"),
    ):
        torch.save(content, "i.pt")
        status, err = call("evaluate", *flags)
        assert status == 2 and word in err.splitlines()[-1], err
    torch.save([images, labels], "i.pt")
    status, err = call("evaluate", *flags, "--step-size", "1e20")
    assert status == 2 and "diverged" in err.splitlines()[-1]


def tensor_flags(home, *files, method="dm"):
    files = files or ["i.pt"]
    data = ["--dataset", home, "--data-dir", home.parent]
    return ["--tensors", *files, "--protocol", method, *data]


def test_pictures(home, call):
    """Exported pictures of real images, read back, are those images; a used folder is refused."""
    call("dm", "--iterations", 1, "--lr", 0, "--seed", 3, "--no-flip")
    path = "out/dm_tiny_ipc1_seed3.pt"
    assert not evaluate.open_file(path, evaluate.parse([path, "--data-dir", "data"]))[0].flip
    images, labels, info = evaluate.training_set(path)
    assert call("evaluate", path, "--export", "pictures")[0] == 0
    rows = list(csv.reader(open("pictures/labels.csv")))
    assert rows[1] == ["ant/000.png", "ant", "1 0 0"] and len(rows) == 4
    assert "0.0 % of the values" in open("pictures/README.txt").read()
    status, err = call("evaluate", path, "--export", "pictures")
    assert status == 2 and "not empty" in err
    for name in ("labels.csv", "README.txt", "grid.png"):
        os.remove(f"pictures/{name}")
    assert call("evaluate", *tensor_flags(home, "pictures"))[0] == 0
    assert torch.equal(evaluate.training_set("out/pictures_dm_tiny_ipc1.pt")[0], images)


def test_clipped_pictures(finished, call):
    """The share of values that pictures can't hold is said."""
    content = load(finished("dm") / distilled_path("dm"))
    content["images"][0] += 100
    torch.save(content, "dm.pt")
    assert call("evaluate", "dm.pt", "--export", "pictures")[0] == 0
    share = re.search(r"([\d.]+) % of the values lie outside", open("pictures/README.txt").read())
    values = 255 * (content["images"] * content["std"] + content["mean"])
    outside = (values - 127.5).abs() > 128
    assert float(share[1]) == pytest.approx(100 * outside.double().mean().item(), abs=0.06)


@METHODS
def test_train_network(method, finished, home, call, tmp_path, capsys):
    """train_network is the first network of a score; --save writes it; classify agrees with it."""
    path = finished(method) / distilled_path(method)
    place = {"data_dir": str(home.parent), "device": "cpu"}
    net, accuracy = evaluate.train_network(path, **place)
    (row,) = map(json.loads, open(path.parent / "results.jsonl"))
    assert round(accuracy, 2) == row["accuracy"]
    # reading a file leaves the caller's seed alone
    draws = [(torch.manual_seed(s), evaluate.training_set(path), torch.rand(1)) for s in (0, 1)]
    assert draws[0][2] != draws[1][2]
    call("evaluate", path, "--save", "nets", "--network", "convnet", "resnet10")
    first, other = sorted(os.listdir("nets"))
    assert first == f"{path.stem}_{load(f'nets/{first}')['network']}_2_seed0_0.pt"
    pictures = sorted(home.glob("test/*/*"))
    for file, name in ((first, "convnet"), (other, "resnet10")):
        stored = load(f"nets/{file}")
        found = evaluate.classify(f"nets/{file}", *pictures)
        right = [found == path.parent.name for found, path in zip(found, pictures, strict=True)]
        assert stored["network"].startswith(name)
        assert stored["accuracy"] == pytest.approx(100 * np.mean(right))
    # the README's snippets
    (tmp_path / "data").symlink_to(home.parent)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save("mine.png")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        capsys.readouterr()
        block = re.sub(r'"out/[^"\n]*\.pt"', lambda _: repr(str(path)), block)
        exec(re.sub(r'"nets/[^"\n]*\.pt"', lambda _: repr(f"nets/{first}"), block), {})
        assert capsys.readouterr().out


def test_join(finished, home, call):
    """Two sets of one preprocessing become one; others are refused."""
    call("dm", "--seed", 1)
    paths = [finished("dm") / distilled_path("dm"), "out/dm_tiny_ipc1_seed1.pt"]
    assert call("evaluate", *paths, "--join", "--runs", 4, "--save", "nets")[0] == 0
    *_, row = map(json.loads, open("out/results.jsonl"))
    scores = [load(path)["accuracy"] for path in pathlib.Path("nets").iterdir()]
    assert row["accuracy"] == pytest.approx(np.mean(scores), abs=0.01)
    assert 0 < row["std"] == pytest.approx(np.std(scores), abs=0.01)
    assert (row["method"], row["per_class"], row["random_per_class"]) == ("dm+dm", 2, 2)
    _, _, images, labels, _ = evaluate.join_files(paths, evaluate.parse(["x", "--device", "cpu"]))
    parts = [evaluate.training_set(path) for path in paths]
    assert torch.equal(images[0], torch.cat([part[0] for part in parts]))
    assert torch.equal(labels.argmax(1), torch.cat([part[1] for part in parts]))
    assert row["settings"] == load(paths[0])["settings"] and load(paths[0])["step_size"] is None
    parts = [({"classes": [*c], "step_size": None}, images, torch.arange(2)) for c in ("ca", "db")]
    assert evaluate.join(parts, [*"abcd"], common.Protocol())[2].argmax(1).tolist() == [2, 0, 3, 1]
    haba, mtt = (finished(name) / distilled_path(name) for name in ("haba", "mtt"))
    _, joint, images, labels, _ = evaluate.join_files([haba, mtt], evaluate.parse(["x"]))
    assert images.shape[:2] == (5, 6) and len(labels) == 6
    assert torch.equal(images[:, :3].flatten(0, 1), evaluate.training_set(haba)[0])
    assert torch.equal(images[3, 3:], evaluate.training_set(mtt)[0])
    rates = [load(path)["step_size"] for path in (haba, mtt)]
    assert joint["step_size"] == sum(rates) / 2
    assert load(mtt)["experts"] == ["seed0_expert000.pt"] and not load(paths[0])["experts"]
    frepo, translator = (finished(x) / distilled_path(x) for x in ("frepo", "translator_fewshot"))
    joint = evaluate.join_files([frepo, translator], evaluate.parse(["x"]))[1]
    assert joint["method"] == "frepo+translator_fewshot"
    np.save("i.npy", evaluate.training_set(paths[0])[0])
    flags = ["--tensors", "i.npy", "--protocol", "dm", "--dataset", home, "--join"]
    assert call("evaluate", paths[1], *flags)[0] == 0
    status, err = call("evaluate", paths[0], frepo, "--join")
    assert status == 2 and "differ in data" in err.splitlines()[-1]


def test_other_data(finished, home, call, tmp_path):
    """Other training images are refused, other test images are said."""
    path = finished("dm") / distilled_path("dm")
    shutil.copytree(home, tmp_path / "d/tiny")
    os.remove(tmp_path / "d/tiny/test/bee/0.png")
    flags = [path, "--dataset", "tiny", "--data-dir", "d", "--runs", "1"]
    assert call("evaluate", *flags)[0] == 0 and "test images of tiny are not those" in call.out
    os.remove(tmp_path / "d/tiny/train/bee/0.png")
    status, err = call("evaluate", *flags)
    assert status == 2 and "training images" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags", ["--coreset random herding k-center forgetting --ipc 2", "--corruption"]
)
def test_other_scores(flags, finished, home, call):
    """Core-sets and corrupted test images: a row each."""
    path = [finished("dm") / distilled_path("dm")] * (flags == "--corruption")
    assert call("evaluate", *path, *flags.split(), "--dataset", home)[0] == 0
    rows = list(map(json.loads, open("out/results.jsonl")))
    assert len(rows) == (2 if path else 4)
    assert np.shape(rows[-1]["accuracy"]) == ((6,) if path else ())


@pytest.mark.parametrize("kind", evaluate.CORESETS[1:])
def test_select(kind, data, tmp_path, monkeypatch):
    """Each image of a core-set has the least cost of those left in its class."""
    features, forgotten = torch.randn(36, 4), torch.rand(36)
    monkeypatch.setattr(evaluate, "learn_features", lambda *_: (features, forgotten))
    args = argparse.Namespace(data_dir=tmp_path, seed=0, ipc=4)
    chosen = find(evaluate.select(kind, data, args), data.train).view(3, 4).tolist()

    def cost(i, before, members):
        if kind == "forgetting":
            return -forgotten[i]
        if kind == "k-center" and before:
            return -(features[before] - features[i]).norm(dim=1).min()
        return (features[[*before, i]].mean(0) - features[members].mean(0)).norm()

    for c, best in enumerate(chosen):
        members = torch.nonzero(data.train_labels == c)[:, 0].tolist()
        for k, i in enumerate(best):
            costs = {j: cost(j, best[:k], members) for j in members if j not in best[:k]}
            assert i == min(costs, key=costs.get)


def test_corruption_folder(finished, home, tmp_path, monkeypatch):
    """The accuracy at a level is that on its images."""
    monkeypatch.chdir(tmp_path)
    flags = f"--corruption . --data-dir {home.parent} --device cpu --runs 1 --epochs 3 --out ."
    path = str(finished("dm") / distilled_path("dm"))
    (job,) = evaluate.jobs(evaluate.parse([path, *flags.split()]))
    data, labels = job[0], job[0].test_labels
    pixels = (data.preprocess.undo(data.test) * 255).round().byte()
    levels = [pixels.roll(2 * k, 0) for k in range(5)]
    np.save("mixed.npy", torch.cat(levels).permute(0, 2, 3, 1).numpy())
    np.save("labels.npy", labels.repeat(5).numpy())
    row, ((net, clean),) = evaluate.score_corruption(*job)
    found = [common.accuracy(net, data.preprocess(level), labels) for level in levels]
    assert row["accuracy"] == pytest.approx([clean, *found], abs=0.01) and len(set(found)) > 2
    np.save("labels.npy", F.one_hot(labels.repeat(5)).numpy())
    with pytest.raises(common.UserError, match="labels.npy"):
        evaluate.score_corruption(*job)


# ------------------------------------------------------------ mistakes

MISTAKES = """
mtt --no-such-flag 1 > --no-such-flag
frepo --iteration 3 > --iterations
dm --iterations 2 > dm_tiny_ipc1.ckpt 3 iterations --out
frepo --iterations 4 > frepo_tiny_ipc1.ckpt differs in iterations --out
translator_fewshot --iterations 4 > .ckpt differs in iterations --out
dm --lr 2 > dm_tiny_ipc1.ckpt lr --out
dm --out JUNK > dm_tiny_ipc1.ckpt broken
dm --ipc 0 > --ipc 0
dm --ipc many > --ipc many
dm --seed -1 > --seed -1
dm --ipc 13 > class tiny 12 images 13
dm --lr nan > --lr nan
dm --dataset nowhere > nowhere glyphs cifar10
dm --dataset TINY/train > TINY/train
dm --device toaster > --device toaster
dm --size 8 > 8x8 --size
dm --out FILE/out > FILE
haba --ipc 1 > --bpc bases
haba --depth 0 --channels 8 --out other > --depth 0
haba --hallucinators 0 --basis-channels 2 --out other > --hallucinators 0
dm --dataset glyphs --size 32 > glyphs 16x16
kfs --ipc 13 --codes 0 > codes 12 --ipc
kfs --real-means 2 --batch-real 4 --out other > --real-means --batch-real
kfs --fixed-decoders DM --out other > DM kfs.py
kfs --fixed-decoders out/kfs_tiny_ipc1.ckpt --out other > kfs_tiny_ipc1.ckpt kfs.py
kfs --fixed-decoders out/kfs_tiny_ipc1.pt --decoders 3 --out other > kfs_tiny_ipc1.pt decoders
translator_fewshot --mode pretrain --min-classes 1 > --min-classes 1
translator_fewshot --eval-every 1 > --eval-every
frepo --batch-real 1000000000000000 --out other > allocate memory
translator_fewshot --mode adapted > --translator
translator_fewshot --mode adapted --translator DM > DM
translator_fewshot --mode scratch --translator DM > --translator
translator_fewshot --mode pretrain --eval-every 1 > --eval-every
evaluate > nothing
evaluate nowhere.pt > nowhere.pt
evaluate out/dm_tiny_ipc1.ckpt > dm_tiny_ipc1.ckpt distilled
evaluate DM --network perceptron > perceptron
evaluate DM --network vit_b_16 > vit_b_16
evaluate DM --network convnet5 > convnet5
evaluate DM --dataset glyphs > DM glyphs
evaluate DM --corruption nowhere > nowhere
evaluate DM --out FILE/out > FILE
evaluate DM --export FILE > FILE
evaluate --coreset random --dataset TINY --ipc 13 > 13
evaluate --continual dm --dataset TINY --steps 2 > --steps 1 at most
evaluate --continual mtt --dataset TINY --steps 1 --iterations 0 > --iterations 1 or more
evaluate --continual dm --dataset TINY --steps 1 --network vgg11 > --network
evaluate DM DM --export images > --export
evaluate DM --export images --save nets > --export --save
evaluate DM --steps 2 > steps
evaluate --coreset random --dataset TINY --protocol frepo > protocol
evaluate --continual translator_fewshot --dataset TINY --steps 1 --mode pretrain > --mode pretrain
evaluate --continual kfs --dataset TINY --steps 1 --fixed-decoders DM > --fixed-decoders
evaluate DM --join > --join two
evaluate DM DM --join > --join once
evaluate DM --save out > out --save
evaluate DM --save FILE > FILE
evaluate DM --coreset random > --coreset --dataset
evaluate DM --coreset random random --dataset TINY --save nets > --save one name
evaluate --tensors DM --protocol dm --dataset TINY --step-size 0 > --step-size
evaluate DM DM --save nets > --save one name
evaluate DM --no-zca > zca
evaluate DM --zca > zca
evaluate DM --step-size 3 > step_size
mtt --step-size 0 --out other > --step-size
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistake(mistake, finished, home, call, tmp_path):
    """One line on stderr that names the problem, status 2; no file is written over."""
    script = mistake.split()[0]
    shutil.copytree(finished(script if script in FLAGS else "dm") / "out", tmp_path / "out")
    (tmp_path / "junk").mkdir()
    for path in ("file", "junk/dm_tiny_ipc1.ckpt"):
        (tmp_path / path).write_text("not a tensor")
    places = {"FILE": "file", "JUNK": "junk", "DM": finished("dm") / distilled_path("dm")}
    for name, path in (places | {"TINY": home}).items():
        mistake = mistake.replace(name, str(path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    flags, words = mistake.split(">")
    status, err = call(script, *flags.split()[1:])
    assert status == 2, err
    (line,) = [line for line in err.splitlines() if "iterations, loss" not in line]
    assert line.startswith(f"{script}.py: ")
    assert [word for word in words.split() if word not in line] == [], line
    assert all(path.read_bytes() == content for path, content in before.items())


@METHODS
def test_loss_not_finite(method, call):
    """A learning rate that is too large is told; no distilled file is written."""
    flag = {"mtt": "--lr-images", "haba": "--lr-bases", "kfs": "--lr-decoders"}.get(method, "--lr")
    status, err = call(method, flag, "1e30", "--iterations", 20)
    assert status == 2 and "smaller rate" in err.splitlines()[-1]
    assert not os.path.exists(distilled_path(method))


@pytest.mark.parametrize("method, slope", [("mtt", 1.0), ("mtt", -1.0), ("haba", -1.0)])
def test_step_size_out_of_range(method, slope, call, monkeypatch):
    """A step size below 0, or 100 times the first one, is refused, with the rate to lower."""
    found = torch.tensor(0.5), torch.tensor(1e9 * slope)
    monkeypatch.setattr(importlib.import_module(method), "match_trajectory", lambda *_: found)
    status, err = call(method)
    assert status == 2 and "lr_step" in err.splitlines()[-1]
    assert not os.path.exists(distilled_path(method))


def test_stale_adaptation(call):
    """A translator that was replaced is not taken for the one that was adapted."""
    assert call("translator_fewshot", "--mode", "scratch")[0] == 0
    (path,) = pathlib.Path("out").glob("*_adapted.pt")
    content = load(path)
    torch.save(content, "t.pt")
    flags = ("--mode", "adapted", "--translator", "t.pt")
    for _ in range(2):
        assert call("translator_fewshot", *flags)[0] == 0
    content["weights"]["layers.0.bias"] += 1
    torch.save(content, "t.pt")
    status, err = call("translator_fewshot", *flags)
    assert status == 2 and "_adapted.ckpt differs in inputs" in err.splitlines()[-1]


TABLE = runpy.run_path(str(ROOT / "results/table.py"))


def test_table(tmp_path, capsys):
    """One line per job: other modes are other jobs, a repeated one replaces its line."""
    row = dict(method="translator_fewshot", dataset="mnist", network="convnet3", command="")
    row |= dict.fromkeys("per_class iterations epochs runs seed std random random_std".split(), 1)
    scores = [("one-net", 30), ("bilevel", 40), ("one-net", 50)]
    rows = [row | dict(settings={"mode": m}, accuracy=a, random_per_class=1) for m, a in scores]
    # tensors of others, whose settings are equal
    rows += [rows[0] | {"iterations": 0, "command": f"--tensors {x}"} for x in ("i.pt", "j.pt")]
    # other test images are another job
    rows.append(rows[2] | {"data": ["train", "other"]})
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert TABLE["main"]([str(tmp_path / "nowhere")]) == 2 and "missing" in capsys.readouterr().err
    assert not TABLE["main"]([str(tmp_path)])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = [f"{line[0].split()[-1]} {line[4]} {line[8]}" for line in lines]
    tensors = ["one-net 0 30 +- 1"] * 2
    assert found == ["bilevel 1 40 +- 1", *tensors, *["one-net 1 50 +- 1"] * 2]


def test_paper_number():
    """HaBa's one-channel bases have a number of their own; the translator has FRePo's network."""
    row = {"method": "haba", "dataset": "cifar10", "network": "convnet3"}
    numbers = {(1, 0): ["48.3"], (1, 3): ["48.3"], (3, 1): ["55.66"], (1, 1): [], (9, 0): ["69.9"]}
    for (bpc, channels), means in numbers.items():
        row |= {"per_class": bpc, "settings": {"objective": "mtt", "basis_channels": channels}}
        found = TABLE["paper_number"](row)
        assert re.findall(r"([\d.]+) \+- ", found) == means
    row |= {"method": "translator_fewshot", "per_class": 1, "settings": {}}
    assert TABLE["paper_number"](row | {"network": "frepo-convnet3"}).startswith("44.0")
    assert not TABLE["paper_number"](row)
