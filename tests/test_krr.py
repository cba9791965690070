"""frepo.py and translator_fewshot.py: the ridge regression, LAMB, the pool, the translator, against plain references."""
import copy
import math
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_folder
from torch import nn

import common
import frepo
import translator_fewshot as tf


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def data(small_data):
    small_data.preprocess = types.SimpleNamespace(fingerprint="noise", kind="standardise", whiten=None,
                                                  mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    return small_data


def narrow(monkeypatch, width=4):
    """FRePo's network with few channels, and small steps of everything."""
    class Narrow(common.FRePoNet):
        def __init__(self, shape, classes, norm=False):
            super().__init__(shape, classes, norm, width)
    monkeypatch.setattr(common, "FRePoNet", Narrow)


# ------------------------------------------------------------------------------------------ ridge regression

@pytest.mark.parametrize("n, width, ridge", [(7, 20, 1e-6), (30, 8, 1e-2), (12, 12, 1e-1)])
def test_krr_equals_a_direct_solution(n, width, ridge):
    support, labels, target = drawn(n, width), drawn(n, 3, seed=1), drawn(9, width, seed=2)
    kernel = support @ support.T
    regular = kernel + ridge * kernel.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    expected = target @ support.T @ torch.linalg.solve(regular, labels)
    torch.testing.assert_close(common.krr(support, labels, target, ridge), expected, rtol=1e-6, atol=1e-8)
    # the same thing in primal form: (F^T F + l I) w = F^T y
    strength = ridge * kernel.diagonal().mean()
    primal = torch.linalg.solve(support.T @ support + strength * torch.eye(width, dtype=torch.float64), support.T @ labels)
    torch.testing.assert_close(common.krr(support, labels, target, ridge), target @ primal, rtol=1e-6, atol=1e-6)


def test_krr_in_float32_is_solved_in_float64():
    """2 * 50 images, lambda below float32's rounding of the kernel matrix: float32 throughout would be far off."""
    support = drawn(100, 4000).float() + 3
    labels, target = drawn(100, 10, seed=1).float(), drawn(50, 4000, seed=2).float() + 3
    kernel = support.double() @ support.double().T
    regular = kernel + 1e-6 * kernel.diagonal().mean() * torch.eye(100, dtype=torch.float64)
    expected = target.double() @ support.double().T @ torch.linalg.solve(regular, labels.double())
    found = common.krr(support, labels, target)
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_krr_passes_gradcheck():
    inputs = [drawn(4, 6), drawn(4, 3, seed=1), drawn(5, 6, seed=2)]
    assert torch.autograd.gradcheck(lambda *x: common.krr(*x, ridge=1e-2), [x.requires_grad_() for x in inputs])
    assert torch.autograd.gradgradcheck(lambda *x: common.krr(*x, ridge=1e-2), inputs)


def test_prediction_on_the_synthetic_images_tends_to_their_labels():
    support, labels = drawn(6, 20), drawn(6, 3, seed=1)
    far = [(common.krr(support, labels, support, ridge) - labels).norm().item() for ridge in (1e-1, 1e-3, 1e-5, 1e-9)]
    assert far == sorted(far, reverse=True) and far[-1] < 1e-7


def test_a_matrix_that_is_not_positive_definite_ends_with_a_clear_error():
    with pytest.raises(common.UserError, match="not positive definite"):
        common.krr(torch.ones(3, 5), torch.ones(3, 2), torch.ones(2, 5), ridge=0)
    with pytest.raises(common.UserError, match="not positive definite"):
        common.krr(torch.full((3, 5), torch.nan), torch.ones(3, 2), torch.ones(2, 5))


def test_nfr_loss_is_half_the_mean_squared_error_summed_over_classes():
    support, labels, target, wanted = drawn(5, 9), drawn(5, 3, seed=1), drawn(4, 9, seed=2), drawn(4, 3, seed=3)
    predicted = common.krr(support, labels, target, 1e-3)
    expected = sum(sum((predicted[i, c] - wanted[i, c]) ** 2 for c in range(3)) for i in range(4)) / 2 / 4
    torch.testing.assert_close(common.nfr_loss(support, labels, target, wanted, 1e-3), expected)


def test_proposition_1():
    """Translator, Prop. 1, for linear maps: each space's solution from a set that fits it without error, and the one
    from the other, without the target set: w* = pinv(theta*) theta w (Eq. 8)."""
    n, d, wide, wider, classes = 30, 5, 6, 7, 3
    theta, theta_star = drawn(d, wide, seed=1), drawn(d, wider, seed=2)
    for target_set in (0, 10):  # the relation between the two solutions is the same for every target set
        real = drawn(n, d, seed=target_set)
        real_labels = real @ drawn(d, classes, seed=target_set + 3)  # a linear relation: the error can be 0

        def solution(space, seed):
            """w* = f^T (f f^T)^-1 y in `space`, of a synthetic set that fits the target set there without error."""
            images = drawn(d, d, seed=seed)
            labels = images @ torch.linalg.pinv(real) @ real_labels
            w = common.krr(images @ space, labels, torch.eye(space.shape[1], dtype=torch.float64), 1e-13)
            assert (real @ space @ w - real_labels).abs().max() < 1e-8  # the premise
            return w

        w, w_star = solution(theta, target_set + 4), solution(theta_star, target_set + 5)
        torch.testing.assert_close(w_star, torch.linalg.pinv(theta_star) @ theta @ w, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------ FRePo

def test_lamb_makes_the_steps_computed_by_hand():
    p = nn.Parameter(torch.tensor([3., 4.], dtype=torch.float64))
    lamb = frepo.Lamb([p], lr=0.1)
    gradients, value, m, v = [[1., -2.], [.5, 3.], [-1., 0.]], [3., 4.], [0., 0.], [0., 0.]
    for step, gradient in enumerate(gradients, 1):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        lamb.step()
        m = [.9 * a + .1 * g for a, g in zip(m, gradient)]
        v = [.999 * a + .001 * g * g for a, g in zip(v, gradient)]
        update = [a / (1 - .9 ** step) / (math.sqrt(b / (1 - .999 ** step)) + 1e-6) for a, b in zip(m, v)]
        trust = math.hypot(*value) / math.hypot(*update)
        value = [x - .1 * trust * u for x, u in zip(value, update)]
        assert p.tolist() == pytest.approx(value, rel=1e-12)
    q = nn.Parameter(torch.zeros(2))  # nothing to scale by: Adam's step
    q.grad = torch.tensor([1., -1.])
    frepo.Lamb([q], lr=0.1).step()
    assert q.tolist() == pytest.approx([-.1, .1], rel=1e-4)


def test_margin_loss_is_its_definition():
    labels = torch.tensor([[.9, -.1, -.1, -.1], [.3, .2, .0, .0], [.5, .5, .1, .0]])
    expected = -np.mean([min(.9 + .1, 1 / 4), min(.3 - .2, 1 / 4), 0])
    assert frepo.margin_loss(labels).item() == pytest.approx(expected, abs=1e-6)


def test_frepo_network():
    """Widths double at each pool; batch norm stands between the blocks of the pool's network and nowhere else."""
    net = common.FRePoNet((3, 32, 32), 10)
    assert [p.shape[0] for p in net.parameters() if p.ndim == 4] == [128, 256, 512]
    assert sum(p.numel() for p in net.parameters()) == (27 * 128 + 128) + (1152 * 256 + 256) + (2304 * 512 + 512) + 81930
    assert not common.mixes_images(net)
    pool = common.FRePoNet((3, 32, 32), 10, norm=True)
    kinds = [type(layer).__name__ for layer in pool.blocks]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "AvgPool"] * 2 + ["Conv2d", "ReLU", "AvgPool"]
    common.start_anew(net, "somewhere")
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(layer.weight[0].numel() ** -.5, rel=.05)
    assert net.features(torch.randn(2, 3, 32, 32)).shape == (2, 8192)
    assert common.FRePoNet((1, 28, 28), 10).features(torch.randn(2, 1, 28, 28)).shape == (2, 8192)


def test_batch_norm_of_the_pool_is_that_of_the_whole_batch(exact):
    """40 images are more than a chunk on a CPU: with batch norm they must not be split."""
    net, images = common.FRePoNet((3, 16, 16), 3, norm=True), torch.randn(40, 3, 16, 16)
    torch.testing.assert_close(common.features(net, images), net.features(images))


def test_frepo_iteration_is_the_paper(data, tmp_path, monkeypatch, exact):
    """One iteration against the definition: mirror images, Eq. (17) by torch.linalg, the hinge, LAMB's first step; then
    the drawn network has made one step of Adam on the squared error."""
    narrow(monkeypatch)
    settings = frepo.ROW | dict(iterations=1, pool=2, batch_real=30, lr=.1)
    kept, gradients, step = {}, [], frepo.Lamb.step
    monkeypatch.setattr(frepo.Lamb, "step", lambda lamb: gradients.extend(
        p.grad.clone() for p in lamb.param_groups[0]["params"]) or step(lamb))
    monkeypatch.setattr(common, "iterations", lambda total, path, same, state, watch: kept.update(state) or watch.update(
        seconds=0) or range(total))
    tensors, _ = frepo.distill(data, 1, settings, 0, tmp_path / "x")

    k = common.hash_int((0, "member", 0)) % 2
    net = common.start_anew(common.FRePoNet(data.shape, 3, norm=True), 0, "pool", k)
    images, numbers = data.random_real(1, 0, "images")
    labels = ((F.one_hot(numbers, 3) - 1 / 3) / math.sqrt(3 / 10)).requires_grad_()
    images.requires_grad_()
    index = torch.randint(60, (30,), generator=common.rng(0, "real", 0))
    support = net.features(torch.cat([images, images.flip(3)])).double()
    twice, real = torch.cat([labels, labels]).double(), net.features(data.train[index]).detach().double()
    kernel = support @ support.T
    kernel = kernel + 1e-6 * kernel.trace() / 6 * torch.eye(6)
    predicted = real @ support.T @ torch.linalg.inv(kernel) @ twice
    loss = (predicted - F.one_hot(data.train_labels[index], 3) + 1 / 3).square().sum(1).mean() / 2
    top = labels.sort(1, descending=True).values
    (loss - (top[:, 0] - top[:, 1]).clamp(max=1 / 3).mean()).backward()
    for found, p in zip(gradients, (images, labels)):
        assert (found - p.grad).norm() < 1e-3 * p.grad.norm()
    for found, p in ((tensors["images"], images), (tensors["labels"], labels)):
        update = p.grad / (p.grad.abs() + 1e-6)  # Adam's first
        expected = (p - .1 * p.norm() / update.norm() * update).detach()
        sure = p.grad.abs() > 1e-4 * p.grad.abs().max()  # the update is a sign: not where the gradient is rounding
        torch.testing.assert_close(found[sure], expected[sure], rtol=2e-3, atol=2e-3)
    for p in net.parameters():
        p.grad = None
    (.5 * (net(tensors["images"]) - tensors["labels"]).square().sum(1).mean()).backward()
    torch.optim.Adam(net.parameters(), lr=3e-4).step()
    for found, p in zip(kept["pool"][k].parameters(), net.parameters()):
        torch.testing.assert_close(found, p, rtol=1e-3, atol=1e-5)
    assert kept["ages"].tolist() == [0 + (k == 0), 50 + (k == 1)]


def test_networks_of_the_pool_are_thrown_away_at_their_age(data, tmp_path, monkeypatch):
    narrow(monkeypatch)
    thrown, renew = [], frepo.renew
    monkeypatch.setattr(frepo, "renew", lambda net, adam, *key: thrown.append(key[-1]) or renew(net, adam, *key))
    frepo.distill(data, 1, frepo.ROW | dict(iterations=20, pool=2, max_age=4, batch_real=10), 0, tmp_path / "x")
    ages, expected = [0, 2], []
    for it in range(20):
        k = common.hash_int((0, "member", it)) % 2
        ages[k] += 1
        if ages[k] == 4:
            ages[k] = 0
            expected.append(it)
    assert thrown == expected and len(thrown) > 3


def test_a_renewed_network_is_new(data):
    nets = nn.ModuleList(common.FRePoNet(data.shape, 3, norm=True, width=4) for _ in range(2))
    adam = torch.optim.Adam(nets.parameters(), lr=.01)
    for _ in range(2):
        for net in nets:
            frepo.pool_step(net, adam, data.train[:6], common.centre_labels(data.train_labels[:6], 3))
    other = common.flat_parameters(nets[1]).clone()
    frepo.renew(nets[0], adam, "key")
    fresh = common.start_anew(common.FRePoNet(data.shape, 3, norm=True, width=4), "key")
    assert torch.equal(common.flat_parameters(nets[0]), common.flat_parameters(fresh))
    assert not any(p in adam.state for p in nets[0].parameters()) and all(p in adam.state for p in nets[1].parameters())
    frepo.pool_step(nets[0], adam, data.train[:6], common.centre_labels(data.train_labels[:6], 3))
    assert torch.equal(common.flat_parameters(nets[1]), other)


def test_frepos_rate_falls_by_a_cosine(data, tmp_path, monkeypatch):
    narrow(monkeypatch)
    rates, step = [], frepo.Lamb.step
    monkeypatch.setattr(frepo.Lamb, "step", lambda lamb: rates.append(lamb.param_groups[0]["lr"]) or step(lamb))
    frepo.distill(data, 1, frepo.ROW | dict(iterations=10, pool=1, batch_real=10, lr=.5), 0, tmp_path / "x")
    assert rates == pytest.approx([.5 * (.1 + .9 * (1 + math.cos(math.pi * it / 10)) / 2) for it in range(10)])


class Killed(BaseException):
    pass


def test_frepo_goes_on_bit_for_bit(data, tmp_path, monkeypatch):
    narrow(monkeypatch)
    settings = frepo.ROW | dict(iterations=12, pool=2, max_age=3, batch_real=10, lr=.01)
    whole, _ = frepo.distill(data, 2, settings, 0, tmp_path / "whole")
    real, saves = common.iterations, []

    def often(*args):
        return real(*args, every=0)

    def dying(content, path):
        save(content, path)
        saves.append(path)
        if len(saves) == 7:
            raise Killed
    save = common.save
    monkeypatch.setattr(common, "iterations", often)
    monkeypatch.setattr(common, "save", dying)
    with pytest.raises(Killed):
        frepo.distill(data, 2, settings, 0, tmp_path / "part")
    going_on, _ = frepo.distill(data, 2, settings, 0, tmp_path / "part")
    assert all(torch.equal(whole[name], going_on[name]) for name in whole)
    start = common.centre_labels(torch.arange(3).repeat_interleave(2), 3)
    assert (whole["labels"] - start).abs().max() > 1e-3  # labels have moved
    report = frepo.label_report(whole["labels"], 2)
    assert report["labels_moved"] > 1e-4 and report["labels_kept"] == 1


def test_frepos_rate_when_scoring():
    """Adam 3e-4, 500 steps of warm-up, cosine to 1 %; epochs by the number of images."""
    protocol = common.frepo_protocol(100)
    rates = [common.learning_rate(protocol, 3e-4, epoch, 2000) for epoch in range(2000)]
    assert rates[:500] == pytest.approx([3e-4 * (i + 1) / 500 for i in range(500)])
    assert rates[1250] == pytest.approx(3e-4 * (.01 + .99 / 2), rel=1e-6) and rates[-1] == pytest.approx(3e-6, rel=.01)
    assert [common.frepo_protocol(n)["epochs"] for n in (10, 100, 200, 500, 1000)] == [1000, 2000, 20000, 5000, 5000]
    assert common.frepo_protocol(10)["network"](( 3, 32, 32), 10).kind == "frepo-convnet"


def test_whitening_after_standardising(tmp_path):
    """The covariance of whitened images is s / (s + 0.1 mean(s)) in the eigenbasis of the standardised ones, and the
    way back gives the pixels."""
    pixels = (drawn(200, 3, 4, 4).cumsum(3) * 30 + 120).clamp(0, 255).byte()
    found = common.Preprocess.fit("noise", pixels, "trace", tmp_path)
    assert found.kind == "zca-trace" and found.fingerprint.startswith("zca-trace-")
    x = pixels.double() / 255
    x = ((x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)).flatten(1)
    s, u = np.linalg.eigh(np.cov(x.T.numpy()))
    white = found(pixels).flatten(1).double()
    in_basis = u.T @ np.cov(white.T.numpy()) @ u
    np.testing.assert_allclose(in_basis, np.diag(s / (s + .1 * s.mean())), atol=2e-5)
    np.testing.assert_allclose(found.undo(found(pixels)), pixels / 255, atol=1e-5)


# ------------------------------------------------------------------------------------------ the translator

@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_the_same_translator_serves_all_sizes(shape):
    translator = common.seeded("translator", tf.Translator, 8)
    translated = translator(drawn(4, *shape).float())
    assert translated.shape == (4, *shape) and translated.std() > 0
    if shape[0] == 1:
        images = drawn(4, *shape).float()
        torch.testing.assert_close(translator(images), translator(images.repeat(1, 3, 1, 1)).mean(1, keepdim=True))
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in translator.modules()) == 3


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_bilevel_gradient_equals_naive_autograd(steps):
    """Alg. 1 with the whole graph kept, in float64, the ridge regression by torch.linalg.inv."""
    nets = [common.FRePoNet((3, 8, 8), 3, width=4).double() for _ in range(2)]
    net, theta = nets
    theta.requires_grad_(False)
    images, labels = drawn(3, 3, 8, 8), drawn(3, 3, seed=1)
    real, real_labels = drawn(10, 3, 8, 8, seed=2), F.one_hot(torch.arange(10) % 3, 3).double() - 1 / 3
    settings = dict(inner_steps=steps, lr_inner=.5, ridge=1e-3)

    def features(net, x):
        return net.blocks(x).flatten(1)

    def loss_of(net, x, y):
        f = features(net, x)
        kernel = f @ f.T
        inverse = torch.linalg.inv(kernel + 1e-3 * kernel.trace() / 3 * torch.eye(3, dtype=torch.float64))
        return (features(net, real) @ f.T @ inverse @ y - real_labels).square().sum() / 2 / 10

    x, y = images.clone().requires_grad_(), labels.clone().requires_grad_()
    for _ in range(steps):
        gx, gy = torch.autograd.grad(loss_of(net, x, y), (x, y), create_graph=True)
        x, y = x - .5 * gx, y - .5 * gy
    loss = loss_of(theta, x, y)
    expected = torch.autograd.grad(loss, list(net.blocks.parameters()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "features", lambda net, images: net.features(images).detach())
        found = tf.bilevel_gradient(net, theta, images, labels, real, real_labels, settings, 8)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-10, atol=0)
    for p, gradient in zip(net.blocks.parameters(), expected):
        assert (p.grad - gradient).norm() <= 1e-8 * gradient.norm()
    tf.bilevel_gradient(net, theta, images, labels, real, real_labels, settings, 8)  # adds to .grad
    assert (next(net.blocks.parameters()).grad - 2 * expected[0]).norm() <= 1e-6 * expected[0].norm()


