"""HaBa under other objectives (Tab. 2) and its ablations (Tab. 4 to 6, supplement Tab. 5): each against a plain way."""
import json

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import common
import haba
from conftest import make_folder

OBJECTIVES = pytest.mark.parametrize("objective", ("dm", "dc"))
ROWS = {"mtt": haba.SETTINGS, "dm": haba.DM_SETTINGS, "dc": haba.DC_SETTINGS}


def settings_of(objective, **more):
    """The table's settings for one basis a class on a small data set."""
    return (haba.PAPER | common.settings_for(ROWS[objective], "noise", 1)
            | dict(objective=objective, iterations=1, hallucinators=3, weight_cos=0., batch_real=7, size=None) | more)


@pytest.fixture
def data(small_data):
    zero = torch.zeros(3, 1, 1)
    small_data.preprocess = common.Preprocess("standardise", "standardise-noise-00000000", zero, zero + 1)
    return small_data


def starts(data, bpc, settings, seed=0):
    """The bases, their labels and the hallucinators that distill starts from, as leaves."""
    bases, labels = data.random_real(bpc, seed, "bases")
    model = common.seeded((seed, "hallucinators"), haba.Hallucinators, settings["hallucinators"], data.shape,
                          data.shape, None, 1, 3 if settings["class_hallucinators"] else 1, settings["share_conv"])
    return bases.requires_grad_(), labels, model


def plain_distance(ours, theirs):
    """Survey Eq. (22) and (23), a loop over layers and one over their channels; as the authors do, weights alone."""
    total = 0
    for a, b in zip(ours, theirs):
        for a_i, b_i in zip(a, b) if a.ndim > 1 else ():
            a_i, b_i = a_i.flatten(), b_i.flatten()
            total = total + 1 - (a_i @ b_i) / ((a_i @ a_i).sqrt() * (b_i @ b_i).sqrt() + 1e-6)
    return total


def class_gradient(net, images, label):
    """The gradient of the mean cross-entropy for each of net's parameters, with a graph."""
    loss = F.cross_entropy(net(images), torch.full((len(images),), label))
    return torch.autograd.grad(loss, list(net.parameters()), create_graph=True)


def relative(ours, theirs):
    assert theirs.norm() > 0
    return ((ours - theirs).norm() / theirs.norm()).item()


# ------------------------------------------------------------------------------------------ gradient matching

def test_gradient_distance():
    """Against its definition; 0 for equal directions, 2 a channel for opposite ones; a channel of zeros counts 1."""
    g = torch.Generator().manual_seed(0)
    layers = [torch.randn(*shape, generator=g, dtype=torch.double) for shape in ((5, 3, 3, 3), (5,), (4, 20), (4,))]
    others = [torch.randn(layer.shape, generator=g, dtype=torch.double) for layer in layers]
    plain = plain_distance(layers, others).item()
    assert haba.gradient_distance(layers, others).item() == pytest.approx(plain, rel=1e-12)
    assert haba.gradient_distance(layers, [3 * layer for layer in layers]).item() == pytest.approx(0, abs=1e-5)
    assert haba.gradient_distance(layers, [-layer for layer in layers]).item() == pytest.approx(2 * 9, abs=1e-5)
    others[2][1] = 0
    layers[2].requires_grad_()
    haba.gradient_distance(layers[2:3], others[2:3]).backward()
    assert layers[2].grad.isfinite().all() and layers[2].grad[1].norm() == 0


