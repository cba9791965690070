"""DM and KFS: the papers' claims as tests, storage, resuming, copies. Small networks and images, a few minutes."""
import functools
import itertools
import math
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

HERE = next(p for p in pathlib.Path(__file__).resolve().parents if (p / "kfs.py").exists())
sys.path.insert(0, str(HERE))
import common  # noqa: E402
import dm  # noqa: E402
import kfs  # noqa: E402


def toy(shape=(3, 16, 16), classes=3, per_class=(7, 7, 9)):
    """A Dataset of smooth random images, 3 classes of different means; nothing on disk."""
    g = common.rng("toy")
    labels = torch.arange(classes).repeat_interleave(torch.tensor(per_class))
    labels = labels[torch.randperm(len(labels), generator=g)]
    small = torch.rand(len(labels), shape[0], 4, 4, generator=g) + labels.view(-1, 1, 1, 1) / 5
    images = F.interpolate(small, shape[1:], mode="bilinear") - .6
    mean, std = torch.full((shape[0], 1, 1), .5), torch.full((shape[0], 1, 1), .25)
    preprocess = common.Preprocess("standardise", f"toy-{shape}-00000000", mean, std)
    return common.Dataset("toy", [str(c) for c in range(classes)], images, labels, images, labels, preprocess)


@functools.cache
def glyphs():
    return common.load_dataset("glyphs")


def settings_of(data, **more):
    small = dict(size=None, pretrain=20, codes=4, decoders=3, iterations=6)
    return kfs.PAPER | kfs.layout(data.shape, 1) | small | more


def small_net(data, *key):
    return common.start_anew(common.ConvNet(data.shape, len(data.classes), width=8), *key).requires_grad_(False)


def parts(data, seed=0, **more):
    """A network, its real means, codes and decoders as leaves, and a function for the gradient as one vector."""
    settings, net = settings_of(data, **more), small_net(data, seed)
    means = common.mean_features(net, data.train, data.train_labels, len(data.classes), half=False)
    codes, decoders = kfs.pretrain(data, settings, seed)
    leaves = [codes.requires_grad_(), *decoders.parameters()]

    def gradient(loss=None):
        if loss is not None:
            loss.backward()
        found = torch.cat([leaf.grad.flatten() for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
        return found

    return net, means, codes, decoders, gradient


def features_of(net, codes, decoders):
    """g(f(theta; phi)) of every class (C, M * D, F), with a graph."""
    return net.features(decoders(codes.flatten(0, 1)).flatten(0, 1)).unflatten(0, (len(codes), -1))


# ------------------------------------------------------------------------------------------ DM

@pytest.mark.parametrize("room", [0, 2, 64])
@pytest.mark.parametrize("augmented", [False, True])
def test_batched_dm_equals_the_sum_over_classes(augmented, room, monkeypatch):
    data = glyphs()
    net = common.start_anew(common.ConvNet(data.shape, 10), 1).requires_grad_(False)
    images, _ = data.random_real(9, 0)
    members, _ = common.class_members(data)
    real = data.train[common.draw_members(members, 20, 0)]
    draw = common.draw_dsa(1, 3) if augmented else None
    labels = torch.arange(10).repeat_interleave(20)
    means = common.mean_features(net, real, labels, 10, draw, half=False)
    match = common.match_means
    monkeypatch.setattr(common, "match_means", lambda *a, **k: match(*a, room=room, **k))
    loss, gradient = dm.matching_loss(net, means, images, draw)

    leaf, one_by_one = images.clone().requires_grad_(), 0
    augment = (lambda x: common.dsa(x, *draw)) if draw else (lambda x: x)
    for c in range(10):
        real_c, images_c = (net.features(augment(x)).mean(0) for x in (real[labels == c], leaf[9 * c:9 * (c + 1)]))
        one_by_one = one_by_one + (real_c - images_c).square().sum()
    one_by_one.backward()
    assert loss.item() == pytest.approx(one_by_one.item(), rel=1e-5)
    assert (gradient - leaf.grad).norm() < 1e-4 * leaf.grad.norm()


def test_half_precision_of_real_means_keeps_three_digits_of_the_loss():
    data = glyphs()
    net = common.start_anew(common.ConvNet(data.shape, 10), 1).requires_grad_(False)
    images, _ = data.random_real(2, 0)
    means = [common.mean_features(net, data.train[::4], data.train_labels[::4], 10, half=h) for h in (True, False)]
    losses = [dm.matching_loss(net, real, images)[0].item() for real in means]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_drawn_real_images_are_of_their_class_and_different():
    data = toy()
    members, smallest = common.class_members(data)
    assert smallest == 7
    seen = set()
    for it in range(60):
        index = common.draw_members(members, 7, it)
        assert data.train_labels[index].tolist() == [c for c in range(3) for _ in range(7)]
        assert len(set(index.tolist())) == 21
        seen |= set(index.tolist())
    assert len(seen) == 23


def test_random_networks_start_as_torch_starts_them():
    net = common.ConvNet((3, 32, 32), 10)
    again = common.start_anew(common.ConvNet((3, 32, 32), 10), 5)
    for (name, p), q in zip(net.named_parameters(), again.parameters()):
        if p.numel() < 100:  # the last bias: too few to compare
            continue
        assert p.std().item() == pytest.approx(q.std().item(), rel=.2, abs=1e-7), name
        assert p.abs().max().item() == pytest.approx(q.abs().max().item(), rel=.1), name
    same = common.start_anew(net, 5)
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), again.parameters()))