def test_distilling_in_one_network_lowers_its_loss(data, exact):
    net = tf.one_network(data)
    settings = tf.PAPER | dict(steps=30, lr=.01)
    images, labels = tf.start_synthetic(data, 1, settings, 0)
    real, wanted = common.features(net, data.train), common.targets(data.train_labels, 3)

    def loss(x, y):
        return common.nfr_loss(tf.embed(net, x, 16), y, real, wanted).item()
    after = tf.distil_in_one_network(net, images, labels, real, wanted, settings, 16, (0,))[:2]
    assert loss(*after) < .7 * loss(images, labels)
    assert not torch.equal(after[1], labels)


def test_one_network_is_one_network(data):
    """theta depends on the shape of images alone: the cache of one data set serves another's."""
    other = copy.copy(data)
    other.classes = ["a", "b", "c", "d"]
    for p, q in zip(tf.one_network(data).blocks.parameters(), tf.one_network(other).blocks.parameters()):
        assert torch.equal(p, q)


def test_subsets(data):
    settings = tf.PAPER | dict(max_classes=3, min_classes=2, max_images=12, max_synthetic=6)
    seen = set()
    for n in range(30):
        classes, index, k, ipc = tf.draw_subset(*common.class_members(data), settings, n, 0)
        assert len(set(classes.tolist())) == len(classes) in (2, 3)
        assert len(index) == k * len(classes) <= 12 and 1 <= ipc and ipc * len(classes) <= 6
        assert len(set(index.tolist())) == len(index)
        assert torch.equal(data.train_labels[index], classes.repeat_interleave(k))
        seen.add((len(classes), ipc))
    assert len(seen) > 3


