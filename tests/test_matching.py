"""DM, MTT, KFS and FRePo: losses, gradients and updates against plain references in float64."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import find, make_data, relative, spy
from test_trajectory import naive_match

import common
import dm
import frepo
import kfs
import mtt
from common import transform


@pytest.fixture(name="data")
def small_data(monkeypatch, exact):
    """The tiny data set; all in float64, with networks of width 8."""
    monkeypatch.setattr(common, "ConvNet", partial(common.ConvNet, width=8))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield make_data()
    torch.set_default_dtype(torch.float32)


def record_transforms(monkeypatch):
    """All calls of common.transform, (images, name, parameters); {key of common.dsa: its call}."""
    calls, draws = [], {}
    spy(monkeypatch, common, "transform", lambda _, x, *rest: calls.append((x.detach(), *rest)))
    spy(monkeypatch, common, "dsa", lambda _, x, flip, *key: draws.update({key: calls[-1]}))
    return calls, draws


def record_steps(monkeypatch):
    """The list of losses and states after each iteration of a common.Run."""
    kept = []

    def note(_, run, it, loss):
        state = {k: v if torch.is_tensor(v) else v.state_dict() for k, v in run.state.items()}
        kept.append(copy.deepcopy((loss.item(), state)))

    spy(monkeypatch, common.Run, "step", note)
    return kept


def joined(state, prefix=""):
    """The tensors of a state dict, or of a part of it, as a vector."""
    return torch.cat([p.detach().flatten() for k, p in state.items() if k.startswith(prefix)])


def matching_loss(objective, net, images, theirs, ours):
    """DM (survey Eq. 31) or DC (Eq. 22 to 24) by loops; theirs, ours: recorded transforms."""
    total = 0
    for c, ((real, name, u), (_, our_name, our_u)) in enumerate(zip(theirs, ours, strict=True)):
        assert name == our_name and torch.equal(u, our_u) and len(u) == 1  # Siamese
        pair = [transform(x, name, u.expand(len(x), -1)) for x in (real, images[c])]
        if objective == "dm":
            means = [net.features(x).mean(0) for x in pair]
            total = total + (means[0] - means[1]).square().sum()
            continue
        losses = [F.cross_entropy(net(x), torch.full((len(x),), c)) for x in pair]
        options = {"inputs": list(net.parameters()), "create_graph": True}
        gradients = [torch.autograd.grad(loss, **options) for loss in losses]
        for a, b in zip(*gradients, strict=True):
            for v, w in zip(a, b, strict=True) if a.ndim > 1 else ():  # biases do not count
                total = total + 1 - (v * w).sum() / (v.norm() * w.norm() + 1e-6)
    assert len({u[0, 0].item() for _, _, u in theirs}) == 3  # one draw a class
    return total


def test_dm(data, tmp_path, monkeypatch):
    """Two iterations: the loss, the network of each, SGD with momentum."""
    (calls, _), history = record_transforms(monkeypatch), record_steps(monkeypatch)
    args = dm.Args(ipc=2, iterations=2, batch_real=5, lr=0.5)
    dm.distill(data, args, tmp_path / "dm.pt")
    images, velocity = data.sample(2, 0, "start")[0], 0
    for it, (loss, state) in enumerate(history):
        theirs, ours = calls[6 * it :][:3], calls[6 * it + 3 :][:3]
        for c, (real, *_) in enumerate(theirs):
            assert data.train_labels[find(real, data.train).unique()].tolist() == [c] * 5
        leaf = images.clone().requires_grad_()
        net = common.ConvNet(data.shape, 3).reset(0, it)
        expected = matching_loss("dm", net, leaf.chunk(3), theirs, ours)
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        velocity = 0.5 * velocity + torch.autograd.grad(expected, leaf)[0]
        images = images - 0.5 * velocity
        assert relative(state["images"], images) < 1e-10


def test_mtt(data, tmp_path, monkeypatch):
    """An iteration by one graph of all steps; each image has a DSA draw; alpha is not clamped."""
    history = record_steps(monkeypatch)
    args = mtt.Args(ipc=2, iterations=1, experts=2, student_steps=3, expert_epochs=1, max_start=2)
    args.step_size, args.lr_step, args.lr_images, args.batch = 2e-4, 1e-7, 1e4, 4
    args.data_dir = str(tmp_path)
    segment = mtt.sample_segment(mtt.load_experts(data, args, {}), args, 0, 0)
    _, draws = record_transforms(monkeypatch)
    found = mtt.distill(data, args, tmp_path / "mtt.pt")
    images, labels = data.sample(2, 0, "start")
    step_size = torch.tensor(2e-4, requires_grad=True)

    def batch(n):
        plain, name, u = draws[0, 0, "batch", n]
        index = find(plain, images)
        assert len(index.unique()) == len(u.unique(dim=0)) == 4
        return transform(images[index], name, u), labels[index]

    images.requires_grad_()
    loss = naive_match(common.ConvNet(data.shape, 3), *segment, step_size, batch, 3)
    assert history[0][0] == pytest.approx(loss.item(), rel=1e-9)
    assert relative(found["images"] - images.detach(), -1e4 * images.grad) < 1e-7
    alpha = 2e-4 - 1e-7 * step_size.grad.item()
    assert found["step_size"] == pytest.approx(alpha, rel=1e-9)
    assert abs(alpha - 2e-4) > 1e-6 and 0 < alpha < 0.001


def decode_alone(decoders, codes, d):
    """Decoder d as separate modules: codes (n, c', h', w') -> (n, c, h, w)."""
    for layer in decoders.layers:
        weight, bias = (p.chunk(decoders.count)[d] for p in (layer.weight, layer.bias))
        module = torch.nn.ConvTranspose2d(*weight.shape[:2], layer.kernel_size, 2, layer.padding)
        codes = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (codes,))
    codes = F.pad(codes, ((decoders.shape[-1] - codes.shape[-1]) // 2,) * 4)
    return (1 / (1 + (-codes).exp()) - decoders.mean) / decoders.std


LAYOUTS = [
    ((3, 32, 32), 1, False, (12, 4, 4), 16, 738),  # the numbers in the paper's text
    ((3, 32, 32), 10, False, (12, 4, 4), 160, 738),
    ((3, 32, 32), 10, True, (12, 8, 8), 40, (12 * 6 + 6 * 3) * 4 + 9),
    ((3, 96, 96), 1, False, (12, 12, 12), 16, 738),
    ((1, 28, 28), 1, False, (4, 4, 4), 12, (4 * 3 + 3 * 2 + 2) * 4 + 6),
]


@pytest.mark.parametrize("shape, ipc, high_res, code, codes, parameters", LAYOUTS)
def test_layout(shape, ipc, high_res, code, codes, parameters, data):
    """Both readings of the storage; grouped layers equal separate modules."""
    args = kfs.Args(ipc=ipc, high_res=high_res)
    assert kfs.layout(args, shape)[:2] == (code, codes)
    assert 0 <= ipc * math.prod(shape) - codes * math.prod(code) < math.prod(code)
    decoders = kfs.Decoders(2, args, shape, *torch.rand(2, shape[0], 1, 1))
    assert sum(p.numel() for p in decoders.parameters()) == 2 * parameters
    codes = torch.randn(2, *code)
    expected = torch.stack([decode_alone(decoders, codes, d) for d in range(2)], 1)
    assert expected.shape == (2, 2, *shape) and relative(decoders(codes), expected) < 1e-12


@pytest.mark.parametrize("setting", ["backprop", "sample_decoders"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_eq_1_and_2(setting, count, data):
    """Loss and gradient, averaged over all subsets: Eq. 1; for sampled decoders more by Eq. 2."""
    m, d, subsets = (3, 3, 3) if count else (16, 12, 1)  # 3 x 16 x 12 images pass one chunk
    args = kfs.Args(codes=m, decoders=d, pretrain=3, **{setting: count})
    net = common.ConvNet(data.shape, 3).requires_grad_(False)
    data.train = data.train.repeat(2, 1, 1, 1)  # 24 images per class
    data.train_labels = data.train_labels.repeat(2)
    codes, decoders = kfs.start_factors(data, args)
    leaves = [codes.requires_grad_(), *decoders.parameters()]
    target, eq_1, eq_2 = kfs.class_means(net, data, data.train, data.train_labels), 0, 0
    for c in range(3):
        images = [decode_alone(decoders, codes[c], i) for i in range(d)]
        means = torch.stack([net.features(x).mean(0) for x in images])
        eq_1 = eq_1 + (target[c] - means.mean(0)).square().sum() / 2 / 3
        for i in range(d):  # for one decoder at a time
            eq_2 = eq_2 + (means[i] - means.mean(0)).square().sum() / d / 2 / 3
    assert eq_2 > 1e-3 * eq_1
    biased = setting == "sample_decoders" and count
    expected = eq_1 + eq_2 * (d - count) / (d - 1) / count if biased else eq_1
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, leaves)])
    found = {}
    for key in range(20 * subsets):
        for leaf in leaves:
            leaf.grad = None
        loss = kfs.match_distribution(net, target, codes, decoders, args, key).item()
        ours = torch.cat([leaf.grad.flatten() for leaf in leaves])
        found.setdefault(round(ours.norm().item(), 9), []).append((loss, ours))
    assert len(found) == subsets and min(map(len, found.values())) > 9  # equally likely
    losses, gradients = zip(*[same[0] for same in found.values()], strict=True)
    assert sum(losses) / subsets == pytest.approx(expected.item(), rel=1e-10)
    assert relative(sum(gradients) / subsets, gradient) < 1e-9


@pytest.mark.parametrize("settings, networks", [({}, 3), ({"real_means": 2}, 2)])
def test_kfs(settings, networks, data, tmp_path, monkeypatch):
    """The networks and real means of each iteration, different decoders, the file."""
    data.train, data.train_labels = data.train.repeat(15, 1, 1, 1), data.train_labels.repeat(15)
    seen = set()

    def note(_, net, target, *rest):
        means = [net.features(data.train[data.train_labels == c]).mean(0) for c in range(3)]
        assert relative(target, torch.stack(means).detach()) < 1e-10
        seen.add(mtt.flatten(net)[0].item())

    spy(monkeypatch, kfs, "match_distribution", note)
    args = kfs.Args(iterations=3, codes=2, decoders=4, pretrain=40, **settings)
    args.data_dir = str(tmp_path)
    found = kfs.distill(data, args, tmp_path / "kfs.pt")
    assert len(seen) == networks
    _, decoders = kfs.start_factors(data, args)
    copies = torch.cat([p.detach().view(4, -1) for p in decoders.parameters()], 1)
    for d in range(3):  # noise of a tenth in each of two copies
        assert 0.05 < relative(copies[d], copies[d + 1]) < 0.35
    assert found["stored_per_class"] == pytest.approx(2 * 12 * 2 * 2 + 4 * 738 / 3)
    alone = decode_alone(kfs.open_factors(found)[1], found["codes"][1], 1)
    images, labels = kfs.decode(found)
    assert relative(images[0, [9, 13]], alone) < 1e-10 and labels[[9, 13]].tolist() == [1, 1]
    if settings:  # the stored means serve the next run
        monkeypatch.setattr(kfs, "class_means", None)
        rest = (common.ConvNet(data.shape, 3), data, args)
        assert len(kfs.load_real_means(*rest)[1]) == 2
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        single = dataclasses.replace(data, train=data.train.to(torch.float32))
        with pytest.raises(TypeError):  # but not in another precision
            kfs.load_real_means(rest[0], single, args)


def test_fixed_decoders(data, tmp_path):
    """Decoders of other data give images in the statistics of the new; they can't be left out."""
    args = kfs.Args(iterations=1, codes=2, decoders=2, pretrain=2, batch_real=4)
    first = kfs.distill(data, args, tmp_path / "first.pt")
    statistics = common.Preprocess("standardize", first["mean"] + 1, first["std"] * 2)
    data = dataclasses.replace(data, preprocess=statistics, fingerprint="other")
    fixed = dataclasses.replace(args, fixed_decoders=str(tmp_path / "first.pt"))
    found = kfs.distill(data, fixed, tmp_path / "second.pt")
    images, _ = kfs.images_of(found["codes"], kfs.load_decoders(fixed, data))
    torch.testing.assert_close(images, kfs.decode(found)[0])
    expected = (kfs.decode(first | {"codes": found["codes"]})[0] * first["std"] - 1) / first["std"]
    torch.testing.assert_close(images * 2, expected)
    with pytest.raises(common.UserError, match="differs in inputs"):
        kfs.distill(data, args, tmp_path / "second.pt")


def test_idc_augmentation(data, monkeypatch):
    """Color, flip, and one of crop, scale and rotate, each image by its own draw."""
    (calls, _), last = record_transforms(monkeypatch), []
    for key in range(40):
        calls.clear()
        flip, expected = key % 4 > 0, data.train
        images = kfs.protocol(kfs.Args()).augment(data.train, flip, "idc", key)
        *first, third = [name for _, name, _ in calls]
        assert first == ["color", "flip"][: 1 + flip]
        last.append(third)
        for before, name, u in calls:
            assert torch.equal(before, expected) and len(u.unique(dim=0)) == len(images)
            expected = transform(expected, name, u)
        assert torch.equal(images, expected)
    assert all(last.count(name) > 6 for name in ("crop", "scale", "rotate"))


def test_cutmix(data):
    """In half of the batches a box comes from another image, labels by its share of the area."""
    images, labels, shares = data.train, F.one_hot(data.train_labels, 3).double(), []
    for key in range(80):
        mixed, soft = kfs.cutmix(images, labels, "cutmix", key)
        box = (mixed != images).any(1).any(0)
        assert torch.equal(box, box.any(1)[:, None] & box.any(0))
        shares.append(box.double().mean().item())
        if box.any():
            partner = find(mixed[..., box][..., None], images[..., box][..., None])
            assert len(partner.unique()) == len(images)
            labels_of_both = (1 - shares[-1]) * labels + shares[-1] * labels[partner]
            assert torch.equal(mixed[..., ~box], images[..., ~box])
            assert relative(soft, labels_of_both) < 1e-6
        else:
            assert torch.equal(soft, labels)
    assert 30 <= sum(share == 0 for share in shares) <= 55 and max(shares) > 0.7
    assert kfs.protocol(kfs.Args(scoring="dsa")).mix is None and kfs.protocol(kfs.Args()).mix


def test_lamb(data):
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    lamb, value, mean, square = frepo.Lamb([p], lr=0.1), p.detach().clone(), 0, 0
    for step, gradient in enumerate([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]], 1):
        p.grad = torch.tensor(gradient)
        lamb.step()
        mean = 0.9 * mean + 0.1 * p.grad
        square = 0.999 * square + 0.001 * p.grad**2
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)) ** 0.5 + 1e-6)
        value = value - 0.1 * value.norm() / update.norm() * update
        assert relative(p.detach(), value) < 1e-12


