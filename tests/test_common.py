"""Data, augmentation, network and training of common.py, each against an independent reference."""

import collections
import dataclasses
import math
import resource
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import find, relative
from torch import nn

import common
import frepo
import mtt


def correlated_pixels(n, key):
    random = np.random.default_rng(key)
    mixed = random.normal(size=(n, 8)) @ np.random.default_rng(1).normal(size=(8, 75)) * 25
    pixels = mixed + 128 + random.normal(0, 8, (n, 75))
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).view(n, 3, 5, 5)


@pytest.mark.parametrize("name", ["tiny", "cifar10"])
@pytest.mark.parametrize("kind", ["standardize", "zca", "zca-trace"])
def test_preprocess(kind, name, tmp_path):
    """By numpy, of training and other pixels: statistics, whitening by SVD; inverse; its cache."""
    pixels, others = correlated_pixels(300, 2), correlated_pixels(10, 3)
    cache = tmp_path / "whiten.pt"
    fit = partial(common.Preprocess.fit, pixels, kind, common.STATS.get(name), cache)
    x, y = pixels.double().numpy() / 255, others.double().numpy() / 255
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    if name == "cifar10":
        mean, std = np.array([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])
    mean = mean[:, None, None] if kind == "standardize" else x.mean(0)
    std = 1 if kind == "zca" else std[:, None, None]
    matrix = np.eye(75)
    if kind != "standardize":
        covariance = np.cov(((x - mean) / std).reshape(300, -1).T)
        u, s, _ = np.linalg.svd(covariance)
        ridge = 0.1 if kind == "zca" else 0.1 * np.trace(covariance) / 75
        assert s.max() > ridge > s.min()  # both ends of the ridge matter
        matrix = u / np.sqrt(s + ridge) @ u.T
    for raw, z in ((pixels, x), (others, y)):
        images = fit()(raw)  # the second time from the cache
        expected = ((z - mean) / std).reshape(len(z), -1) @ matrix
        np.testing.assert_allclose(images.flatten(1).numpy(), expected, atol=1e-3)
        torch.testing.assert_close(fit().undo(images), raw / 255, rtol=0, atol=1e-4)
    cache.write_bytes(b"broken")
    if kind != "standardize":
        with pytest.raises(common.UserError, match=cache.name):
            fit()


def test_sample(data):
    """Different images of the right classes, all come up."""
    data = dataclasses.replace(data, train=data.train[4:], train_labels=data.train_labels[4:])
    seen = set()  # the classes have 10, 11 and 11 images
    for step in range(40):
        images, labels = data.sample(10, "key", step)
        index = find(images, data.train).tolist()
        assert labels.tolist() == data.train_labels[index].tolist() == sorted([0, 1, 2] * 10)
        assert len(set(index)) == 30
        seen |= set(index)
    assert len(seen) == 32 and torch.equal(data.sample(10, "key", 39)[0], images)
    images, labels = data.batch(200, "key")
    assert torch.equal(data.train_labels[find(images, data.train)], labels)


def test_glyphs(tmp_path):
    """Deterministic, balanced, no test image like a training image; loads without a download."""
    (train, labels), (test, test_labels) = map(common.draw_glyphs, (4, 4), (0, 1))
    assert torch.equal(common.draw_glyphs(4, 0)[0], train)
    assert set(labels.bincount().tolist()) == set(test_labels.bincount().tolist()) == {4}
    everything = torch.cat([train, test]).flatten(1).float()
    assert (torch.cdist(everything, everything).fill_diagonal_(1e9) > 500).all()
    data = common.load_dataset(common.Args(data_dir=str(tmp_path)), torch.device("cpu"))
    assert len(data.classes) == labels.max() + 1 == data.test_labels.max() + 1


def test_hash_int():
    """The same integer in every process, below 2**63; another one for another key or type."""
    assert common.hash_int("seed", 1, ("a", 2.5)) == 8526687326266024686
    values = [common.hash_int(*key) for key in [(1,), ("1",), (1, 1), (11,), ((1,),), ()]]
    assert len(set(values)) == 6 and all(0 <= value < 2**63 for value in values)