def test_pre_training_is_algorithm_2(data, tmp_path, monkeypatch, exact):
    """Line 15's gradient of one step on two cached subsets, against lines 11 to 14 written with torch.linalg."""
    narrow(monkeypatch)
    settings = tf.PAPER | dict(max_classes=3, min_classes=2, max_images=12, max_synthetic=6, steps=2, subsets=2, batch=2,
                               pretrain_steps=1, batch_real=12)
    net, gradients, step = tf.one_network(data), [], torch.optim.Adam.step
    paths = tf.cache_subsets(net, data, tmp_path, settings, 0)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: gradients.extend(
        p.grad.clone() for p in adam.param_groups[0]["params"]) or step(adam))
    tf.pretrain(net, data, paths, settings, 0, tmp_path / "x", {})

    translator = common.seeded((0, "translator"), tf.Translator)
    theta, loss = common.start_anew(copy.deepcopy(net), 0, "theta'", 0), 0
    for b in range(2):
        cached = common.load(paths[common.hash_int((0, "cached", 0, b)) % 2], "")
        some = cached["index"][torch.randint(len(cached["index"]), (len(cached["index"]),),
                                             generator=common.rng(0, "real", 0, b))]
        kinds = data.train_labels[cached["index"]].unique_consecutive().tolist()  # the subset's classes in its order
        wanted = torch.tensor([[float(kind == label) - 1 / len(kinds) for kind in kinds]
                               for label in data.train_labels[some].tolist()])
        f = theta.features(translator(cached["images"])).double()
        kernel = f @ f.T
        kernel = kernel + 1e-6 * kernel.trace() / len(f) * torch.eye(len(f))
        predicted = theta.features(data.train[some]).double() @ f.T @ torch.linalg.inv(kernel) @ cached["labels"].double()
        loss = loss + (predicted - wanted).square().sum(1).mean() / 2 / 2
    expected = torch.autograd.grad(loss, list(translator.parameters()))
    for found, gradient in zip(gradients, expected):  # a bias before a batch norm has none
        assert (found - gradient).norm() < 1e-2 * gradient.norm() + 1e-3 * max(g.norm() for g in expected)