@pytest.mark.parametrize("chunk", (3, 100))
@pytest.mark.parametrize("augmented", (False, True))
def test_match_gradients(augmented, chunk, monkeypatch):
    """Survey Eq. (24) and its gradient in bases and hallucinators against autograd through the whole graph, float64."""
    monkeypatch.setattr(common, "chunk_size", lambda device: chunk)
    torch.manual_seed(2)
    net = common.ConvNet((3, 16, 16), 3, width=8).double()
    theta = common.flat_parameters(net)
    theta += .05 * torch.randn_like(theta)
    torch.nn.utils.vector_to_parameters(theta, net.parameters())
    real, bases = torch.randn(15, 3, 16, 16).double(), torch.randn(6, 3, 16, 16).double().requires_grad_()
    model = haba.Hallucinators(3, (3, 16, 16), (3, 16, 16)).double()
    leaves = [bases, *model.parameters()]

    def augment(x, c):
        return common.dsa(x, *common.draw_dsa(1, "siamese", c)) if augmented else x

    def images():
        return model(bases, [2, 0]).transpose(0, 1).flatten(0, 1)  # class by class: 2 bases with 2 hallucinators each

    plain = 0
    for c in range(3):
        theirs = [g.detach() for g in class_gradient(net, augment(real[5 * c:5 * (c + 1)], c), c)]
        plain = plain + plain_distance(class_gradient(net, augment(images()[4 * c:4 * (c + 1)], c), c), theirs)
    expected = torch.autograd.grad(plain, leaves)
    x = images()
    distances, gradient = haba.match_gradients(net, theta, real, x, 3, augment)
    assert distances.sum().item() == pytest.approx(plain.item(), rel=1e-10) and distances.shape == (3,)
    for ours, theirs in zip(torch.autograd.grad(x, leaves, gradient), expected):
        assert relative(ours, theirs) < 1e-8


# ------------------------------------------------------------------------------------------ an iteration

@pytest.mark.parametrize("kind", ({}, {"hallucinators": 0}, {"dsa": False}, {"class_hallucinators": True},
                                  {"share_conv": True}, {"weight_dd": .5}), ids=str)
@OBJECTIVES
def test_first_step(objective, kind, data, exact, tmp_path):
    """One iteration against the plain objective, class by class, autograd and a step by hand."""
    settings = settings_of(objective, **kind)
    found, step_size, _ = haba.distill(data, 2, settings, 0, None, tmp_path / "x.ckpt")
    assert step_size is None

    bases, labels, model = starts(data, 2, settings)
    pair = haba.draw_pair(3, 0, "pair", 0) if settings["hallucinators"] else []
    images = [torch.cat([model(bases[labels == c], [j], labels[labels == c])[0] for j in pair] or [bases[labels == c]])
              for c in range(3)]
    real = data.train[common.draw_members(common.class_members(data)[0], 7, 0, "real", 0)].unflatten(0, (3, 7))
    net, loss = common.start_anew(common.ConvNet(data.shape, 3), 0, "network", 0), 0
    for c in range(3):
        draw = common.draw_dsa(1, 0, 0, "match", *([c] if objective == "dc" else []))
        ours, theirs = (common.dsa(x, *draw) if settings["dsa"] else x for x in (images[c], real[c]))
        if objective == "dm":  # survey Eq. (31)
            loss = loss + (net.features(ours).mean(0) - net.features(theirs).mean(0)).square().sum()
        else:  # survey Eq. (24)
            theirs = [g.detach() for g in class_gradient(net, theirs, c)]
            loss = loss + plain_distance(class_gradient(net, ours, c), theirs)
    (settings["weight_dd"] * loss).backward()
    assert relative(found["bases"] - bases.detach(), -settings["lr_bases"] * bases.grad) < 1e-3
    for name, p in model.named_parameters():
        if len(p):
            step = found[f"hallucinators.{name}"] - p.detach()
            expected = -settings["lr_hallucinators"] * p.grad
            assert (step - expected).norm() < 1e-3 * expected.norm() + 1e-6 * p.detach().norm(), name
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state"]
    assert torch.equal(state["theta"], common.flat_parameters(net))


