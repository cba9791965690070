"""HaBa and the translator: losses, gradients and updates against plain references in float64."""

from dataclasses import replace
from functools import partial

import pytest
import test_matching as plain
import torch
import torch.nn.functional as F
from conftest import find, relative, spy
from test_matching import joined, small_data  # noqa: F401, the fixture `data`
from test_trajectory import naive_match

import common
import haba
import mtt
import translator_fewshot as tf

IMAGE, CONV, MAPS = 768, 2 * 84, 2 * 768  # numbers in a basis, and in a hallucinator's parts


def start_factors(data, args):
    """The factorized set before the first iteration, with bases of the images' size."""
    bases, _ = data.sample(args.bpc, 0, "start")
    common.seed(args.seed, "hallucinators")
    return haba.FactorizedSet(bases, data.shape, 3, args)


def settings(data_dir, **more):
    small = dict(bpc=2, hallucinators=3, iterations=1, batch_real=5, student_steps=2, matches=1)
    small |= dict(data_dir=str(data_dir), experts=1, max_start=1, expert_epochs=1)
    return haba.Args(**small | more)


PRINTED = [(0, 0, 6144), (1, 0, 6312), (2, 0, 10963), (3, 0, 16131), (1, 8, 16827), (1, 16, 33651)]


@pytest.mark.parametrize("depth, channels, parameters", PRINTED)
def test_hallucinator(depth, channels, parameters):
    """Eq. 2 by hand; parameters as in the supplement's Tables 3 and 4."""
    module = haba.Hallucinator((3, 32, 32), haba.Args(depth=depth, channels=channels))
    assert sum(p.numel() for p in module.parameters()) == parameters
    torch.nn.init.normal_(module.scale)
    torch.nn.init.normal_(module.shift)
    bases = x = torch.randn(5, 3, 32, 32)
    encoder = [m for m in module.encoder if isinstance(m, torch.nn.Conv2d)]
    decoder = [m for m in module.decoder if isinstance(m, torch.nn.Conv2d)]
    for i, conv in enumerate(encoder):
        if i:  # means of 2x2 pixels
            x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
        x = F.conv2d(x, conv.weight, conv.bias, padding=1).clamp_min(0)
    x = module.scale * x + module.shift
    for i, conv in enumerate(decoder):
        x = x.clamp_min(0).repeat_interleave(2, 2).repeat_interleave(2, 3) if i else x
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
    assert len(encoder) == len(decoder) == depth and relative(module(bases), x) < 1e-5


STORED = [
    ({}, 6 * IMAGE + 3 * (CONV + MAPS)),
    ({"share_conv": True, "class_hallucinators": True}, 6 * IMAGE + CONV + 9 * MAPS),
    ({"basis_channels": 1, "basis_size": 8}, 6 * 64 + 3 * (30 + 84 + MAPS)),
    ({"hallucinators": 0, "basis_channels": 1, "basis_size": 8}, 6 * 64),
]