def test_cached_subsets_are_distilled_from_two_views_of_their_images(data, tmp_path, monkeypatch):
    settings = tf.PAPER | dict(max_classes=2, min_classes=2, max_images=8, max_synthetic=4, steps=1, subsets=1)
    seen, features = [], common.features
    monkeypatch.setattr(common, "features", lambda net, images: seen.append(images) or features(net, images))
    tf.cache_subsets(tf.one_network(data), data, tmp_path, settings, 0)
    plain, augmented = seen[0].chunk(2)
    _, index, *_ = tf.draw_subset(*common.class_members(data), settings, 0, 0)
    assert torch.equal(plain, data.train[index]) and not torch.equal(plain, augmented)


def test_adaptation(data, tmp_path, monkeypatch):
    """Every step has a network of its own and takes the budgets in turn; the loss in fresh networks falls."""
    settings = tf.PAPER | dict(steps=5, adapt_steps=30, lr_adapt=1e-3, batch_real=60)
    net, translator = tf.one_network(data), common.seeded("translator", tf.Translator, 8)
    distilled = [tf.start_synthetic(data, ipc, settings, 0) for ipc in (1, 2)]
    fresh = [common.start_anew(tf.one_network(data), "fresh", i) for i in range(3)]

    def loss():
        return sum(tf.translation_loss(translator, theta, *distilled[0], data.train, common.targets(data.train_labels, 3),
                                       settings, 16).item() for theta in fresh)
    before, keys, sizes = loss(), [], []
    anew, translation_loss = common.start_anew, tf.translation_loss
    monkeypatch.setattr(common, "start_anew", lambda net, *key: keys.append(key) or anew(net, *key))
    monkeypatch.setattr(tf, "translation_loss", lambda t, n, images, *rest: sizes.append(len(images)) or
                        translation_loss(t, n, images, *rest))
    tf.adapt(translator, net, data, distilled, settings, 0, tmp_path / "x")
    assert len(set(keys)) == 30 and sizes == [3, 6] * 15
    monkeypatch.undo()
    assert loss() < .9 * before