# ------------------------------------------------------------------------------------------ KFS: sizes

def test_decoder_has_738_parameters():
    one = kfs.Decoders(1, (12, 9, 6, 3), 2, (32, 32), [.5] * 3, [.5] * 3)
    assert sum(p.numel() for p in one.parameters()) == 738
    assert one(torch.zeros(2, 12, 4, 4)).shape == (2, 1, 3, 32, 32)


@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("relu", [False, True])
def test_one_grouped_call_equals_decoders_one_by_one(kernel, relu):
    torch.manual_seed(0)
    decoders = kfs.Decoders(3, (8, 6, 2), kernel, (15, 16), [.3, .4], [.2, .5], relu)
    codes, which = torch.randn(5, 8, 4, 4), torch.tensor([2, 0, 0, 1, 2])
    images = decoders(codes)
    for d in range(3):
        x = codes
        for i, (weight, bias) in enumerate(zip(decoders.weights, decoders.biases)):
            x = F.conv_transpose2d(x.relu() if i and relu else x, weight[d], bias[d], stride=2, padding=kernel // 2 - 1)
        x = (x[:, :, :15].sigmoid() - torch.tensor([.3, .4]).view(-1, 1, 1)) / torch.tensor([.2, .5]).view(-1, 1, 1)
        assert torch.allclose(images[:, d], x, atol=1e-5)
    assert torch.allclose(decoders.pairs(codes, which), images[torch.arange(5), which], atol=1e-5)
    assert torch.allclose(decoders(codes, torch.tensor([2, 1])), images[:, [2, 1]], atol=1e-5)


TABLES_1_AND_3 = [  # data set, side, classes, images a class; code, M, decoder, overhead as layout's docstring prints them
    ("svhn", 32, 10, 1, (12, 4, 4), 16, (9, 6), 2, 19.2), ("cifar10", 32, 10, 1, (12, 4, 4), 16, (9, 6), 2, 19.2),
    ("svhn", 32, 10, 10, (12, 8, 8), 40, (6,), 2, 1.0), ("cifar10", 32, 10, 10, (12, 8, 8), 40, (6,), 2, 1.0),
    ("svhn", 32, 10, 50, (12, 8, 8), 200, (6,), 2, .2), ("cifar10", 32, 10, 50, (12, 8, 8), 200, (6,), 2, .2),
    ("cifar100", 32, 100, 1, (12, 4, 4), 16, (9, 6), 2, 1.9), ("cifar100", 32, 100, 10, (12, 8, 8), 40, (6,), 2, .1),
    ("tinyimagenet", 64, 200, 1, (12, 8, 8), 16, (9, 6), 2, .2), ("tinyimagenet", 64, 200, 10, (12, 16, 16), 40, (6,), 2, 0),
    ("imagenet10", 224, 10, 1, (12, 28, 28), 16, (9, 6), 4, 1.5), ("imagenet10", 224, 10, 10, (12, 56, 56), 40, (6,), 4, .1)]


@pytest.mark.parametrize("name, side, classes, ipc, code, codes, channels, kernel, overhead", TABLES_1_AND_3)
def test_settings_of_tables_1_and_3(name, side, classes, ipc, code, codes, channels, kernel, overhead):
    shape = (3, side, side)
    row = kfs.settings_of(name, shape, ipc)
    assert (row["code"], row["codes"], row["channels"], row["kernel"], row["decoders"]) == (code, codes, channels, kernel, 8)
    assert codes * math.prod(code) <= ipc * math.prod(shape)  # "Param. / Class" of Table 1
    assert kfs.storage(row, shape, ipc, classes)["overhead_percent"] == pytest.approx(overhead, abs=.051)


@pytest.mark.parametrize("shape, ipc", [((1, 28, 28), 1), ((1, 28, 28), 10), ((3, 32, 32), 7), ((3, 40, 40), 3),
                                        ((3, 128, 128), 1)])
def test_other_shapes_stay_in_their_storage(shape, ipc):
    row = kfs.layout(shape, ipc)
    numbers = row["codes"] * math.prod(row["code"])
    assert ipc * math.prod(shape) - math.prod(row["code"]) < numbers <= ipc * math.prod(shape)


def test_reported_storage_is_the_count_of_numbers_in_the_file(tmp_path):
    data = toy()
    settings = settings_of(data)
    codes, decoders, seconds = kfs.distill(data, 1, settings | {"iterations": 1}, 0, tmp_path / "a.ckpt")
    tensors = {"codes": codes} | {f"decoders.{name}": p for name, p in decoders.named_parameters()}
    common.save_distilled(tmp_path / "a.pt", data, "kfs", 1, tensors, None, settings, seconds, 0)
    stored = common.load_distilled(tmp_path / "a.pt")
    count = sum(t.numel() for t in stored.values() if torch.is_tensor(t) and t.is_floating_point())
    assert kfs.storage(settings, data.shape, 1, 3)["numbers_per_class"] == pytest.approx(count / 3)
    assert stored["stored_per_class"] == pytest.approx(count / 3)

    draw, entries = kfs.sampler(stored, "cpu")  # decoded as used: entry = code x decoder
    images, labels = draw(0, torch.arange(entries))
    assert torch.allclose(images, decoders(codes.flatten(0, 1)).flatten(0, 1), atol=1e-5)
    assert labels.tolist() == [c for c in range(3) for _ in range(4 * 3)]


# ------------------------------------------------------------------------------------------ KFS: the theory

def test_loss_and_gradient_are_those_of_eq_1():
    net, means, codes, decoders, gradient = parts(toy())
    loss = kfs.matching_loss(net, means, codes, decoders, half=False)
    ours = gradient()
    printed = ((means - features_of(net, codes, decoders).mean(1)).square().sum(1) / 2).mean()
    assert loss.item() == pytest.approx(printed.item(), rel=1e-5)
    plain = gradient(printed)
    assert (ours - plain).norm() < 1e-4 * plain.norm()


def test_partial_backpropagation_is_unbiased_and_sampling_decoders_is_not():
    """Their mean over many draws against the full gradient: the squared distance of an unbiased mean of n draws is
    about trace(variance) / n; for the biased variant it stays far above."""
    net, means, codes, decoders, gradient = parts(toy())
    kfs.matching_loss(net, means, codes, decoders, half=False)
    full, n, ratio = gradient(), 300, {}
    for variant in ("backprop", "sample_decoders"):
        draws = []
        for i in range(n):
            how = (dict(chosen=kfs.random_order(codes.shape[:2], 1, variant, i, device="cpu")) if variant == "backprop"
                   else dict(which=kfs.random_order((3,), 1, variant, i, device="cpu")))
            kfs.matching_loss(net, means, codes, decoders, half=False, **how)
            draws.append(gradient())
        draws = torch.stack(draws).double()
        ratio[variant] = ((draws.mean(0) - full).square().sum() / (draws.var(0).sum() / n)).item()
    assert ratio["backprop"] < 3
    assert ratio["sample_decoders"] > 10


def test_partial_backpropagation_exactly_by_enumeration():
    net, means, codes, decoders, gradient = parts(toy())
    kfs.matching_loss(net, means, codes, decoders, half=False)
    full, subsets = gradient(), list(itertools.combinations(range(4), 2))
    for subset in subsets:
        kfs.matching_loss(net, means, codes, decoders, chosen=torch.tensor(subset).expand(3, 2), half=False)
    assert (gradient() / len(subsets) - full).norm() < 1e-4 * full.norm()


def test_bias_of_sampled_pairs_is_eq_2():
    """Every pair (m, d) once: the mean of the sampled gradients minus the full gradient is Eq. (2), and not zero."""
    net, means, codes, decoders, gradient = parts(toy())
    for m, d in itertools.product(range(4), range(3)):
        kfs.matching_loss(net, means, codes[:, m:m + 1], decoders, which=torch.tensor([d]), half=False)
    sampled = gradient() / 12
    kfs.matching_loss(net, means, codes, decoders, half=False)
    full = gradient()
    g = features_of(net, codes, decoders)
    eq_2 = gradient((g.square().sum(2).mean(1) - g.mean(1).square().sum(1)).mean() / 2)
    assert (sampled - full - eq_2).norm() < 1e-3 * eq_2.norm()
    assert eq_2.norm() > .1 * full.norm()


def test_variance_of_one_real_image_a_class_is_eq_3():
    """Every choice of one real image a class: the covariance of the gradient is Eq. (3), V_c from autograd."""
    data = toy(per_class=(3, 4, 3))
    net, _, codes, decoders, gradient = parts(data, codes=2, decoders=2)
    g = [net.features(data.train[data.train_labels == c]) for c in range(3)]                # g(x_cn), (N, F)
    found = []
    for choice in itertools.product(*(range(len(of_class)) for of_class in g)):
        real = torch.stack([of_class[n] for of_class, n in zip(g, choice)])
        kfs.matching_loss(net, real, codes, decoders, half=False)
        found.append(gradient())
    found = torch.stack(found).double()
    measured = (found - found.mean(0)).T @ (found - found.mean(0)) / len(found)

    printed, means = 0, features_of(net, codes, decoders).mean(1)
    for c in range(3):
        rows = []
        for value in means[c]:                                                              # V_c, (F, parameters)
            value.backward(retain_graph=True)
            rows.append(gradient())
        v, centred = torch.stack(rows).double(), (g[c] - g[c].mean(0)).double()
        printed = printed + v.T @ (centred.T @ centred / len(centred)) @ v / 3 ** 2         # Eq. (3)
    assert (measured - printed).norm() < 1e-3 * printed.norm()
    assert measured.trace().item() == pytest.approx(printed.trace().item(), rel=1e-3)


# ------------------------------------------------------------------------------------------ KFS: training

def test_decoders_differ_after_training_and_stay_equal_without_noise(tmp_path):
    data, far = toy(), {}
    for noise in (.1, 0.):
        settings = settings_of(data, noise=noise, iterations=15)
        start = kfs.diversity(*kfs.pretrain(data, settings, 0))["between_decoders"]
        codes, decoders, _ = kfs.distill(data, 1, settings, 0, tmp_path / f"{noise}.ckpt")
        far[noise] = start, kfs.diversity(codes, decoders)["between_decoders"]
    assert far[.1][1] > 1.2 * far[.1][0] > .01
    assert far[0.][1] < 1e-3


def test_fixed_decoders_stay_and_codes_learn(tmp_path):
    data = toy()
    settings = settings_of(data)
    _, decoders, _ = kfs.distill(data, 1, settings, 0, tmp_path / "phase0.ckpt")
    before = [p.clone() for p in decoders.parameters()]
    start, _ = kfs.pretrain(data, settings, 1, decoders)
    codes, after, _ = kfs.distill(data, 1, settings, 1, tmp_path / "phase1.ckpt", fixed=decoders)
    assert all(torch.equal(p, q) for p, q in zip(before, after.parameters()))
    assert (codes - start).abs().mean() > .1


def test_learning_rates_drop(tmp_path):
    data = toy()
    codes = [kfs.distill(data, 1, settings_of(data, drops=drops, iterations=3), 0, tmp_path / f"{len(drops)}.ckpt")[0]
             for drops in ((2,), (2, 2))]
    before = kfs.distill(data, 1, settings_of(data, drops=(2,), iterations=2), 0, tmp_path / "before.ckpt")[0]
    steps = [(c - before).norm().item() for c in codes]
    assert steps[0] == pytest.approx(5 * steps[1], rel=1e-3)


def test_stored_real_means_are_used_again(tmp_path, monkeypatch):
    data = toy()
    first = kfs.load_real_means(data, tmp_path, 2, False)
    files = sorted(tmp_path.rglob("network*.pt"))
    assert len(files) == 2
    monkeypatch.setattr(common, "mean_features", lambda *a, **k: pytest.fail("computed again"))
    second = kfs.load_real_means(data, tmp_path, 2, False)
    assert all(torch.equal(a, b) for a, b in zip(first[:2], second[:2])) and first[2] == (None, None)
    monkeypatch.undo()
    net = common.ConvNet(data.shape, 3)
    torch.nn.utils.vector_to_parameters(first[0][1], net.parameters())
    means = torch.stack([net.features(data.train[data.train_labels == c]).mean(0) for c in range(3)])
    assert (means - first[1][1]).norm() < 1e-2 * means.norm()  # bfloat16 in the stored ones
    files[0].write_bytes(b"broken")
    with pytest.raises(common.UserError, match="network00000.pt cannot be read"):
        kfs.load_real_means(data, tmp_path, 2, False)


VARIANTS = [{}, {"drops": (2, 4), "dsa": True, "relu": True}, {"backprop": 2}, {"sample_decoders": 1, "batch_real": 2},
            {"real_means": 2}, {"real_means": 2, "dsa": True}]


@pytest.mark.parametrize("more", VARIANTS, ids=str)
def test_kfs_goes_on_bit_for_bit(more, tmp_path):
    data = toy()
    settings = settings_of(data, **more)
    stored = kfs.load_real_means(data, tmp_path, 2, settings["dsa"]) if "real_means" in more else None
    whole = kfs.distill(data, 1, settings, 0, tmp_path / "whole.ckpt", stored)
    kfs.distill(data, 1, settings | {"iterations": 3}, 0, tmp_path / "parts.ckpt", stored)
    rest = kfs.distill(data, 1, settings, 0, tmp_path / "parts.ckpt", stored)
    assert torch.equal(whole[0], rest[0])
    assert all(torch.equal(p, q) for p, q in zip(whole[1].parameters(), rest[1].parameters()))
    with pytest.raises(common.UserError, match="other settings"):
        kfs.distill(data, 1, settings | {"noise": .2}, 0, tmp_path / "parts.ckpt", stored)


def test_dm_goes_on_bit_for_bit(tmp_path):
    data = toy()
    settings = dm.SETTINGS[("cifar10", 1)] | dict(iterations=6, size=None)
    whole, _ = dm.distill(data, 2, settings, 0, tmp_path / "whole.ckpt")
    dm.distill(data, 2, settings | {"iterations": 3}, 0, tmp_path / "parts.ckpt")
    rest, _ = dm.distill(data, 2, settings, 0, tmp_path / "parts.ckpt")
    assert torch.equal(whole["images"], rest["images"])


def test_both_run_on_grey_28x28(tmp_path):
    data = toy((1, 28, 28))
    settings = kfs.PAPER | kfs.layout(data.shape, 1) | dict(iterations=2, pretrain=5, codes=3)
    codes, decoders, _ = kfs.distill(data, 1, settings, 0, tmp_path / "kfs.ckpt")
    assert codes.shape == (3, 3, 4, 4, 4) and decoders(codes[0]).shape == (3, 8, 1, 28, 28)
    tensors, _ = dm.distill(data, 1, dm.SETTINGS[("cifar10", 1)] | dict(iterations=2), 0, tmp_path / "dm.ckpt")
    assert tensors["images"].shape == (3, 1, 28, 28)


# ------------------------------------------------------------------------------------------ what the loops do

def real_means_of(net, data, draw):
    images = common.dsa(data.train, *draw) if draw else data.train
    return torch.stack([net.features(images[data.train_labels == c]).mean(0) for c in range(len(data.classes))])


WIRING = [({}, 3), ({"dsa": True}, 3), ({"batch_real": 7}, 3), ({"sample_decoders": 1, "backprop": 2}, 3),
          ({"real_means": 2, "dsa": True}, 2)]


@pytest.mark.parametrize("more, networks", WIRING, ids=str)
def test_what_an_iteration_of_kfs_compares(more, networks, tmp_path, monkeypatch):
    """The real means are those of the network and draw at hand, over all real images (7 are all of classes 0 and 1)."""
    data, seen, matching_loss = toy(), [], kfs.matching_loss

    def spy(net, means, codes, decoders, draw, which, chosen):
        rows = slice(2 if "batch_real" in more else 3)
        plain = real_means_of(net, data, draw)
        assert (means - plain)[rows].norm() < 2e-2 * plain[rows].norm()
        assert (draw is not None) == ("dsa" in more)
        assert which is None if "sample_decoders" not in more else len(which) == 1
        assert chosen is None if "backprop" not in more else chosen.shape == (3, 2)
        seen.append(tuple(common.flat_parameters(net)[:50].tolist()))
        return matching_loss(net, means, codes, decoders, draw, which, chosen)
    monkeypatch.setattr(kfs, "matching_loss", spy)
    settings = settings_of(data, iterations=3, **more)
    stored = kfs.load_real_means(data, tmp_path, 2, "dsa" in more) if "real_means" in more else None
    kfs.distill(data, 1, settings, 0, tmp_path / "a.ckpt", stored)
    assert len(seen) == 3 and len(set(seen)) == networks


def test_what_an_iteration_of_dm_compares(tmp_path, monkeypatch):
    data, seen, matching_loss = toy(), [], dm.matching_loss

    def spy(net, means, images, draw):
        plain = real_means_of(net, data, draw)[:2]
        assert (means[:2] - plain).norm() < 2e-2 * plain.norm()
        seen.append(tuple(common.flat_parameters(net)[:50].tolist()))
        return matching_loss(net, means, images, draw)
    monkeypatch.setattr(dm, "matching_loss", spy)
    dm.distill(data, 1, dm.SETTINGS[("cifar10", 1)] | dict(iterations=3), 0, tmp_path / "a.ckpt")
    assert len(set(seen)) == 3


@pytest.mark.parametrize("draw", [None, common.draw_dsa(1, 3)], ids=str)
def test_loss_and_gradient_with_a_siamese_draw(draw):
    net, means, codes, decoders, gradient = parts(toy())
    loss = kfs.matching_loss(net, means, codes, decoders, draw, half=False)
    ours = gradient()
    images = decoders(codes.flatten(0, 1)).flatten(0, 1)
    g = net.features(common.dsa(images, *draw) if draw else images).unflatten(0, (3, -1))
    printed = ((means - g.mean(1)).square().sum(1) / 2).mean()
    assert loss.item() == pytest.approx(printed.item(), rel=1e-5)
    assert (ours - gradient(printed)).norm() < 1e-4 * ours.norm()


def test_first_step_of_adam_is_the_learning_rate(tmp_path):
    data = toy()
    settings = settings_of(data, iterations=1)
    start, before = kfs.pretrain(data, settings, 0)
    codes, decoders, _ = kfs.distill(data, 1, settings, 0, tmp_path / "a.ckpt")
    assert (codes - start).abs().max().item() == pytest.approx(.1, rel=1e-2)
    moved = max((p - q).abs().max().item() for p, q in zip(decoders.parameters(), before.parameters()))
    assert moved == pytest.approx(.01, rel=1e-2)


def test_pretraining_reconstructs():
    data = toy()

    def error(steps):
        settings = settings_of(data, pretrain=steps, noise=0., decoders=1)
        codes, decoders = kfs.pretrain(data, settings, 0)
        images, _ = data.random_real(4, 0, "codes")
        return F.mse_loss(decoders(codes.flatten(0, 1))[:, 0], images).item()
    assert error(200) < .5 * error(1)


def test_fixed_decoders_go_on_and_are_told_apart(tmp_path):
    data = toy()
    settings = settings_of(data)
    _, a, _ = kfs.distill(data, 1, settings | {"iterations": 1}, 0, tmp_path / "p0.ckpt")
    _, b, _ = kfs.distill(data, 1, settings | {"iterations": 1}, 5, tmp_path / "p1.ckpt")
    whole = kfs.distill(data, 1, settings, 1, tmp_path / "w.ckpt", fixed=a)[0]
    kfs.distill(data, 1, settings | {"iterations": 3}, 1, tmp_path / "q.ckpt", fixed=a)
    assert torch.equal(whole, kfs.distill(data, 1, settings, 1, tmp_path / "q.ckpt", fixed=a)[0])
    with pytest.raises(common.UserError, match="other settings"):
        kfs.distill(data, 1, settings, 1, tmp_path / "q.ckpt", fixed=b)


# ------------------------------------------------------------------------------------------ scoring, the command line

def test_the_scoring_protocol_of_kfs():
    """lr 0.01, x 0.2 from epochs 133 and 166 of 200; the others' x 0.1 in the second half."""
    def rates(epochs, protocol):
        return [common.learning_rate(protocol, 1., epoch, epochs) for epoch in range(epochs)]
    kept = rates(200, kfs.PROTOCOL)
    assert [e for e in range(1, 200) if kept[e] != kept[e - 1]] == [133, 166] and kept[-1] == pytest.approx(.04)
    assert rates(5, common.PROTOCOL) == [1, 1, 1, .1, .1]


def run(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("method, more", [("dm", ["--batch-real", "8"]),
                                          ("kfs", ["--pretrain", "30", "--real-means", "1", "--decoders", "2"])])
def test_copied_alone_with_common_it_runs_and_evaluate_reads_it(method, more, tmp_path):
    for name in (f"{method}.py", "common.py"):
        shutil.copy(HERE / name, tmp_path)
    done = run(tmp_path, f"{method}.py", "--iterations", "2", "--runs", "1", "--epochs", "1", *more)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / f"{method}_glyphs_ipc1.pt"
    stored = common.load_distilled(path)
    if method == "kfs":
        count = sum(t.numel() for t in stored.values() if torch.is_tensor(t) and t.is_floating_point())
        assert float(re.search(r"([\d.]+) numbers a class", done.stdout)[1]) == pytest.approx(count / 10, abs=.1)
        assert stored["settings"]["between_decoders"] > 0
    assert path.with_suffix(".png").stat().st_size > 1000
    again = run(HERE, "evaluate.py", str(path), "--runs", "1", "--epochs", "1", "--out", str(tmp_path))
    score = re.search(r"1 a class: ([\d.]+)", done.stdout)[1]
    assert again.returncode == 0 and re.search(r"1 a class: ([\d.]+)", again.stdout)[1] == score


@pytest.mark.parametrize("command, text", [
    (["kfs.py", "--real-means", "2", "--batch-real", "4"], "leave out --batch-real"),
    (["kfs.py", "--fixed-decoders", "missing.pt"], "missing.pt does not exist"),
    (["dm.py", "--dataset", "nothing"], "unknown data set 'nothing'"),
    (["dm.py", "--ipc", "501"], "choose a number from 1"),
])
def test_bad_input_ends_with_one_line(command, text, tmp_path):
    done = run(HERE, *command, "--out", str(tmp_path))
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
