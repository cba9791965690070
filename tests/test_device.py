"""What a GPU would complain about or wait for, found without one. Tensors on the "meta" device have shapes and no values:
whatever needs a value on the host raises, as .item(), an `if` on a tensor, or a mask as an index; here mixing them with the
host's tensors, copying these to them, or asking linear algebra whether it went well, raises too. (A list as an index or
in torch.tensor(..., device=...), which are copied as well, is not seen.) Each method's loop runs so, as it is. What
prepares the loop, once, may look at values and is replaced."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import dm
import frepo
import haba
import kfs
import mtt
import translator_fewshot

SHAPE, CLASSES, META = (3, 16, 16), 3, torch.device("meta")
EXPERTS = torch.empty(2, 4, len(common.flat_parameters(common.ConvNet(SHAPE, CLASSES))), device=META)


class MetaData(common.Dataset):
    """600 images without values; random_real needs none here."""

    def random_real(self, per_class, *key):
        labels = torch.empty(CLASSES * per_class, dtype=torch.long, device=META)
        return torch.empty(len(labels), *SHAPE, device=META), labels


WAITS = (torch.ops.aten._linalg_check_errors, torch.ops.aten.index_fill, torch.ops.aten.index_fill_)


class OnDevice(TorchDispatchMode):
    """Every operation inside of a loop has to keep to one device. Numbers, tensors of no dimension, may come from the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {x.device for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim}
        if devices and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        if INSIDE and len(devices) > 1:
            raise RuntimeError(f"{function} has tensors on {devices}")
        if INSIDE and function.overloadpacket in WAITS:
            raise RuntimeError(f"{function} waits for the GPU")
        return function(*args, **kwargs)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr(common, "rng", lambda *key, device="cpu": None if torch.device(device) == META else
                        torch.Generator(device).manual_seed(common.hash_int(key)))
    monkeypatch.setattr(common, "class_members", lambda data: (
        torch.empty(CLASSES, 20, dtype=torch.long, device=META), 20))
    monkeypatch.setattr(common, "iterations", iterate)
    item = torch.Tensor.item  # before and behind the loops: norms that tell checkpoints apart, the learned step size
    monkeypatch.setattr(torch.Tensor, "item", lambda x: item(x) if INSIDE or x.device != META else 0.)
    INSIDE.clear(), ENDED.clear()
    images, labels = torch.empty(600, *SHAPE, device=META), torch.empty(600, dtype=torch.long, device=META)
    mean = torch.zeros(3, 1, 1)  # on the host: KFS makes lists of it
    with OnDevice():
        yield MetaData("noise", ["a", "b", "c"], images, labels, images, labels,
                       common.Preprocess("standardise", "noise", mean, mean + 1))


def iterate(total, path, settings, state, watch, every=60):
    """common.iterations without checkpoints, in which nothing may be looked at; the loss has to stay where it is."""
    watch["seconds"] = 0.
    for it in range(total):
        INSIDE.append(it)
        yield it
        INSIDE.pop()
        assert watch["loss"].device == META
    ENDED.append(total)


INSIDE, ENDED = [], []  # the iteration under way; the loops that were gone through


def inside(function):
    """The function, in which nothing may be looked at either."""
    def call(*args):
        INSIDE.append(0)
        function(*args)
        INSIDE.pop()
    return call


def settings(row, **more):
    return row | dict(iterations=3, batch_real=5, student_steps=3, max_start=1, expert_epochs=2) | more


def test_that_the_device_complains(data):
    x, y = torch.empty(3, 3, device=META), torch.empty(3, 3, device=META, requires_grad=True)
    INSIDE.append(0)
    for wrong in (lambda: x + torch.ones(3, 3), lambda: x @ torch.ones(3, 3), lambda: x[torch.arange(2)],
                  lambda: torch.ones(3, 3).to(META), lambda: x.copy_(torch.ones(3, 3)), lambda: x.sum().item(),
                  lambda: float(x.sum()), lambda: bool(x[0, 0] > 0), lambda: x[x > 0], lambda: torch.nonzero(x),
                  lambda: torch.linalg.cholesky(x), lambda: y.trace().backward()):
        with pytest.raises(RuntimeError):
            wrong()