def test_the_distillation_space_is_learned(data, tmp_path, monkeypatch):
    narrow(monkeypatch)
    net = tf.one_network(data)
    before = common.flat_parameters(net)
    tf.learn_distillation_space(net, data, 1, tf.PAPER | dict(outer_steps=2, inner_steps=2, batch_real=20), 0, tmp_path / "x")
    moved = (common.flat_parameters(net) - before).abs()
    assert 1e-4 < moved.max() < 3e-4  # two steps of Adam at 1e-4
    assert common.load(tmp_path / "x", "")["iteration"] == 2


def test_down_sampled_storage(data):
    images, labels = tf.start_synthetic(data, 1, tf.PAPER | dict(down_sample=True), 0)
    assert images.shape == (12, 3, 8, 8) and labels.shape == (12, 3)
    distilled = {"images": images, "labels": labels, "settings": {"down_sample": True}, "shape": [3, 16, 16]}
    draw, count = tf.sampler(distilled, "cpu")
    assert count == 12 and draw(0, torch.arange(5))[0].shape == (5, 3, 16, 16)
    net = tf.one_network(data)
    torch.testing.assert_close(tf.embed(net, images, 16), net.features(draw(0, torch.arange(12))[0]))


# ------------------------------------------------------------------------------------------ the command line