def test_margin_hinge():
    labels = torch.tensor([[-0.1, 0.9, -0.1, -0.1], [0.3, 0.2, 0.0, 0.0], [0.5, 0.5, 0.1, 0.0]])
    assert frepo.margin_loss(labels).item() == pytest.approx(-(1 / 4 + 0.1 + 0) / 3, abs=1e-6)


def predict(support, labels, target, ridge):
    return target @ frepo.krr(support, labels, ridge)


def solve(support, labels, target, ridge):
    """The prediction by torch.linalg.solve in float64."""
    support, labels, target = support.double(), labels.double(), target.double()
    kernel = support @ support.T
    kernel = kernel + ridge * kernel.trace() / len(kernel) * torch.eye(len(kernel)).double()
    return target @ support.T @ torch.linalg.solve(kernel, labels)


@pytest.mark.parametrize("n, width, ridge", [(7, 20, 1e-6), (30, 8, 1e-2), (4, 6, 0.1)])
def test_krr(n, width, ridge):
    """More and fewer images than features; first and second derivatives."""
    torch.manual_seed(0)
    inputs = [torch.randn(*shape).double() for shape in ((n, width), (n, 3), (4, width))]
    inputs = [x.requires_grad_() for x in inputs]
    assert relative(predict(*inputs, ridge), solve(*inputs, ridge)) < 1e-8
    if n == 4:
        assert torch.autograd.gradcheck(predict, (*inputs, ridge))
        assert torch.autograd.gradgradcheck(predict, (*inputs, ridge))