def test_mtt(data):
    mtt.distill(data, 2, settings(mtt.PAPER | mtt.SETTINGS["cifar10", 1], batch=4), 0, EXPERTS, None)
    assert ENDED == [3]


@pytest.mark.parametrize("more", [{}, dict(batch=4), dict(class_hallucinators=True), dict(depth=2, basis_size=8),
                                  dict(learn_labels=True), dict(hallucinators=0)])
def test_haba(data, more):
    haba.distill(data, 2, settings(haba.PAPER | haba.SETTINGS["cifar10", 1]) | more, 0, EXPERTS, None)
    assert ENDED == [3]


@pytest.mark.parametrize("objective", ["dm", "dc"])
def test_haba_with_other_objectives(data, objective, monkeypatch):
    match = haba.match_gradients

    def spy(net, theta, *rest):
        assert not theta.requires_grad  # it would hold the graphs of all steps that DC's network has trained for
        return match(net, theta, *rest)
    monkeypatch.setattr(haba, "match_gradients", spy)
    table = {"dm": haba.DM_SETTINGS, "dc": haba.DC_SETTINGS}[objective]
    haba.distill(data, 2, settings(haba.PAPER | table["cifar10", 1], objective=objective, matches=2, net_epochs=1), 0,
                 None, None)
    assert ENDED == [3]


def test_dm(data):
    dm.distill(data, 2, settings(dm.SETTINGS["cifar10", 1]), 0, None)
    assert ENDED == [3]


@pytest.mark.parametrize("more", [dict(batch_real=0), {}, dict(dsa=True), dict(sample_decoders=2), dict(backprop=1),
                                  dict(real_means=2)])
def test_kfs(data, more):
    row = settings(kfs.settings_of("cifar10", SHAPE, 1), pretrain=2, codes=2, decoders=3) | more
    means = (EXPERTS[:, 0], torch.empty(2, CLASSES, 2048, device=META), (None, None)) if "real_means" in more else None
    kfs.distill(data, 1, row, 0, "there is none", means)
    assert ENDED == [3]


def test_frepo(data):
    frepo.distill(data, 2, settings(frepo.ROW, pool=2, max_age=2), 0, None)
    assert ENDED == [3]


@pytest.mark.parametrize("mode", ["bilevel", "adapted"])
def test_translator(data, mode):
    row = settings(translator_fewshot.PAPER, steps=3, adapt_steps=2, outer_steps=2, inner_steps=2, rows=7)
    translator = translator_fewshot.Translator().to(META) if mode == "adapted" else None
    translator_fewshot.distill(data, [2], row, 0, mode, translator, lambda name: name)
    assert ENDED == ([3, 2] if mode == "adapted" else [2, 5])


def test_experts(data, monkeypatch):
    steps, step = [], inside(common.accumulate_gradient)
    monkeypatch.setattr(common, "accumulate_gradient", lambda *batch: [step(*batch), steps.append(1)])
    net = common.ConvNet(SHAPE, CLASSES).to(META)
    with pytest.raises(RuntimeError):  # behind the epoch: is everything finite?
        next(common.expert_epochs(data, net, None, 1, ("device",)))
    assert len(steps) == 3


@pytest.mark.parametrize("protocol", [common.PROTOCOL, common.frepo_protocol(10)])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_scoring(data, protocol, side_by_side, monkeypatch):
    images, labels = data.random_real(3)
    monkeypatch.setattr(common, "accumulate_gradient", inside(common.accumulate_gradient))
    found = common.train_and_test(data, lambda run, index, *key: (images[index], labels[index]), len(images), protocol,
                                  epochs=2, runs=2, side_by_side=side_by_side, test=lambda net, parameters: 1)
    assert found == [1, 1]