SMALL = ["--size", "16", "--steps", "4", "--adapt-steps", "3", "--batch-real", "12", "--runs", "1", "--epochs", "2",
         "--subsets", "3", "--max-images", "12", "--max-synthetic", "6", "--batch", "2", "--pretrain-steps", "4",
         "--ae-steps", "3", "--outer-steps", "2"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    narrow(monkeypatch)
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "target")
    make_folder(tmp_path / "large", classes=("dog", "elk", "fox", "gnu"))
    return tmp_path


@pytest.mark.parametrize("mode", tf.MODES)
def test_modes(mode, folders, call):
    status, out, err = call(tf, "--dataset", "target", "--mode", mode, *SMALL,
                            *(["--pretrain-dir", "large"] if mode in ("adapted", "no-adaptation") else []))
    assert status == 0, err
    path = folders / "out" / f"translator_fewshot_{mode}_target_ipc1.pt"
    stored = common.load_distilled(path)
    assert stored["images"].shape == (3, 3, 16, 16) and stored["labels"].shape == (3, 3)
    assert stored["settings"]["mode"] == mode and stored["network"] == "frepo-convnet2"
    assert stored["stored_per_class"] == 3 * 16 * 16
    import evaluate
    score = out.split("1 a class: ")[1].split(" ")[0]
    status, out, err = call(evaluate, path, "--dataset", "target", "--runs", "1", "--epochs", "2")
    assert status == 0 and score in out, err