EDGE = 15.5
GRID = torch.stack(torch.meshgrid(*[torch.arange(-EDGE, 16).double()] * 2, indexing="xy"))


def coordinates(n):
    """Images of 32x32, float64, that hold x and y of each pixel, and noise."""
    noise = torch.randn(n, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return torch.cat([GRID.expand(n, 2, 32, 32), noise], 1)


def describe(images, out):
    """Recognize the transform of `coordinates` by its result alone -> name, parameters (n, k)."""
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    if (mirrored | (out == images).flatten(1).all(1)).all():
        return "flip", mirrored.float()[:, None]
    if ((out == images) | (out == 0)).all():
        gone = (out == 0).all(1)
        rows, columns = gone.any(2), gone.any(1)
        square = rows[:, None, :, None] & columns[:, None, None, :]
        assert torch.equal(out, images * ~square)
        top, left, height = rows.int().argmax(1), columns.int().argmax(1), rows.sum(1)
        return "cutout", torch.stack([top, left, height], 1)
    gray, level = images.mean(1, keepdim=True), images.mean((1, 2, 3), keepdim=True)
    parts = torch.ones_like(images), (gray - level).expand_as(images), images - gray
    basis = torch.stack(parts, 1).flatten(2).mT
    fit = torch.linalg.lstsq(basis, out.flatten(1)[..., None]).solution
    if torch.allclose(basis @ fit, out.flatten(1)[..., None], atol=1e-3):
        brightness, contrast, chroma = fit[..., 0].T
        return "color", torch.stack([brightness - level.flatten(), chroma / contrast, contrast], 1)
    return describe_warp(out)


def describe_warp(out):
    """Fit source = matrix @ position + shift in the middle, check it everywhere."""
    right, down = (out[:, :2, 16, 16] - out[:, :2, y, x] for y, x in ((16, 15), (15, 16)))
    matrix, shift = torch.stack([right, down], 2), out[:, :2, 15:17, 15:17].mean((2, 3))
    source = torch.einsum("nij,jhw->nihw", matrix, GRID) + shift[..., None, None]
    inside = (source.abs() < EDGE - 1e-3).all(1, keepdim=True)
    outside = (source.abs() > EDGE + 1).any(1, keepdim=True)
    assert torch.allclose(out[:, :2] * inside, source * inside, atol=1e-3) and outside.any()
    padding = "zeros"
    if (out * outside != 0).any():
        assert torch.allclose(out[:, :2], source.clamp(-EDGE, EDGE), atol=1e-3)
        padding = "edges"
    scales = matrix.diagonal(dim1=1, dim2=2)
    if (matrix - torch.eye(2).double()).abs().max() < 1e-4:
        return f"shift {padding}", shift
    assert shift.abs().max() < 1e-4
    if (matrix - torch.diag_embed(scales)).abs().max() > 1e-4:
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(2).double().expand_as(matrix))
        return f"rotate {padding}", torch.rad2deg(torch.atan2(matrix[:, 1, :1], scales[:, :1]))
    if (scales[:, 0] - scales[:, 1]).abs().max() > 1e-4:
        return f"scale {padding}", scales
    return f"zoom {padding}", scales[:, :1]


DSA = {
    "color": [(-0.5, 0.5), (0, 2), (0.5, 1.5)],  # brightness, saturation, contrast
    "shift zeros": [(-4, 4), (-4, 4)],
    "cutout": [(0, 24), (0, 24), (8, 16)],  # top, left, height; less at the border
    "flip": [(0, 1)],
    "scale zeros": [(1 / 1.2, 1.2), (1 / 1.2, 1.2)],
    "rotate zeros": [(-15, 15)],
}
FREPO = {
    "color": [(-0.25, 0.25), (0.7788, 1.284), (0.7788, 1.284)],
    "zoom edges": [(0.8, 1.25)],
    "shift edges": [(-4, 4), (-4, 4)],
    "cutout": [(0, 24), (0, 24), (8, 8)],
    "flip": [(0, 1)],
    "rotate zeros": [(-15, 15)],
}
SCALED = FREPO | {"scale zeros": DSA["scale zeros"]}
scaled_frepo = partial(frepo.frepo_augment, scale=True)
CASES = [(common.dsa, DSA), (frepo.frepo_augment, FREPO), (scaled_frepo, SCALED)]