def test_krr_near_singular():
    """In float32: features of a large mean, images nearly equal; NaN where there is no solution."""
    torch.manual_seed(0)
    support, target = (torch.randn(n, 1000) + 3 for n in (100, 20))
    labels = torch.rand(100, 9)
    support[:40] = support[50:90] + 1e-4 * torch.randn(40, 1000)
    leaves = support.requires_grad_(), labels.requires_grad_()
    found, expected = (f(*leaves, target, 1e-6) for f in (predict, solve))
    assert found.dtype == torch.float32 and relative(found.double(), expected) < 1e-5
    ours, theirs = (torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected))
    assert max(map(relative, ours, theirs)) < 1e-4
    assert frepo.krr(*torch.ones(2, 4, 4), ridge=-2.0).isnan().all()


def nfr_by_hand(net, images, labels, real, truth, ridge, mirror):
    """Eq. 17 by `solve`, with a graph for all inputs."""
    if mirror:
        images, labels = torch.cat([images, images.flip(3)]), torch.cat([labels, labels])
    predicted = solve(net.features(images), labels, net.features(real), ridge)
    return (predicted - truth).square().sum() / 2 / len(real)


@pytest.mark.parametrize("name, flip", [("cifar10", True), ("cifar100", True), ("cifar10", False)])
def test_frepo(name, flip, data, tmp_path, monkeypatch):
    """One iteration: Eq. 17 and the hinge, LAMB; then Eq. 18 by Adam, with batch norm."""
    monkeypatch.setattr(frepo, "margin_loss", torch.norm)  # the hinge has no gradient yet
    history, data.flip = record_steps(monkeypatch), flip
    argv = f"--dataset {name} --ipc 10 --iterations 1 --pool 2 --batch-real 20 --ridge 1e-3"
    argv += " --lr 0.1 --lr-pool 0.01 --weight-margin 0.7"
    args = common.parse_args(frepo.Args, frepo.PRESETS, argv.split())
    found = frepo.distill(data, args, tmp_path / "frepo.pt")
    mirror = flip and name == "cifar10"  # CIFAR-100 at 10 images a class goes without
    assert args.zca and args.whitening == "zca-trace"
    k = int(history[0][1]["ages"].tolist() == [0, 51])  # the second network starts at age 50
    net = frepo.build_network(data.shape, 3).reset(0, "pool", k).eval()
    images, numbers = data.sample(10, 0, "start")
    labels = (F.one_hot(numbers, 3) - 1 / 3) / math.sqrt(3 / 10)
    leaves = images.requires_grad_(), labels.requires_grad_()
    real, real_labels = data.batch(20, 0, 0, "real")
    truth = F.one_hot(real_labels, 3) - 1 / 3
    loss = nfr_by_hand(net, *leaves, real, truth, 1e-3, mirror)
    assert history[0][0] == pytest.approx(loss.item(), rel=1e-8)
    (loss + 0.7 * labels.norm()).backward()
    frepo.Lamb(leaves, lr=0.1).step()
    assert relative(found["images"], images.detach()) < 1e-5
    assert relative(found["labels"], labels.detach()) < 1e-5
    net.zero_grad()
    features = net.train().blocks(found["images"]).flatten(1)
    # batch norm follows a pooling; its statistics are nine tenths those of the newest batch
    x = F.avg_pool2d(net.blocks[0](found["images"]).relu(), 2)
    (norm,) = [layer for layer in net.blocks if isinstance(layer, torch.nn.BatchNorm2d)]
    assert relative(norm.running_mean, 0.9 * x.mean((0, 2, 3))) < 1e-10
    assert relative(norm.running_var, 0.1 + 0.9 * x.var((0, 2, 3))) < 1e-10
    ((net.classifier(features) - found["labels"]).square().sum() / 2 / 30).backward()
    torch.optim.Adam(net.parameters(), lr=0.01).step()
    assert relative(joined(history[0][1]["pool"], f"{k}."), joined(net.state_dict())) < 1e-4