def test_network_trains(data, exact, tmp_path):
    """Survey Eq. (20): between two matches the network takes SGD steps on hallucinated images; then comes a new one."""
    settings = settings_of("dc", matches=2, net_epochs=3)
    tensors, _, _ = haba.distill(data, 2, settings, 0, None, tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["state"]
    _, labels, model = starts(data, 2, settings)
    model.load_state_dict({name.removeprefix("hallucinators."): t for name, t in tensors.items() if "." in name})
    net = common.start_anew(common.ConvNet(data.shape, 3), 0, "network", 0)
    sgd = torch.optim.SGD(net.parameters(), lr=.01, momentum=settings["momentum_net"])
    for n in range(3):
        images = model(tensors["bases"], [common.hash_int((0, "hallucinator", 0, n)) % 3])[0].detach()
        sgd.zero_grad()
        F.cross_entropy(net(common.dsa(images, *common.draw_dsa(6, 0, 0, n))), labels).backward()
        sgd.step()
    before = common.flat_parameters(common.start_anew(common.ConvNet(data.shape, 3), 0, "network", 0))
    assert relative(stored["theta"] - before, common.flat_parameters(net) - before) < 1e-4

    def theta_after(iterations):
        haba.distill(data, 2, settings | {"iterations": iterations}, 0, None, tmp_path / "x.ckpt")
        return torch.load(tmp_path / "x.ckpt", weights_only=True)["state"]["theta"]

    assert torch.equal(theta_after(2), stored["theta"])  # no training after the last match
    new = common.flat_parameters(common.start_anew(common.ConvNet(data.shape, 3), 0, "network", 2))
    assert 0 < (theta_after(3) - new).norm() < .2 * new.norm()


@OBJECTIVES
def test_goes_on(objective, data, tmp_path):
    """Broken off after 3 of 5 iterations, amid a network's life, a run ends with the unbroken run's bytes."""
    settings = settings_of(objective, weight_cos=.1, **({"matches": 2, "net_epochs": 2} if objective == "dc" else {}))
    whole, _, _ = haba.distill(data, 2, settings | {"iterations": 5}, 0, None, tmp_path / "whole.ckpt")
    for iterations in (3, 5):
        broken, _, _ = haba.distill(data, 2, settings | {"iterations": iterations}, 0, None, tmp_path / "broken.ckpt")
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())
    whole, broken = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state"] for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in ("theta", "velocity", "bases"))