@pytest.mark.parametrize("augment, ranges", CASES, ids=["dsa", "frepo", "scaled"])
def test_augmentation(augment, ranges):
    """Which transforms are drawn, each as often; parameters fill their ranges; gradients flow."""
    found, images = collections.defaultdict(list), coordinates(40).requires_grad_()
    weight, direction = torch.randn(2, *images.shape, dtype=torch.double)
    for step in range(120):
        out = augment(images, True, "key", step)
        # every transform is affine in the pixels: its derivative is a difference
        change = augment(images + direction, True, "key", step) - out
        (grad,) = torch.autograd.grad((weight * out).sum(), images)
        assert (grad * direction).sum().item() == pytest.approx((weight * change).sum().item())
        name, parameters = describe(images.detach(), out.detach())
        found[name].append(parameters.double())
        name, _ = describe(images[:9].detach(), augment(images[:9], False, "key", step).detach())
        assert name in ranges.keys() - {"flip"}
    assert found.keys() == ranges.keys() and min(map(len, found.values())) > 6
    for name, values in found.items():
        values = torch.cat(values)
        for value, (low, high) in zip(values.T, ranges[name], strict=True):
            near = 0.03 * (high - low) + 1e-3
            assert low - 1e-3 <= value.min() <= low + near, name
            assert high - near <= value.max() <= high + 1e-3, name
            if (augment, name) != (common.dsa, "cutout"):  # there the border cuts
                assert abs(value.mean() - (low + high) / 2) <= 3 * near, name
        if len(values.T) > 1 and name != "cutout":  # drawn independently
            assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.2


def test_compiled_training(compiler, exact, data):
    """A compiled training moves the parameters alike."""
    data.train, data.test = data.train[..., ::2, ::2], data.test[..., ::2, ::2]
    data.shape = (3, 8, 8)
    distilled = data.train[None], data.train_labels, common.Protocol()
    moves = []
    for compiled in (False, True):
        common.seed(0, "score", 0)
        start = mtt.flatten(common.ConvNet(data.shape, 3))
        args = common.Args(epochs=2, compile=compiled)
        net, _ = common.train_and_test(data, *distilled, args)
        moves.append(mtt.flatten(net) - start)
    assert 0 < relative(moves[1], moves[0]) < 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_kept_memory():
    """What is freed is used again: ten times 64 MB take few fresh pages (else 163,840)."""
    common.setup(common.Args(device="cpu"))
    for k in range(20):
        if k == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 40000


def test_convnet():
    """Against torch's own layers: more images than a chunk, an odd map, norms off the identity."""
    net, layers = common.ConvNet((3, 36, 36), 5, width=8), []
    for channels in (3, 8, 8):
        layers += [nn.Conv2d(channels, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)]
        layers += [nn.ReLU(), nn.AvgPool2d(2)]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5)).double()
    for ours, theirs in zip(net.double().parameters(), plain.parameters(), strict=True):
        theirs.data.copy_(ours.data.normal_(0, 0.5))
    images = torch.randn(70, 3, 36, 36, dtype=torch.double, requires_grad=True)
    for mode in (True, False):
        out = net.train(mode)(images), plain.train(mode)(images)
        torch.testing.assert_close(*out)
        torch.testing.assert_close(*(torch.autograd.grad(y.exp().sum(), images)[0] for y in out))
    torch.testing.assert_close(common.frozen_features(net, images), plain[:-1](images))


@pytest.mark.parametrize("side, channels, depth", [(28, 1, 3), (32, 3, 3), (64, 3, 4), (128, 3, 5)])
def test_sizes(side, channels, depth):
    """Depth by size, 4x4 maps at the end; 320,010 parameters; FRePo's widths, without a norm."""
    net = common.ConvNet((channels, side, side), 7, width=4)
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.modules()) == depth
    assert net.features(torch.randn(2, channels, side, side)).shape == (2, 4 * 4 * 4)
    count = sum(9 * i * o + o for i, o in ((3, 128), (128, 256), (256, 512))) + 8192 * 10 + 10
    for settings, expected in (({}, 320010), ({"frepo": True}, count)):
        parameters = common.ConvNet((3, 32, 32), 10, **settings).parameters()
        assert sum(p.numel() for p in parameters) == expected