@pytest.mark.parametrize("kind, stored", STORED, ids=str)
def test_file(kind, stored, data, tmp_path, monkeypatch):
    """Where bases start, what is stored, whose hallucinators are used; decoding; no DSA."""
    calls, _ = plain.record_transforms(monkeypatch)
    rates = dict(lr_bases=1e-9, lr_hallucinators=0.1)
    args = settings(tmp_path, objective="dm", dsa=False, **rates, **kind)
    found = haba.distill(data, args, tmp_path / "haba.pt")
    start = data.sample(2, 0, "start")[0]
    if "basis_size" in kind:  # averaged over channels and about 2x2 pixels
        start = F.avg_pool2d(start, 2).mean(1, keepdim=True)
    assert found["bases"].shape == start.shape
    assert F.cosine_similarity(found["bases"], start, 0).mean() > 0.6
    factors = haba.FactorizedSet(torch.empty_like(start), data.shape, 3, args)
    factors.load_state_dict(common.load(tmp_path / "haba.ckpt", "")["state"]["factors"])
    assert sum(p.numel() for p in factors.parameters()) == stored
    assert found["stored_per_class"] == pytest.approx(stored / 3) and not calls
    images, labels = haba.decode(common.load(tmp_path / "haba.pt", ""))
    assert images.shape[1:] == (6, 3, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    for j, decoded in zip(range(args.hallucinators or 1), images, strict=True):
        x = F.interpolate(factors.bases, (16, 16), mode="bilinear")
        modules = list(factors.hallucinators[j]) * (3 // len(factors.hallucinators[j]))
        expected = [module(x[2 * c :][:2]).expand(2, 3, 16, 16) for c, module in enumerate(modules)]
        assert relative(decoded, torch.cat(expected).detach()) < 1e-10


def contrast(features, labels):
    """Eq. 3, supervised, by loops over anchors and positives: features (n, d), labels (n,)."""
    total = 0
    for a, label in enumerate(labels):
        shares = (F.cosine_similarity(features[a : a + 1], features) / 0.07).exp()
        others = torch.arange(len(labels)) != a
        positive = shares[others & (labels == label)]
        total = total - sum((p / shares[others].sum()).log() for p in positive) / len(positive)
    return total / len(labels)


@pytest.mark.parametrize("kind", [{}, {"class_hallucinators": True}, {"batch": 4}], ids=str)
@pytest.mark.parametrize(
    "objective, alpha", [("mtt", 0.01), ("mtt", 2e-4), ("dm", 0.01), ("dc", 0.01)]
)
def test_iteration(objective, alpha, kind, data, tmp_path, monkeypatch):
    """Eq. 6 in one graph; then the step of the adversary with the new factors (Eq. 4)."""
    history = plain.record_steps(monkeypatch)
    args = settings(tmp_path, objective=objective, step_size=alpha, lr_bases=2.0, **kind)
    args.weight_cos, args.weight_con, args.weight_task, args.lr_hallucinators = 0.3, 0.2, 0.7, 0.5
    factors, net = start_factors(data, args), common.ConvNet(data.shape, 3).reset(0, 0)
    adversary, b = common.ConvNet(data.shape, 3).reset(0, "F"), args.batch or 6
    segment = mtt.sample_segment(mtt.load_experts(data, args, {}), args, 0, 0)
    calls, draws = plain.record_transforms(monkeypatch)
    found = haba.distill(data, args, tmp_path / "haba.pt")

    def images_of(before, name, u):
        """Augmented images, with a graph, labels, hallucinators of a recorded transform."""
        index = find(before, factors.all_images().flatten(0, 1))
        assert len(u.unique(dim=0)) == len(index.unique()) == len(index)
        images = torch.cat([factors(i % 6, i // 6) for i in index.split(1)])
        return plain.transform(images, name, u), factors.labels[index % 6], index // 6

    def batch(n):
        images, labels, which = images_of(*draws[0, 0, "batch", n])
        assert len(images) == b and len(which.unique()) == 1
        return images, labels

    weight, step_size = 0.3, torch.tensor(float(alpha), requires_grad=True)
    for p in factors.parameters():
        p.grad = torch.zeros_like(p)
    if objective == "mtt":
        loss = naive_match(net, *segment, step_size, batch, 2)
        alpha = max(alpha - 1e-5 * step_size.grad.item(), 0.001)
        assert found["step_size"] == pytest.approx(alpha, rel=1e-8)
    else:
        images = factors.all_images().unflatten(1, (3, 2)).transpose(0, 1).flatten(1, 2)
        loss = plain.matching_loss(objective, net, images, calls[0:6:2], calls[1:6:2])
        loss.backward()
    assert history[0][0] == pytest.approx(loss.item(), rel=1e-8)
    images, labels, which = images_of(*calls[-2])
    assert len(images) == 2 * b and which.tolist() == [which[0]] * b + [which[b]] * b
    cosine = 0  # Eq. 5: j != k twice, over |H|^2 = 4
    for u, v in zip(*adversary.features(images).split(b), strict=True):
        cosine = cosine + 2 * (u @ v) / (u.norm() * v.norm()) / 4 / b
    if objective != "mtt":
        (slope,) = torch.autograd.grad(cosine, factors.bases, retain_graph=True)
        weight = weight * factors.bases.grad.norm() / slope.norm()
    (weight * cosine).backward(inputs=list(factors.parameters()))
    for name, p in factors.named_parameters():
        step = (-2.0 if name == "bases" else -0.5) * p.grad
        assert (found[name] - p - step).norm() <= 1e-6 * step.norm() + 1e-9
        p.data = found[name]
    images, labels, again = images_of(*calls[-1])
    assert torch.equal(which, again)
    features = adversary.features(images.detach())
    task = F.cross_entropy(adversary.classifier(features), labels)
    adversary.zero_grad()
    (0.7 * task + 0.2 * contrast(features, labels)).backward()
    torch.optim.SGD(adversary.parameters(), lr=0.001).step()
    assert relative(joined(history[0][1]["adversary"]), joined(adversary.state_dict())) < 1e-9
    for it in range(9):
        haba.hallucinate_pair(factors, data, args, it)
        which = images_of(*calls[-1])[2]
        assert which[0] != which[b]


def test_dc_network(data, tmp_path):
    """Between two matches DC trains its network on the set: one step of plain SGD an epoch."""
    args = settings(tmp_path, objective="dc", dsa=False, iterations=3, matches=3, net_epochs=2)
    args.hallucinators, args.lr_bases = 0, 1e-12
    haba.distill(data, args, tmp_path / "haba.pt")
    net = common.ConvNet(data.shape, 3).reset(0, 0)
    start, (images, labels) = mtt.flatten(net), data.sample(2, 0, "start")
    for _ in range(4):
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        torch.optim.SGD(net.parameters(), lr=0.01).step()
    found = common.load(tmp_path / "haba.ckpt", "")["state"]["net"]
    assert relative(joined(found) - start, mtt.flatten(net) - start) < 1e-6


def test_momentum_alone(data, tmp_path, monkeypatch):
    """A hallucinator that is not drawn goes on with 0.95 of its last move."""
    history = plain.record_steps(monkeypatch)
    args = settings(tmp_path, iterations=12, student_steps=1, weight_cos=0, lr_hallucinators=1.0)
    haba.distill(data, args, tmp_path / "haba.pt")
    before, last, coasting, drawn = start_factors(data, args).state_dict(), [0] * 3, 0, []
    for _, state in history:
        for j in range(3):
            name = f"hallucinators.{j}.0.shift"
            move = state["factors"][name] - before[name]
            alone = (move - 0.95 * last[j]).norm() < 1e-10
            drawn += [] if alone else [j]
            coasting += bool(alone and move.norm() > 1e-8)
            last[j] = move
        before = state["factors"]
    assert len(drawn) == 12 and set(drawn) == {0, 1, 2} and coasting > 5


@pytest.mark.parametrize("flip", [True, False])
def test_bilevel_loss(flip, data, monkeypatch):
    """Alg. 1 and its gradient, against Eq. 17 by matrix inversion; with and without mirrors."""
    monkeypatch.setattr(tf, "krr", partial(tf.krr, ridge=1e-3))
    data.flip, args, key = flip, tf.Args(inner_steps=3, batch_real=10), (0, "space", 5)
    net, outer = tf.build_network(data), tf.build_network(data)
    params = list(net.blocks.requires_grad_(True).parameters())
    ours = tf.bilevel_loss(net, outer, data, args, 5, alpha=0.025)
    gradients = torch.autograd.grad(ours, params)
    x, y = tf.start_synthetic(data, args, *key, "start")
    real, numbers = data.batch(10, *key, "real")
    rest = real, tf.center_labels(numbers, 3), 1e-3, flip
    for _ in range(3):
        loss = plain.nfr_by_hand(net, x, y, *rest)
        slopes = torch.autograd.grad(loss, (x, y), create_graph=True)
        x, y = x - 0.5 * slopes[0], y - 0.5 * slopes[1]
    loss = plain.nfr_by_hand(outer.reset(*key), x, y, *rest)
    assert ours.item() == pytest.approx(loss.item())
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, params), strict=True):
        assert relative(ours, theirs) < 1e-7


@pytest.mark.parametrize("flip", [True, False])
def test_one_network(flip, data, tmp_path, monkeypatch):
    """Alg. 2, lines 4 to 9: Eq. 2 on all real images, by matrix inversion; the hinge, Adam."""
    monkeypatch.setattr(tf, "krr", partial(tf.krr, ridge=1e-3))
    monkeypatch.setattr(tf, "margin_loss", torch.norm)  # the hinge has no gradient yet
    history, data.flip = plain.record_steps(monkeypatch), flip
    theta, args = tf.build_network(data), tf.Args(mode="one-net", iterations=3, lr=0.1)
    start, (images, labels) = (tf.start_synthetic(data, args, 0, "start") for _ in range(2))
    tf.distill_in_one_network(theta, *start, data, args, tmp_path / "one.pt")
    rest = data.train, tf.center_labels(data.train_labels, 3), 1e-3, flip
    optimizer = torch.optim.Adam([images, labels])
    for (loss, state), rate in zip(history, (0.1, 0.0775, 0.0325), strict=True):  # a cosine
        expected = plain.nfr_by_hand(theta, images, labels, *rest)
        assert loss == pytest.approx(expected.item())
        optimizer.zero_grad()
        (expected + labels.norm()).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert relative(state["images"], images.detach()) < 1e-6
        assert relative(state["labels"], labels.detach()) < 1e-6
    assert history[-1][0] < 0.99 * history[0][0]


def test_translator(data):
    """One set of weights for all sizes; batch norm by the set at hand; gray as three channels."""
    translator = tf.Translator().eval()
    for images in (torch.randn(4, *shape) for shape in ((3, 16, 16), (3, 32, 32), (1, 28, 28))):
        x = images.expand(-1, 3, -1, -1)
        for layer in translator.layers[0:9:3]:
            x = F.batch_norm(layer(x), None, None, training=True).clamp_min(0)
        x = translator.layers[9](x)
        x = x if images.shape[1] == 3 else x.mean(1, keepdim=True)
        assert relative(translator(images), x) < 1e-10


def test_losses_of_the_translator(data, tmp_path, monkeypatch):
    """Adaptation, pre-training on cached subsets, auto-encoder; new networks each time."""
    monkeypatch.setattr(tf, "krr", partial(tf.krr, ridge=1e-3))
    history, networks = plain.record_steps(monkeypatch), set()
    passed, seen = [], []

    def note(_, net, images, labels, source, args, *key):
        (before,), translated = passed.pop()
        assert images is translated
        real, numbers = source.batch(12, *key, "real")
        rest = labels, real, tf.center_labels(numbers, labels.shape[1]), 1e-3, True
        expected = plain.nfr_by_hand(net, images, *rest).item()
        seen.append((before, find(real, data.train), numbers, expected))
        networks.add(mtt.flatten(net)[0].item())

    spy(monkeypatch, tf, "random_network_loss", note)
    args = tf.Args(batch_real=12, subsets=9, max_images=12, max_synthetic=7, batch=2)
    args.min_classes, args.iterations, args.data_dir = 2, 1, str(tmp_path)
    subsets = [tf.cached_subset(data, n, args) for n in range(9)]
    sizes = set()
    for subset, images, labels in subsets:
        index, classes = find(subset.train, data.train), len(subset.classes)
        kinds = data.train_labels[index].view(classes, -1).unique(dim=1)
        assert kinds.shape == (classes, 1) and len(kinds.unique()) == classes
        assert subset.classes == [data.classes[c] for c in kinds]
        assert len(index.unique()) == len(index) <= 12 and len(labels) <= 7
        near = (images[:, None] - subset.train).abs().flatten(2).amax(2) < 2e-3
        assert near.sum(1).eq(1).all() and near.sum(0).le(1).all()
        assert torch.equal(subset.train_labels[near.int().argmax(1)], labels.argmax(1))
        sizes.add((classes, len(labels) // classes))
    assert {classes for classes, _ in sizes} == {2, 3} and len({ipc for _, ipc in sizes}) > 1
    parts = tf.Translator(), tf.build_network(data)
    parts[0].register_forward_hook(lambda _, inputs, output: passed.append((inputs, output)))
    images, labels = tf.start_synthetic(data, args, "start")
    for step in range(5):
        loss = tf.adaptation_loss(*parts, images, labels, data, args, step).item()
        used, index, numbers, expected = seen.pop()
        assert used is images and loss == pytest.approx(expected, rel=1e-8)
        assert torch.equal(numbers, data.train_labels[index])
    history.clear()
    from_cache = partial(tf.pretraining_loss, *parts, data, args)
    tf.train(parts[0], from_cache, 5, 1e-3, data, args, tmp_path / "t.pt", 2)
    for (loss, _), *pair in zip(history, seen[::2], seen[1::2], strict=True):
        assert loss == pytest.approx((pair[0][3] + pair[1][3]) / 2, rel=1e-8)
        for images, index, numbers, _ in pair:
            (subset,) = [s for s, cached, _ in subsets if torch.equal(cached, images)]
            within = find(data.train[index], subset.train)
            assert torch.equal(subset.train_labels[within], numbers)
    assert len(networks) == 15
    images = data.batch(128, 0, "auto-encoder", 0)[0]
    error = (parts[0](images) - images).square().mean().item()
    assert tf.reconstruction_loss(parts[0], data, args, 0).item() == pytest.approx(error)


def test_interrupted_subset(data, tmp_path, monkeypatch):
    """A run with another rate of the pre-training continues the subset that one left."""
    args = tf.Args(iterations=2, min_classes=2, max_images=12, max_synthetic=6)
    args.data_dir = str(tmp_path / "whole")
    _, expected, _ = tf.cached_subset(data, 0, args)
    args = replace(args, data_dir=str(tmp_path), lr_pretrain=1.0, subsets=3)
    step = common.Run.step

    def interrupted(run, it, loss):
        run.saved = 0
        step(run, it, loss)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "step", interrupted)
        pytest.raises(KeyboardInterrupt, tf.cached_subset, data, 0, replace(args, subsets=5))
    assert len(list(tmp_path.glob("subsets/*/*.ckpt"))) == 1
    assert torch.equal(tf.cached_subset(data, 0, args)[1], expected)


def test_down_sample(data):
    """Four times as many images, means of 2x2 pixels, enlarged when used."""
    args = tf.Args(down_sample=True)
    images, labels = tf.start_synthetic(data, args, "start")
    real, numbers = data.sample(4, "start")
    assert torch.equal(images, F.avg_pool2d(real, 2)) and torch.equal(labels.argmax(1), numbers)
    decoded, soft = tf.decode({"images": images, "labels": labels, "shape": [3, 16, 16]})
    assert decoded.shape == (1, 12, 3, 16, 16) and torch.equal(soft, labels)
    assert relative(F.avg_pool2d(decoded[0], 2), images) < 0.5


def test_adapted_translator(data, tmp_path):
    """What is stored is the translated set; an adapted translator serves another budget."""
    args = tf.Args(mode="scratch", iterations=2, adapt_steps=2, batch_real=12, lr_adapt=0.01)
    tf.distill(data, args, tmp_path / "a.pt")
    args.mode, args.ipc, args.translator = "no-adaptation", 2, str(tmp_path / "a_adapted.pt")
    tf.distill(data, args, tmp_path / "b.pt")
    translator = tf.build_translator(data, args)
    for name in "ab":
        images = common.load(tmp_path / f"{name}.ckpt", "")["state"]["images"]
        stored = common.load(tmp_path / f"{name}.pt", "")["images"]
        assert relative(stored, translator(images).detach()) < 1e-10
    scratch = tf.build_translator(data, tf.Args(mode="scratch"))
    assert (mtt.flatten(translator) - mtt.flatten(scratch)).abs().max() > 0.01