@OBJECTIVES
def test_objective_falls(objective, data, tmp_path):
    """Twenty iterations bring the objective down: the mean of the last five is under that of the first five."""
    losses, iterations = [], common.iterations
    settings = settings_of(objective, iterations=20, batch_real=20, weight_cos=.1)

    def watched(total, path, same, state, watch):
        for it in iterations(total, path, same, state, watch):
            losses.append(float(watch["loss"]))
            yield it
        losses.append(float(watch["loss"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "iterations", watched)
        haba.distill(data, 2, settings, 0, None, tmp_path / "x.ckpt")
    assert sum(losses[-5:]) < sum(losses[1:6])


# ------------------------------------------------------------------------------------------ other hallucinators

@pytest.mark.parametrize("depth, basis_shape", ((1, (3, 16, 16)), (2, (1, 8, 8)), (0, (3, 16, 16))))
def test_class_hallucinators(depth, basis_shape):
    """Each basis goes through its own class's hallucinators and no other's: against one model for each class."""
    torch.manual_seed(0)
    model = haba.Hallucinators(2, (3, 16, 16), basis_shape, None, depth, classes=3)
    torch.nn.init.normal_(model.scale), torch.nn.init.normal_(model.shift)
    bases, labels = torch.randn(5, *basis_shape), torch.tensor([2, 0, 1, 0, 2])
    images = model(bases, [1, 0], labels)
    assert images.shape == (2, 5, 3, 16, 16)
    for k in range(3):
        one = haba.Hallucinators(2, (3, 16, 16), basis_shape, None, depth)
        one.load_state_dict({name: p[k::3] for name, p in model.state_dict().items()})  # number j is in row 3 j + k
        assert torch.allclose(images[:, labels == k], one(bases[labels == k], [1, 0]), atol=1e-5)


def test_share_conv():
    """One encoder and decoder for all; equal to separate ones with equal weights. Sizes: scale and shift of each."""
    model = haba.Hallucinators(5, (3, 32, 32), (3, 32, 32), share=True)
    assert sum(p.numel() for p in model.parameters()) == 5 * 2 * 3 * 32 * 32 + 2 * 84
    torch.nn.init.normal_(model.scale), torch.nn.init.normal_(model.shift)
    apart = haba.Hallucinators(5, (3, 32, 32), (3, 32, 32))
    apart.load_state_dict({name: p.expand(5, *p.shape[1:]) for name, p in model.state_dict().items()})
    bases = torch.randn(4, 3, 32, 32)
    assert torch.allclose(model(bases, [4, 1]), apart(bases, [4, 1]), atol=1e-6)


def test_no_hallucinators():
    """A basis, enlarged, is the image; one channel is all three."""
    grey = torch.randn(4, 1, 8, 8)
    images = haba.Hallucinators(0, (3, 16, 16), (1, 8, 8))(grey, [])
    assert torch.equal(images, F.interpolate(grey, (16, 16), mode="bilinear").repeat(1, 3, 1, 1)[None])


# ------------------------------------------------------------------------------------------ the command line

TINY = ("--dataset", "tiny", "--runs", 1, "--epochs", 3, "--device", "cpu", "--iterations", 2)
MTT = ("--experts", 1, "--max-start", 1, "--expert-epochs", 1, "--student-steps", 2, "--lr-bases", 1,
       "--lr-hallucinators", .01)
IMAGE, HALLUCINATOR, CONV = 3 * 16 * 16, 2 * 3 * 16 * 16 + 2 * 84, 2 * 84  # numbers stored in each


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("home") / "tiny").parent


@pytest.mark.parametrize("more, name, numbers", (
    (("--objective", "dm"), "haba_dm", IMAGE * 3 + 5 * HALLUCINATOR),
    (("--objective", "dc", "--hallucinators", 2), "haba_dc", IMAGE * 3 + 2 * HALLUCINATOR),
    (("--objective", "dc", "--hallucinators", 0), "haba_dc", IMAGE * 3),
    (("--objective", "dm", "--hallucinators", 0, "--basis-size", 8, "--basis-channels", 1), "haba_dm", 64 * 3),
    ((*MTT, "--hallucinators", 0), "haba", IMAGE * 3),
    ((*MTT, "--class-hallucinators", "--hallucinators", 2), "haba", IMAGE * 3 + 3 * 2 * HALLUCINATOR),
    ((*MTT, "--share-conv"), "haba", IMAGE * 3 + 5 * (HALLUCINATOR - CONV) + CONV),
    ((*MTT, "--share-conv", "--class-hallucinators", "--no-dsa"), "haba",
     IMAGE * 3 + 15 * (HALLUCINATOR - CONV) + CONV),
), ids=lambda value: " ".join(map(str, value[-4:])) if isinstance(value, tuple) else str(value))
def test_whole_run(more, name, numbers, home, tmp_path, call):
    """The file is found, counts what is stored, and can be used: images of every basis by every hallucinator."""
    status, out, err = call(haba, "--data-dir", home, "--out", tmp_path, *TINY, *more)
    assert status == 0, err
    stored = torch.load(tmp_path / f"{name}_tiny_bpc1.pt", weights_only=True)
    assert stored["stored_per_class"] * 3 == numbers and stored["method"] == "haba"
    assert (stored["step_size"] is None) == (name != "haba")
    assert (stored["augmentation"] == "none") == ("--no-dsa" in more)
    images, labels = haba.hallucinate(stored)
    assert images.shape == (max(stored["settings"]["hallucinators"], 1), 3, 3, 16, 16) and labels.tolist() == [0, 1, 2]
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert line["augment"] == ("--no-dsa" not in more)


def test_no_dsa_matches_plain_images(data, tmp_path, monkeypatch):
    """Without DSA, no image is augmented in a distillation of any objective; with it, images are."""
    calls, dsa = [], common.dsa
    monkeypatch.setattr(common, "dsa", lambda *arguments: calls.append(1) or dsa(*arguments))
    experts = torch.randn(1, 3, len(common.flat_parameters(common.ConvNet(data.shape, 3))))
    for objective in ROWS:
        for dsa_on in (False, True):
            calls.clear()
            settings = settings_of(objective, dsa=dsa_on, **({"max_start": 0, "expert_epochs": 1, "student_steps": 2}
                                                             if objective == "mtt" else {}))
            haba.distill(data, 1, settings, 0, experts, tmp_path / f"{objective}{dsa_on}.ckpt")
            assert bool(calls) == dsa_on


def test_con_downstream(home, tmp_path, call):
    """The same command with --con-downstream goes on from the file that is there and scores with L_con."""
    command = "--data-dir", home, "--out", tmp_path, *TINY, "--objective", "dm", "--bpc", 2
    assert call(haba, *command)[0] == 0
    before = torch.load(tmp_path / "haba_dm_tiny_bpc2.pt", weights_only=True)
    status, _, err = call(haba, *command, "--con-downstream")
    assert status == 0 and "iterations" not in err, err
    after = torch.load(tmp_path / "haba_dm_tiny_bpc2.pt", weights_only=True)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if torch.is_tensor(value))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0]["random_accuracy"] == lines[1]["random_accuracy"]  # for distilled images alone