def rates(kind=common.Protocol, count=3, **settings):
    """The learning rate of each epoch."""
    protocol = kind(**settings)
    return [protocol.rate(epoch, count) for epoch in range(protocol.length(count))]


def test_learning_rate():
    """Drops at shares of the epochs; FRePo: 500 steps of warm-up, then a cosine to 1 %."""
    assert rates(epochs=6) == pytest.approx([0.01] * 3 + [0.001] * 3)
    found = rates(epochs=6, lr=1, drops=(2 / 3, 5 / 6), decay=0.2)
    assert found == pytest.approx([1, 1, 1, 1, 0.2, 0.04])
    found = rates(frepo.FrepoProtocol, epochs=1100, lr=1)
    assert found[:500] == pytest.approx([(i + 1) / 500 for i in range(500)])
    assert (found[800], found[-1]) == pytest.approx((0.505, 0.01), abs=1e-4)
    found = rates(frepo.FrepoProtocol, epochs=4, batch=1, lr=1)  # at most half is warm-up
    assert found == pytest.approx([0.5, 1, 1, 0.505])
    steps = {10: 1000, 100: 2000, 200: 20000, 400: 5000, 500: 5000, 1000: 10000, 2000: 40000}
    protocol = frepo.FrepoProtocol()
    for count, expected in (steps | {5000: 40000}).items():
        assert protocol.length(count) * math.ceil(count / protocol.batch) == expected
    assert protocol.lr == 3e-4


@pytest.mark.parametrize("regression", [False, True])
def test_train(regression, data, monkeypatch):
    """Training against a plain loop: the optimizer, the schedule, the batches, their mixing."""
    data = dataclasses.replace(data, flip=False, test=data.test.double())
    variants, labels = torch.stack([data.train, -data.train]).double(), data.train_labels
    pool, batches = variants.flatten(0, 1), []

    def augment(images, flip, *key):
        assert not flip
        batches.append(find(images, pool))
        return images

    def mix(images, labels, *key):  # negatives, each labelled as the next class
        return -images, labels.roll(1, 1)

    settings = {"mix": mix, "batch": 15, "epochs": 3, "weight_decay": 0.05}
    settings["network"] = lambda *shape: common.ConvNet(*shape, width=8).double()
    kind = frepo.FrepoProtocol if regression else common.Protocol
    protocol = kind(augment=augment, **settings | {"lr": 0.01})
    arguments = data, variants, labels, protocol, common.Args(compile=False)
    trained, _ = common.train_and_test(*arguments)
    orders = torch.cat(batches).view(3, 36)
    assert [len(index) for index in batches] == [15, 15, 6] * 3 and len(orders.unique(dim=0)) == 3
    assert ((orders % 36).sort(1).values == torch.arange(36)).all() and (orders >= 36).any()
    monkeypatch.setattr(kind, "length", lambda *_: 0)
    net = common.train_and_test(*arguments)[0].train()
    start = mtt.flatten(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0, momentum=0.9, weight_decay=0.05)
    if regression:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0, weight_decay=0.05)
    rates = [0.01 / 1.5, 0.01, 0.01 * 0.7525] if regression else [0.01, 0.01, 0.001]
    for step, index in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rates[step // 3]
        logits, wanted = net(-pool[index]), (labels[index % 36] + 1) % 3
        loss = F.cross_entropy(logits, wanted)
        if regression:
            loss = (logits - F.one_hot(wanted, 3) + 1 / 3).square().sum() / 2 / len(wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert relative(mtt.flatten(trained) - start, mtt.flatten(net) - start) < 1e-4
    right = (net(pool).argmax(1) == labels.repeat(2)).double().mean().item()
    images, labels = pool.repeat(9, 1, 1, 1), labels.repeat(18)
    assert common.accuracy(trained, images, labels) == pytest.approx(100 * right)