def test_pool(data, tmp_path, monkeypatch):
    """An iteration changes the drawn network alone; at max_age a new one takes its place."""
    history = record_steps(monkeypatch)
    args = frepo.Args(iterations=24, pool=3, max_age=4, batch_real=6, lr_pool=1e-3)
    frepo.distill(data, args, tmp_path / "frepo.pt")
    net = frepo.build_network(data.shape, 3)
    before = [mtt.flatten(net.reset(0, "pool", k)) for k in range(3)]
    ages, replaced = [0, 1, 2], set()
    for _, state in history:
        weights = {n: p for n, p in state["pool"].items() if n.endswith(("weight", "bias"))}
        after = [joined(weights, f"{k}.") for k in range(3)]  # without running statistics
        moves = [(a - b).abs().max().item() for a, b in zip(after, before, strict=True)]
        (k,) = [k for k in range(3) if moves[k] > 0]
        ages[k] = (ages[k] + 1) % 4
        assert state["ages"].tolist() == ages
        if ages[k]:  # a step of Adam; its first is exact
            assert moves[k] == pytest.approx(1e-3, rel=1e-2 if ages[k] == 1 else 0.9)
        else:
            assert moves[k] > 0.05
            replaced.add(after[k][0].item())
        before = after
    assert len(replaced) > 3