@pytest.mark.parametrize("weight", (0, .1))
def test_accumulate_contrast(weight, exact):
    """The gradient of cross-entropy + weight * L_con over pairs, for two networks; without weight, the usual one."""
    torch.manual_seed(0)
    net = common.ConvNet((3, 16, 16), 3, width=8)
    parameters = {name: torch.stack([p.detach(), 1.1 * p.detach() + .01]).requires_grad_()
                  for name, p in net.named_parameters()}
    images, labels = torch.randn(2, 8, 3, 16, 16), torch.arange(4).remainder(3).repeat(2, 2)
    haba.accumulate_contrast(weight, net, parameters, images, labels, F.cross_entropy)
    ours = {name: p.grad.clone() for name, p in parameters.items()}
    plain = 0
    for r in range(2):
        one = {name: p[r] for name, p in parameters.items()}
        blocks = {name.removeprefix("blocks."): p for name, p in one.items() if "blocks" in name}
        features = functional_call(net.blocks, blocks, images[r]).flatten(1)
        logits = features @ one["classifier.weight"].T + one["classifier.bias"]
        contrast = haba.contrastive_loss(torch.stack([features[:4], features[4:]]), labels[r][:4])
        plain = plain + F.cross_entropy(logits, labels[r]) + weight * contrast
    for (name, p), theirs in zip(parameters.items(), torch.autograd.grad(plain, list(parameters.values()))):
        assert (ours[name] - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6, name
    if not weight:
        for p in parameters.values():
            p.grad = None
        common.accumulate_gradient(net, parameters, images, labels)
        assert all(torch.allclose(p.grad, ours[name], atol=1e-5) for name, p in parameters.items())


def test_sampler_pairs(data, tmp_path):
    """Pairs: every basis under two different hallucinators, the first of them as without pairs."""
    settings = settings_of("dm")
    tensors, _, _ = haba.distill(data, 2, settings, 0, None, tmp_path / "x.ckpt")
    distilled = tensors | {"settings": settings, "classes": data.classes, "shape": list(data.shape)}
    every, _ = haba.hallucinate(distilled)
    (one, count), (two, _) = haba.sampler(distilled, "cpu"), haba.sampler(distilled, "cpu", pairs=True)
    assert count == 6
    seen = set()
    for key in range(30):
        index = torch.tensor([5, 0, 3])
        images, labels = two(0, index, key)
        assert torch.equal(images[:3], one(0, index, key)[0]) and labels.tolist() == [2, 0, 1] * 2
        for x, b in zip(images, index.repeat(2)):
            seen.add((b.item(), next(j for j in range(3) if torch.equal(x, every[j, b]))))
        assert all(not torch.equal(x, y) for x, y in zip(images[:3], images[3:]))
    assert len(seen) == 9


@pytest.mark.parametrize("more, word", (
    (("--objective", "dm", "--experts", 3), "--experts"), (("--objective", "dc", "--learn-labels"), "--learn-labels"),
    (("--batch-real", 8), "--batch-real"), (("--hallucinators", -1), "--hallucinators"),
    (("--hallucinators", 1, "--con-downstream"), "--con-downstream"), (("--objective", "ntk"), "--objective"),
    (("--objective", "dm", "--hallucinators", 0, "--basis-channels", 2), "--basis-channels"),
    (("--objective", "dm", "--bpc", 9), "has 8")), ids=str)
def test_mistakes(more, word, home, tmp_path, call):
    """A flag that has no meaning for the objective, or no sense, is told in one line with status 2."""
    status, _, err = call(haba, "--data-dir", home, "--out", tmp_path, *TINY, *more)
    last = err.strip().splitlines()[-1]
    assert status == 2 and last.startswith("haba.py:") and word in last and "Traceback" not in err, err
