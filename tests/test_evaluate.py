"""evaluate.py: networks, core-sets, rows and tables, corruption, continual learning, pictures."""
import csv
import itertools
import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
import haba
import kfs
from conftest import make_folder

TARGETS = list(csv.DictReader((pathlib.Path(evaluate.__file__).parent / "results" / "targets.csv").open()))
QUICK = ("--runs", 2, "--epochs", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data folder with `tiny` (3x16x16, 3 classes), `grey` (1x28x28, 4 classes)."""
    folder = tmp_path_factory.mktemp("home")
    make_folder(folder / "tiny", train=8, test=10)
    make_folder(folder / "grey", classes=("ant", "bee", "cat", "dog"), train=6, test=5, size=28, grey=True)
    return folder


@pytest.fixture(autouse=True)
def few_epochs(monkeypatch):
    monkeypatch.setattr(evaluate, "FEATURE_EPOCHS", 2)
    monkeypatch.setattr(evaluate, "WHOLE_EPOCHS", 1)


def save_dm(home, name, path, per_class=1, images=None, **more):
    """Write a file of dm.py for data set `name` with random real images in it."""
    data = common.load_dataset(name, home)
    own, labels = data.random_real(per_class, "test")
    tensors = {"images": own if images is None else images, "labels": labels}
    common.save_distilled(path, data, "dm", per_class, tensors, None, {"iterations": 3, "size": None}, 1.0, 0, **more)
    return path


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def told(status, out, err, *words):
    """One line that says what to do, exit status 2, no traceback."""
    assert status == 2 and "Traceback" not in err, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("evaluate.py: ") and all(str(word) in line for word in words), line


# ------------------------------------------------------------------------------------------ networks

# Documented by torchvision for 224 pixels and 1000 classes; for 32 pixels and 10 classes the counts of the code of DC
# (ConvNet, AlexNet, VGG11, ResNet18) and of the small-image variants that people train on CIFAR-10.
COUNTS = (("resnet18", 224, 1000, 11_689_512), ("densenet121", 224, 1000, 7_978_856),
          ("efficientnet-b0", 224, 1000, 5_288_548), ("convnet", 32, 10, 320_010), ("alexnet", 32, 10, 1_872_202),
          ("vgg11", 32, 10, 9_231_114), ("resnet18", 32, 10, 11_173_962), ("resnet10", 32, 10, 4_903_242),
          ("resnetap10", 32, 10, 4_903_242), ("efficientnet-b0", 32, 10, 4_020_358),
          # torchvision's 7,978,856: a 3x3 stem for the 7x7 one, 10 classes for 1000
          ("densenet121", 32, 10, 7_978_856 - 64 * 3 * (49 - 9) - 1025 * 990))


@pytest.mark.parametrize("name, size, classes, count", COUNTS, ids=lambda value: str(value))
@pytest.mark.parametrize("norm", ("instance", "batch"))
def test_parameter_counts(name, size, classes, count, norm):
    """Each network has as many parameters as published; a norm has two a channel, whichever it is."""
    with torch.device("meta"):
        net = evaluate.build_network(name, norm)((3, size, size), classes)
    extra = 2 * (128 + 192 + 256 + 192 + 192) if (name, norm) == ("alexnet", "batch") else 0  # DC's AlexNet has no norm
    assert sum(p.numel() for p in net.parameters()) == count + extra


def test_vgg11_is_torchvisions():
    """The convolutions of VGG11 are those of torchvision's, whose documented 132,863,336 count three linear layers."""
    import torchvision
    with torch.device("meta"):
        ours, theirs = evaluate.build_network("vgg11")((3, 32, 32), 10), torchvision.models.vgg11()
    convs = [[tuple(m.weight.shape) for m in net.modules() if isinstance(m, torch.nn.Conv2d)] for net in (ours, theirs)]
    assert convs[0] == convs[1] and sum(p.numel() for p in theirs.parameters()) == 132_863_336


@pytest.mark.parametrize("name", evaluate.NETWORKS)
def test_networks(name, exact):
    """With instance norm an image's output does not depend on its batch, with batch norm it does; digits and 64 pixels
    go through as well, gradients reach every parameter; what is random is the start alone."""
    torch.manual_seed(0)
    net = evaluate.build_network(name)((3, 32, 32), 10)
    images = torch.randn(4, 3, 32, 32)
    assert not common.mixes_images(net) and net(images).shape == (4, 10)
    assert torch.allclose(net(images)[:2], net(images[:2]), atol=1e-4) and torch.equal(net(images), net(images))
    net(images).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    mixing = evaluate.build_network(name, "batch")((3, 32, 32), 10)
    assert common.mixes_images(mixing) and not torch.allclose(mixing(images)[:2], mixing(images[:2]), atol=1e-3)
    for shape in ((1, 28, 28), (3, 64, 64)):
        assert evaluate.build_network(name)(shape, 7)(torch.randn(1, *shape)).shape == (1, 7)


def test_large_images():
    """At 224 pixels the stems are torchvision's: strides in the first layers, maps of 7x7 at the end."""
    for name in ("resnet18", "densenet121", "efficientnet-b0"):
        net = evaluate.build_network(name)((3, 224, 224), 10)
        sides = []
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
        net(torch.randn(1, 3, 224, 224))
        assert sides[0] == 112 and sides[-1] in (7, 1)  # EfficientNet's last is in 7x7 too; squeezes are 1x1


def test_average_pool_in_place_of_strides():
    """ResNetAP10 has no stride in any convolution, ResNet10 has."""
    for name, strided in (("resnetap10", False), ("resnet10", True)):
        net = evaluate.build_network(name)((3, 32, 32), 10)
        assert any(m.stride != (1, 1) for m in net.modules() if isinstance(m, torch.nn.Conv2d)) == strided


# ------------------------------------------------------------------------------------------ core-sets

def test_herding_and_k_center():
    """Herding: each choice is the best next one by brute force. K-center: the farthest each time."""
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    mean, taken = features.mean(0), []
    for _ in range(6):
        rest = [i for i in range(30) if i not in taken]
        taken.append(min(rest, key=lambda i: (features[taken + [i]].mean(0) - mean).norm().item()))
    assert evaluate.herding(features, 6).tolist() == taken
    points = torch.tensor([[0.], [.1], [5.], [-4.], [1.]])  # mean 0.42
    assert evaluate.k_center(points, 4).tolist() == [1, 2, 3, 4]
    assert evaluate.k_center(points, 1).tolist() == evaluate.herding(points, 1).tolist() == [1]


def test_forgetting(home, tmp_path, monkeypatch):
    """Forgetting events are counted from epoch to epoch, once, and then read; a class's most forgotten are taken."""
    monkeypatch.setattr(evaluate, "FEATURE_EPOCHS", 4)
    data = common.load_dataset("tiny", home)
    scores = itertools.cycle((0, 1))

    def train(net, parameters, images, labels):  # not at all: the biases are turned by hand, once an epoch
        with torch.no_grad():
            net.classifier.weight.zero_()
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            net.classifier.bias.copy_(torch.nn.functional.one_hot(torch.tensor(next(scores)), 3).float())
    monkeypatch.setattr(common, "accumulate_gradient", train)
    _, forgotten = evaluate.train_features(data, tmp_path, 0)  # classes 0, 1, 0, 1 are right after the four epochs
    assert [forgotten[data.train_labels == c].unique().tolist() for c in range(3)] == [[2], [1], [0]]
    monkeypatch.setattr(common, "accumulate_gradient", None)   # a second call reads
    assert torch.equal(evaluate.train_features(data, tmp_path, 0)[1], forgotten)
    counts = torch.arange(24.)
    monkeypatch.setattr(evaluate, "train_features", lambda *_: (None, counts))
    chosen = evaluate.choose_coreset("forgetting", data, 2, tmp_path, 0)
    assert chosen.tolist() == [7, 6, 15, 14, 23, 22]


def test_coreset_rows(home, tmp_path, call):
    """All core-sets in one command: rows with the gain over random images, the whole set last, then the table."""
    status, out, err = call(evaluate, "--coreset", *evaluate.CORESETS, "--ipc", 2, "--dataset", "tiny",
                            "--data-dir", home, "--out", tmp_path, "--table", *QUICK)
    assert status == 0, err
    lines = results(tmp_path)
    assert [line["method"] for line in lines] == list(evaluate.CORESETS)
    random = lines[0]
    assert random["gain"] == 0 and random["accuracy"] == random["random_accuracy"]
    for line in lines[1:4]:
        assert line["random_accuracy"] == random["accuracy"] and line["stored_per_class"] == 2 * 768
        assert line["random_images_per_class"] == line["per_class"] == 2
        assert line["gain"] == round(line["accuracy"] - line["random_accuracy"], 2)
        assert line["network"] == "convnet2" and line["norm"] == "instance" and line["augment"] is True
    assert lines[4]["per_class"] == 8 and lines[4]["epochs"] == 1 and lines[4]["gain"] == 0
    table = (tmp_path / "table.md").read_text()
    sets = [row.split("|")[2].strip() for row in table.splitlines()]
    assert table in out and sets == ["set", "---", *evaluate.CORESETS]
    assert all(row.count("|") == table.splitlines()[0].count("|") for row in table.splitlines())


def test_table_keeps_variants():
    """The translator's modes and HaBa's con-downstream are rows of their own, the modes beside the paper's number of
    theirs; the same score twice is one row, another seed another."""
    line = {"method": "translator_fewshot", "dataset": "cifar10", "per_class": 10, "network": "frepo-convnet3", "seed": 0,
            "accuracy": 50., "std": 1., "random_accuracy": 30., "random_std": 1., "random_images_per_class": 10,
            "iterations": 600, "epochs": 500, "runs": 3, "gain": 20., "variant": "one-net"}
    lines = [line, line | {"variant": "autoencoder", "accuracy": 51.}, line | {"accuracy": 52.}, line | {"seed": 1}]
    lines += [line | {"method": "haba", "network": "convnet3", "variant": variant} for variant in ("mtt", "con-downstream")]
    rows = [[cell.strip() for cell in row.split("|")] for row in evaluate.markdown_table(lines).splitlines()[2:]]
    assert [row[2] for row in rows] == ["haba con-downstream", "haba mtt", "translator_fewshot autoencoder",
                                        "translator_fewshot one-net", "translator_fewshot one-net"]
    assert rows[2][-2].startswith("57.6 +- 0.3") and rows[3][-2].startswith("50.5 +- 0.8")
    assert [row[9] for row in rows[3:]] == ["52.00 +- 1.00", "50.00 +- 1.00"]


# ------------------------------------------------------------------------------------------ rows

def test_networks_and_random_images(home, tmp_path, call, monkeypatch):
    """A row for each network and file; sets of the same storage share the random images, and score as they do alone."""
    paths = [save_dm(home, "grey", tmp_path / "one.pt"), save_dm(home, "grey", tmp_path / "two.pt",
                                                                 images=torch.randn(4, 1, 28, 28))]
    trained, train = [], common.train_and_test
    monkeypatch.setattr(common, "train_and_test", lambda *args, **more: trained.append(1) or train(*args, **more))
    status, _, err = call(evaluate, *paths, "--network", "convnet", "resnet10", "--data-dir", home, *QUICK)
    assert status == 0 and len(trained) == 6, err  # 4 rows, 2 times random images
    lines = results(tmp_path)
    assert [line["network"] for line in lines] == ["convnet3", "resnet10"] * 2
    assert lines[0]["random_accuracy"] == lines[2]["random_accuracy"]
    for which, row in ((0, 1), (1, 3)):  # alone, again: the same to the last digit
        status, _, err = call(evaluate, paths[which], "--network", "resnet10", "--data-dir", home, *QUICK)
        again = results(tmp_path)[-1]
        assert status == 0, err
        assert all(again[key] == lines[row][key] for key in ("accuracy", "std", "random_accuracy", "gain"))


def test_norm_and_no_dsa(home, tmp_path, call, monkeypatch):
    """--norm batch and --no-dsa are said in the row: networks with that norm train, and images are not augmented."""
    path = save_dm(home, "grey", tmp_path / "one.pt", 3)
    trained, augmented, accumulate, dsa = [], [], common.accumulate_gradient, common.dsa
    monkeypatch.setattr(common, "accumulate_gradient", lambda net, *rest: trained.append(common.mixes_images(net)) or
                        accumulate(net, *rest))
    monkeypatch.setattr(common, "dsa", lambda *args: augmented.append(1) or dsa(*args))
    for flags, norm, mixes, times in (((), "instance", False, 8), (("--no-dsa",), "instance", False, 0),
                                      (("--norm", "batch"), "batch", True, 8)):
        trained.clear(), augmented.clear()
        status, _, err = call(evaluate, path, "--data-dir", home, *QUICK, *flags)
        line = results(tmp_path)[-1]
        assert status == 0 and (line["norm"], line["augment"]) == (norm, times > 0), err
        assert trained == [mixes] * 8 and len(augmented) == times  # set and random images, 2 networks, 2 epochs


def test_file_without_augmentation(home, tmp_path, call):
    """A file that was distilled to be used without DSA (haba.py --no-dsa) is scored without."""
    path = save_dm(home, "tiny", tmp_path / "one.pt", protocol=common.PROTOCOL | {"augment": ()})
    status, _, err = call(evaluate, path, "--data-dir", home, *QUICK)
    assert status == 0 and results(tmp_path)[0]["augment"] is False, err


def test_together(home, tmp_path, call):
    """Networks trained side by side score what they score one after another, up to rounding."""
    path = save_dm(home, "tiny", tmp_path / "one.pt", 2)
    for how in ("yes", "no"):
        status, _, err = call(evaluate, path, "--data-dir", home, "--together", how, "--network", "convnet", *QUICK)
        assert status == 0, err
    yes, no = results(tmp_path)
    assert abs(yes["accuracy"] - no["accuracy"]) < 5


def test_steps(home, tmp_path, call):
    """--steps trains for as many steps, set and random images alike, and draws a curve."""
    path = save_dm(home, "tiny", tmp_path / "one.pt")
    status, _, err = call(evaluate, path, "--data-dir", home, "--steps", 2, 5, *QUICK[:2])
    assert status == 0, err
    budgets = [(line["steps"], line["epochs"], line["random_epochs"]) for line in results(tmp_path)]
    assert budgets == [(2, 2, 2), (5, 5, 5)]
    looks_right(tmp_path / "steps.png")


def looks_right(path):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 64
        assert len(picture.convert("RGB").getcolors(10 ** 6)) > 20


@pytest.mark.parametrize("method, per_class, network, words", (
    ("haba", 9, "convnet3", "69.9 +- 0.4"), ("haba", 1, "convnet3", "48.3 +- 0.8"), ("random", 10, "convnet3", "26.0"),
    ("k-center", 10, "convnet3", "14.7"), ("kfs", 1, "resnet10", "47.0"),
    ("translator_fewshot", 10, "frepo-convnet3", "59.2"), ("translator_fewshot", 10, "convnet3", ""),
    ("kfs", 1, "convnet3", "59.8"), ("dm", 10, "convnet4", "48.9"), ("whole", 5000, "convnet3", "84.8"), ("frepo", 10, "frepo-convnet3", "65.5"), ("haba", 7, "convnet3", "")))
def test_paper_numbers(method, per_class, network, words):
    """The paper's number is found for a row, and none for batch norm, without augmentation or at a budget of steps."""
    line = {"method": method, "dataset": "cifar10", "per_class": per_class, "network": network, "iterations": 0,
            "epochs": 1, "runs": 1, "accuracy": 1., "std": 0., "random_accuracy": .5, "random_std": 0.,
            "random_images_per_class": 1}
    cell = evaluate.markdown_table([line]).splitlines()[2].split("|")[-2].strip()
    assert cell.startswith(words) if words else cell == ""
    for other in ({"norm": "batch"}, {"augment": False}, {"steps": 100}, {"variant": "dm"}, {"variant": "mtt depth=2"}):
        assert evaluate.markdown_table([line | other]).splitlines()[2].split("|")[-2].strip() == ""
    if method == "haba" and per_class == 1:  # as printed in both tables
        assert "55.66" in cell and "Tab.4" in cell


@pytest.mark.parametrize("variant, words", (("adapted", "59.2"), ("adapted ds", "66.0"), ("one-net", "50.5"),
                                            ("no-adaptation", "54.7"), ("autoencoder ds", "")))
def test_paper_numbers_of_the_translator(variant, words):
    """Each mode and storage has its own row."""
    line = {"method": "translator_fewshot", "dataset": "cifar10", "per_class": 10, "network": "frepo-convnet3",
            "variant": variant}
    cell = evaluate.paper_number(line, TARGETS)
    assert cell.startswith(words) if words else cell == ""


def test_every_target_is_found():
    """No row of targets.csv is out of reach."""
    modes = {"": "adapted", "-ds": "adapted ds", "-1net": "one-net", "-wo-pretrain": "scratch", "-ae": "autoencoder",
             "-wo-ada": "no-adaptation", "-bilevel": "bilevel"}
    for row in TARGETS:
        bases = re.search(r"BPC (\d+)", row["source"]) if row["method"] == "haba" else None
        line = {"method": row["method"].replace("kcenter", "k-center"), "dataset": row["dataset"],
                "network": row["network"], "per_class": int(bases[1] if bases else row["images_per_class"])}
        if row["method"].startswith("translator"):
            line |= {"method": "translator_fewshot", "variant": modes[row["method"].removeprefix("translator")],
                     "network": f"frepo-{row['network']}"}
        assert f"{row['mean']} +- {row['std']} ({row['source']})" in evaluate.paper_number(line, TARGETS), row


# ------------------------------------------------------------------------------------------ corruption

def test_corruption_folder(home, tmp_path, call):
    """A folder in CIFAR-10-C's layout is read level by level: images that are not corrupted score as the clean ones,
    black ones at level 5 by chance."""
    data = common.load_dataset("tiny", home)
    pixels = (data.preprocess.undo(data.test) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    folder = tmp_path / "corrupted"
    folder.mkdir()
    np.save(folder / "none.npy", np.concatenate([pixels] * 5))
    np.save(folder / "black_at_5.npy", np.concatenate([pixels] * 4 + [pixels * 0]))
    np.save(folder / "labels.npy", np.tile(data.test_labels.numpy(), 5).astype(np.uint8))
    path = save_dm(home, "tiny", tmp_path / "one.pt", 4)
    status, _, err = call(evaluate, path, "--data-dir", home, "--corruption", folder, "--epochs", 30, "--runs", 2)
    assert status == 0, err
    ours, random = results(tmp_path)
    assert (ours["kind"], ours["method"], random["method"], random["per_class"]) == ("corruption", "dm", "random", 4)
    none, black = (ours["corruptions"][kind] for kind in ("none", "black_at_5"))
    assert none == [none[0]] * 6 and black[:5] == none[:5] and black[5] == pytest.approx(100 / 3, abs=.01) != none[5]
    assert ours["level_accuracy"][5] == pytest.approx((none[5] + black[5]) / 2, abs=.01)
    looks_right(tmp_path / "corruption.png")
    np.save(folder / "none.npy", pixels)
    told(*call(evaluate, path, "--data-dir", home, "--corruption", folder, *QUICK), "none.npy", "shape")
    told(*call(evaluate, path, "--data-dir", home, "--corruption", tmp_path / "x", *QUICK), "labels.npy")


def test_corruptions_made(home):
    """Noise, blur and contrast move the images more at every level; the same call gives the same images."""
    data = common.load_dataset("tiny", home)
    kinds, labels = evaluate.load_corruptions("made", data)
    assert set(kinds) == {"noise", "blur", "contrast"} and torch.equal(labels, data.test_labels)
    for images in kinds.values():
        far = [(images(level) - data.test).square().mean().item() for level in range(1, 6)]
        assert far == sorted(far) and far[0] > 0 and torch.equal(images(3), images(3))
    pixels = torch.rand(2, 3, 16, 16)
    flat = evaluate.corrupt(pixels, "contrast", 5)
    assert torch.allclose(flat.std((2, 3)), .15 * pixels.std((2, 3)), atol=.01)
    assert abs((evaluate.corrupt(pixels * 0 + .5, "noise", 1) - .5).std().item() - .04) < .003
    dot = torch.zeros(1, 1, 17, 17)
    dot[..., 8] = 1
    row = evaluate.corrupt(dot, "blur", 5)[0, 0].sum(0).double()  # a Gaussian of deviation 1
    assert abs((row / row.sum() * (torch.arange(17) - 8.) ** 2).sum() - 1) < .08


# ------------------------------------------------------------------------------------------ continual learning

def test_restrict(small_data, monkeypatch):
    """Some classes of a data set, numbered anew; images and labels go together, the fingerprint is another."""
    small_data.preprocess = common.Preprocess("standardise", "standardise-0123456789abcdef", None, None)
    part = evaluate.restrict(small_data, [2, 0])
    assert part.classes == ["c", "a"] and len(part.train) == 40 and part.name == "noise"
    for new, old in ((0, 2), (1, 0)):
        assert torch.equal(part.train[part.train_labels == new], small_data.train[small_data.train_labels == old])
        assert torch.equal(part.test[part.test_labels == new], small_data.test[small_data.test_labels == old])
    prints = {evaluate.restrict(small_data, c).preprocess.fingerprint for c in ([2, 0], [0, 2], [0, 1])}
    assert len(prints | {small_data.preprocess.fingerprint}) == 4


def test_join_samplers():
    """Entries of all stages, labels numbered through; a soft label has its lowest number for other stages' classes."""
    one = lambda run, index, *key: (index.float().view(-1, 1), index % 2)  # noqa: E731
    soft = torch.tensor([[.7, -.2, .1]])
    two = lambda run, index, *key: (100 + index.float().view(-1, 1), soft.expand(len(index), 3))  # noqa: E731
    draw, count = evaluate.join_samplers([(one, 4, 2), (one, 2, 2)], "cpu")
    images, labels = draw(0, torch.tensor([5, 0, 3]))
    assert count == 6 and sorted(zip(images.flatten().tolist(), labels.tolist())) == [(0, 0), (1, 3), (3, 1)]
    draw, count = evaluate.join_samplers([(two, 2, 3), (two, 2, 3)], "cpu")
    images, labels = draw(0, torch.tensor([2]))
    assert images.tolist() == [[100]] and labels[0].tolist() == pytest.approx([-.2, -.2, -.2, .7, -.2, .1])


FEW = {"dm": ("iterations=2", "batch_real=4"),
       "kfs": ("iterations=2", "pretrain=2", "real_means=2", "codes=2", "decoders=2"),
       "frepo": ("iterations=2", "pool=2", "batch_real=8"), "translator_fewshot": ("steps=1", "adapt_steps=1"),
       "mtt": ("iterations=1", "experts=1", "max_start=0", "expert_epochs=1", "student_steps=2"),
       "haba": ("iterations=1", "experts=1", "max_start=0", "expert_epochs=1", "student_steps=2", "hallucinators=2")}


@pytest.mark.parametrize("method", FEW)
def test_continual(method, home, tmp_path, call, monkeypatch):
    """Classes two at a time in two orders: accuracy per stage with its spread, a curve. What is finished is not done
    again, and other settings are refused."""
    flags = ("--continual", method, "--dataset", "grey", "--data-dir", home, "--out", tmp_path, "--orders", 2, *QUICK,
             "--set", *FEW[method])
    status, out, err = call(evaluate, *flags)
    assert status == 0, err
    line, = results(tmp_path)
    assert line["classes_seen"] == [2, 4]
    assert all(0 <= a <= 100 for a in line["stage_accuracy"] + line["random_accuracy"])
    assert line["settings"]["iterations"] <= 2 and len(line["stage_std"]) == 2
    folder = tmp_path / f"continual_{method}_grey_1_by2"
    for order in range(2):
        permutation = np.random.RandomState(order).permutation(4)
        for stage in range(2):
            stored = common.load_distilled(folder / f"order{order}_stage{stage}.pt")
            assert stored["classes"] == [("ant", "bee", "cat", "dog")[c] for c in permutation[2 * stage:][:2]]
    if method == "kfs":  # appendix A: decoders of the first stage stay
        first = common.load_distilled(folder / "order1_stage0.pt")
        assert torch.equal(stored["decoders.weights.0"], first["decoders.weights.0"])
    looks_right(folder.with_suffix(".png"))
    monkeypatch.setattr(common, "train_and_test", None)
    status, again, err = call(evaluate, *flags)
    assert status == 0 and results(tmp_path)[1]["stage_accuracy"] == line["stage_accuracy"], err
    told(*call(evaluate, *flags[:-len(FEW[method])], FEW[method][0].replace("=", "=1")), "other settings")


@pytest.mark.parametrize("more, words", ((("--set", "colour=3"), ("no such setting", "iterations")),
                                         (("--set", "iterations=many"), ("iterations=many", "number")),
                                         (("--set", "iterations=0"), ("iterations=0", "at least 1")),
                                         (("--set", "dsa=3"), ("dsa=3", "true")), (("--set", "zca=true"), ("zca",)),
                                         (("--classes-per-step", 3), ("one class", "of 4")),
                                         (("--network", "vgg11", "--dataset", "tiny", "--classes-per-step", 3), ("28 to 256",)),
                                         (("--set", "objective=dm"), ("objective", "haba"))))
def test_bad_setting(more, words, home, tmp_path, call):
    told(*call(evaluate, "--continual", "dm", "--dataset", "grey", "--data-dir", home, "--out", tmp_path, *more),
         *[word for word in words if word != "haba"])


# ------------------------------------------------------------------------------------------ pictures, mistakes

def test_pictures(home, tmp_path, call):
    """Images with class names, HaBa's bases and hallucinations, KFS's codes, and the plane of features can be read."""
    path = save_dm(home, "tiny", tmp_path / "one.pt", 3)
    data = common.load_dataset("tiny", home)
    bases, labels = data.random_real(2, "test")
    machines = haba.Hallucinators(haba.PAPER["hallucinators"], data.shape, data.shape)
    tensors = {"bases": bases, "labels": labels} | {f"hallucinators.{n}": p for n, p in machines.named_parameters()}
    common.save_distilled(tmp_path / "haba.pt", data, "haba", 2, tensors, .01,
                          haba.PAPER | {"iterations": 1, "size": None}, 1., 0)
    settings = kfs.PAPER | kfs.layout(data.shape, 1) | {"iterations": 1, "size": None}
    decoders = kfs.build_decoders(data, settings, 2)
    tensors = {f"decoders.{name}": p for name, p in decoders.named_parameters()}
    tensors["codes"] = torch.randn(3, 4, *settings["code"])
    common.save_distilled(tmp_path / "kfs.pt", data, "kfs", 1, tensors, None, settings, 1., 0)
    status, _, err = call(evaluate, tmp_path / "haba.pt", tmp_path / "kfs.pt", "--picture", "factors", "images",
                          "--data-dir", home)
    assert status == 0, err
    status, _, err = call(evaluate, path, "--picture", "images", "plane", "--data-dir", home)
    assert status == 0, err
    for name in ("haba_factors", "kfs_factors", "haba_images", "kfs_images", "one_images", "one_plane"):
        looks_right(tmp_path / f"{name}.png")
    assert not (tmp_path / "results.jsonl").exists()
    told(*call(evaluate, path, "--picture", "factors", "--data-dir", home), "no factors", "haba.py")


def test_ticks():
    """Round numbers that hold the range."""
    assert evaluate.ticks(0, 300) == [0, 50, 100, 150, 200, 250, 300]
    assert evaluate.ticks(13.7, 17.6) == [13, 14, 15, 16, 17, 18]
    for low, high in ((.74, .98), (-3, 8000), (5, 5), (1e-4, 3e-4)):
        found = evaluate.ticks(low, high)
        assert found[0] <= low and found[-1] >= high - 1e-9 and (4 <= len(found) <= 11 or low == high)


def test_curves(tmp_path, call, monkeypatch):
    """--curves: a panel of losses, and one of accuracies where results.jsonl has some of the same method, data set and
    budget; a checkpoint without losses is refused."""
    panels = []
    draw = evaluate.draw_curve
    same = {"method": "dm", "dataset": "tiny", "per class": 1, "seed": 0}
    losses = torch.arange(250.)
    losses[:10] = math.nan  # iterations of an older version
    common.save({"settings": same, "iteration": 250, "seconds": 1., "state": {}, "losses": losses}, tmp_path / "one.ckpt")
    line = {"method": "dm", "dataset": "tiny", "per_class": 1, "network": "convnet2", "runs": 1, "epochs": 1, "seed": 0,
            "random_accuracy": 1., "random_std": 1., "random_images_per_class": 1, "std": 1., "iterations": 50}
    for more in ({"accuracy": 20., "iterations": 100}, {"accuracy": 10.}, {"accuracy": 30., "method": "mtt"},
                 {"accuracy": 11.}, {"accuracy": 40., "network": "resnet18"}, {"accuracy": 50., "steps": 7},
                 {"accuracy": 60., "seed": 1}):
        common.append_line(json.dumps(line | more), tmp_path / "results.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw_curve", lambda pen, place, curve, *rest, **more: panels.append(curve) or
                      draw(pen, place, curve, *rest, **more))
        status, _, err = call(evaluate, "--curves", tmp_path / "one.ckpt", "--out", tmp_path)
    assert status == 0, err
    looks_right(tmp_path / "curves.png")
    loss, accuracy = panels
    assert accuracy == [(50, 11., 1.), (100, 20., 1.)]
    assert len(loss) == 96 and loss[-1] == (250, pytest.approx(248.5), 0)  # of 248 and 249
    common.save({"settings": same, "iteration": 1, "losses": torch.tensor([math.nan])}, tmp_path / "old.ckpt")
    told(*call(evaluate, "--curves", tmp_path / "old.ckpt", "--out", tmp_path), "old.ckpt", "no losses")
    told(*call(evaluate, "--curves", tmp_path / "none.ckpt", "--out", tmp_path), "none.ckpt", "does not exist")
    common.save({"settings": None, "losses": None}, tmp_path / "odd.ckpt")
    told(*call(evaluate, "--curves", tmp_path / "odd.ckpt", "--out", tmp_path), "odd.ckpt", "no losses")


@pytest.mark.parametrize("text", ("5", "{}", "no JSON", '{"method": "dm"}'))
def test_odd_results(text, tmp_path, call):
    """A line of results.jsonl that is none is told by its number."""
    (tmp_path / "results.jsonl").write_text('{"kind": "corruption"}\n' + text + "\n")
    told(*call(evaluate, "--table", "--out", tmp_path), "line 2", "results.jsonl")


@pytest.mark.parametrize("flags, words", (
    ((), ("nothing to do",)), (("--coreset", "random"), ("--dataset",)),
    (("--table", "--out", "nowhere"), ("results.jsonl",)),
    (("--coreset", "random", "--dataset", "tiny", "--network", "vgg11"), ("28 to 256", "16")),
    (("--coreset", "herding", "--dataset", "tiny", "--ipc", 9), ("9 images a class", "8")),
    (("--continual", "dm"), ("--dataset",))))
def test_mistakes(flags, words, home, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(*call(evaluate, *flags, "--data-dir", home, *QUICK), *words)


def test_core_sets_know_the_order(home, tmp_path):
    """The network behind core-sets is not taken for the same images in another order, or with other labels."""
    data = common.load_dataset("tiny", home)
    for _ in range(2):
        evaluate.train_features(data, tmp_path, 0)
    assert len(list(tmp_path.glob("coresets/*"))) == 1
    data.train, data.train_labels = data.train.flip(0), data.train_labels.flip(0)
    evaluate.train_features(data, tmp_path, 0)
    data.train_labels = data.train_labels.flip(0)
    evaluate.train_features(data, tmp_path, 0)
    assert len(list(tmp_path.glob("coresets/*"))) == 3


def test_steps_are_whole_epochs(home, tmp_path, call, monkeypatch):
    """A budget of steps is rounded to whole epochs, and the row says how many steps it took; two files of one name have
    curves of their own."""
    monkeypatch.setitem(common.PROTOCOL, "batch", 2)  # six images: three steps an epoch
    paths = [save_dm(home, "tiny", tmp_path / folder / "one.pt", 2) for folder in "ab"]
    drawn = []
    monkeypatch.setattr(evaluate, "draw_curves", lambda path, title, label, curves: drawn.append(curves))
    status, _, err = call(evaluate, *paths, "--steps", 1, 7, "--data-dir", home, "--out", tmp_path, "--runs", 1)
    assert status == 0, err
    assert [(line["steps"], line["epochs"]) for line in results(tmp_path)] == [(3, 1), (6, 2)] * 2
    curves, = drawn
    assert set(curves) == {f"{what}{name}_one, convnet2" for what in ("", "random real as ") for name in "ab"}
    assert all([x for x, _, _ in curve] == [3, 6] for curve in curves.values())


def test_stage_distilled_anew(home, tmp_path, call):
    """A stage's score is not taken from its file when the stage was distilled anew; HaBa's --set dsa=false is scored
    without DSA."""
    flags = ("--continual", "haba", "--dataset", "grey", "--data-dir", home, "--out", tmp_path, "--orders", 1, *QUICK)
    settings = [*FEW["haba"], "objective=dm", "batch_real=2", "dsa=false"]
    settings = [text for text in settings if text.partition("=")[0] not in ("experts", "max_start", "expert_epochs", "student_steps")]
    status, _, err = call(evaluate, *flags, "--set", *settings)
    assert status == 0, err
    folder = tmp_path / "continual_haba_grey_1_by2"
    assert common.load_distilled(folder / "order0_stage1.pt")["augmentation"] == "none"
    before = json.loads((folder / "order0_stage0_convnet3_instance.json").read_text())["setting"]
    assert before["augment"] is False
    for path in [*folder.glob("*.pt"), *folder.glob("*.ckpt")]:
        path.unlink()
    status, _, err = call(evaluate, *flags, "--set", *settings, "lr_bases=50")
    assert status == 0, err
    assert json.loads((folder / "order0_stage0_convnet3_instance.json").read_text())["setting"] != before


def test_other_preprocessing_is_refused(home, tmp_path, call):
    """A file whose preprocessing is not that of the data it is scored on is refused, before anything is trained."""
    path = save_dm(home, "tiny", tmp_path / "one.pt")
    make_folder(tmp_path / "tiny", train=9, test=10)
    told(*call(evaluate, path, "--data-dir", tmp_path, *QUICK), "preprocessing", "standardise-")
    told(*call(evaluate, path, "--data-dir", home, "--dataset", "grey", *QUICK), "image shape")


def test_stored_per_class_rounds_up(home, tmp_path, call):
    """Random images have the storage of the set, rounded up to whole images, at most a class's."""
    data = common.load_dataset("tiny", home)
    for stored, expected in ((768, 1), (769, 2), (10 ** 6, 8)):
        per_class, _, found = common.score_random(data, stored, common.PROTOCOL, 1, 1)
        assert per_class == expected and len(found) == 1
    assert math.isfinite(found[0])