@pytest.mark.parametrize("size, grey", [(28, True), (32, False)])
def test_grey_and_down_sampled(size, grey, folders, call):
    """28x28 grey digits with a translator that is trained on colour, and storage at half the side."""
    make_folder(folders / "small", size=size, grey=grey)
    more = [arg if arg != "16" else str(size) for arg in SMALL]
    status, _, err = call(tf, "--dataset", "small", "--pretrain-dir", "large", "--down-sample", *more)
    assert status == 0, err
    stored = common.load_distilled(folders / "out" / "translator_fewshot_adapted_ds_small_ipc1.pt")
    assert stored["images"].shape == (12, 1 if grey else 3, size // 2, size // 2)
    assert stored["stored_per_class"] == (1 if grey else 3) * size ** 2
    assert stored["settings"]["pretrained_on"] == "large"


def test_cache_and_pre_training_go_on(folders, call, monkeypatch):
    """Killed after each of its files and started again: the bytes of an unbroken run; subsets are not made twice."""
    command = ["--dataset", "target", "--pretrain-dir", "large", "--ipc", "1", "2", *SMALL]
    assert call(tf, *command, "--data-dir", "whole", "--out", "whole-out")[0] == 0
    save, real, written = common.save, common.iterations, []
    monkeypatch.setattr(common, "iterations", lambda *args: real(*args, every=0))

    def dying(content, path):
        save(content, path)
        written.append(str(path))
        if path.suffix == ".ckpt" or written.count(str(path)) == 1:  # a finished file is written again
            raise Killed
    monkeypatch.setattr(common, "save", dying)
    for _ in range(60):
        try:
            assert call(tf, *command, "--data-dir", "part", "--out", "part-out")[0] == 0
            break
        except Killed:
            continue
    subsets = [path for path in written if "subset0" in path]
    assert len(subsets) == len(set(subsets)) == 3 and len(written) > 20
    for name in ("translator_fewshot_adapted_target_ipc1.pt", "translator_fewshot_adapted_target_ipc2.pt"):
        whole, part = (common.load_distilled(folders / out / name) for out in ("whole-out", "part-out"))
        assert torch.equal(whole["images"], part["images"]) and torch.equal(whole["labels"], part["labels"])
    monkeypatch.setattr(common, "save", save)
    pretrained = next((folders / "part" / "translators").glob("large_translator_*.pt"))
    status, _, err = call(tf, *command, "--data-dir", "part", "--out", "other", "--translator", pretrained)
    assert status == 0, err  # the file is enough
    other = common.load_distilled(folders / "other" / "translator_fewshot_adapted_target_ipc1.pt")
    assert torch.equal(other["images"], common.load_distilled(
        folders / "whole-out" / "translator_fewshot_adapted_target_ipc1.pt")["images"])


@pytest.mark.parametrize("more, words", [
    ([], "give --pretrain-dir"),
    (["--mode", "bilevel", "--ipc", "1", "2"], "give one --ipc"),
    (["--mode", "one-net", "--ipc", "9"], "choose a number from 1"),
    (["--translator", "missing.pt"], "missing.pt does not exist"),
    (["--translator", "foreign.pt"], "is not a translator"),
    (["--pretrain-dir", "nowhere"], "unknown data set 'nowhere'"),
    (["--translator", "autoencoder.pt"], "does not fit --mode adapted"),
    (["--translator", "whitened.pt"], "does not fit --mode adapted"),
])
def test_bad_input_of_the_translator(more, words, folders, call):
    common.save({"format": "something else"}, folders / "foreign.pt")
    for name, method, kind in (("autoencoder", "autoencoder", "standardise-1"), ("whitened", "translator", "zca-trace-1")):
        common.save({"format": "translator 1", "weights": tf.Translator().state_dict(), "pretrained_on": "large",
                     "settings": {"method": method, "fingerprint": kind}}, folders / f"{name}.pt")
    status, _, err = call(tf, "--dataset", "target", *SMALL, *more)
    assert status == 2 and words in err and "Traceback" not in err


@pytest.mark.parametrize("more, words", [
    (["--ipc", "9"], "choose a number from 1"),
    (["--dataset", "nothing"], "unknown data set 'nothing'"),
    (["--lr", "1e30"], "finite"),
])
def test_bad_input_of_frepo(more, words, folders, call):
    status, _, err = call(frepo, "--dataset", "target", "--iterations", "5", "--batch-real", "8", "--runs", "1", *more)
    assert status == 2 and words in err and "Traceback" not in err


@pytest.mark.parametrize("command", [
    ["frepo.py", "--iterations", "2", "--batch-real", "16"],
    ["translator_fewshot.py", "--mode", "scratch", "--steps", "2", "--adapt-steps", "1", "--batch-real", "16"]])
def test_copied_alone_with_common(command, tmp_path):
    for name in (command[0], "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run([sys.executable, *command, "--runs", "1", "--epochs", "1"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
