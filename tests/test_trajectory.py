"""The trajectory match against autograd through all steps, and expert trajectories."""

import re
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import find, make_data, relative, spy
from torch import nn
from torch.func import functional_call

import common
import mtt


def naive_match(net, start, target, step_size, batch, steps):
    """HaBa Eq. 7 with one graph of all steps -> loss; adds to the gradients of all leaves."""
    named = dict(net.named_parameters())
    student = start.clone().requires_grad_()
    for n in range(steps):
        parts = student.split([p.numel() for p in named.values()])
        pairs = zip(named.items(), parts, strict=True)
        parameters = {name: part.reshape(p.shape) for (name, p), part in pairs}
        images, labels = batch(n)
        loss = F.cross_entropy(functional_call(net, parameters, (images,)), labels)
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        student = student - step_size * gradient
    loss = (student - target).square().sum() / (start - target).square().sum()
    loss.backward()
    return loss.detach()


def scene(kind, steps, side=16, device="cpu", dtype=torch.double):
    """Arguments of a small match, and the leaves behind its batches of a kind."""
    torch.manual_seed(11)
    net = common.ConvNet((3, side, side), 3, width=8).double()
    start = mtt.flatten(net) + 0.05 * torch.randn_like(mtt.flatten(net))
    target = start + 0.02 * torch.randn_like(start)
    start, target, net = (x.to(device, dtype) for x in (start, target, net))
    step_size = torch.tensor(0.05, dtype=dtype, device=device, requires_grad=True)
    images = torch.randn(10, 3, side, side, dtype=torch.double).to(device, dtype).requires_grad_()
    module = nn.Conv2d(3, 3, 3, padding=1).to(device, dtype)
    labels = torch.arange(10, device=device) % 3

    def batch(n):
        count = 0 if kind == "all" else 4
        index = mtt.student_indices(10, count, n, "scene", device=device)
        x = images[index]
        if kind == "module":
            x = common.dsa(module(x), True, "scene", n)
        return x, labels[index]

    leaves = [step_size, images, *(module.parameters() if kind == "module" else ())]
    return (net, start, target, step_size, batch, steps), leaves


def check_match(kind, **place):
    """Loss and gradients of images, module and step size against one graph of all steps."""
    (*arguments, batch, steps), leaves = scene(kind, 5, **place)
    loss = naive_match(*arguments, batch, steps)
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)  # the gradients are added, as by backward()
    start, made = arguments[1].clone(), []

    def watched(n):
        # the graph of one step at most is alive
        assert sum(ref() is not None for ref in made) <= 1
        images, labels = batch(n)
        made.append(weakref.ref(images))
        return images, labels

    our_loss, step_size_grad = mtt.match_trajectory(*arguments, watched, steps)
    found = [step_size_grad] + [leaf.grad - 1 for leaf in leaves[1:]]
    assert max(map(relative, [our_loss, *found], [loss, *expected])) < 1e-8
    assert torch.equal(arguments[1], start) and leaves[0].grad == 1
    assert all(p.grad is None for p in arguments[0].parameters()) and not our_loss.requires_grad
    assert not any(ref() is not None for ref in made)


KINDS = pytest.mark.parametrize("kind", ["all", "minibatches", "module"])


@KINDS
def test_match(kind):
    check_match(kind)


def test_compiled_match(compiler):
    """In float64 the compiled step, two whole graphs, has the same numbers."""
    counters = torch._dynamo.utils.counters
    check_match("module", side=8)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_no_compiler(compiler, capsys):
    """Without a C++ compiler, one line that says what to do."""
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere")}):
        with pytest.raises(SystemExit) as end:
            common.cli(partial(check_match, "all", side=8))
    message = capsys.readouterr().err
    assert end.value.code == 2 and re.search(r"C\+\+ compiler.*: use --no-compile\n$", message)


def test_bfloat16(monkeypatch):
    """Where the CPU has bfloat16, the match's gradients stay near those in float64."""
    found = []
    for dtype, low in ((torch.double, False), (torch.float, False), (torch.float, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda low=low: low)
        arguments, leaves = scene("module", 1, dtype=dtype)
        loss, step_size_grad = mtt.match_trajectory(*arguments)
        found.append([step_size_grad, *[leaf.grad for leaf in leaves[1:]]])
        assert all(gradient.dtype == dtype for gradient in (loss, *found[-1]))
    for exact, single, half in zip(*found, strict=True):
        assert relative(single.double(), exact) < 1e-4 < relative(half.double(), exact) < 0.15


def test_student_indices():
    """A pass of minibatches has no image twice and another order than the next; 0: all."""
    passes = []
    for key, first in (("a", 0), ("a", 3), ("b", 0), ("a", 0)):
        batches = [mtt.student_indices(10, 3, first + n, key).tolist() for n in range(3)]
        passes.append(sum(batches, []))
        assert list(map(len, batches)) == [3, 3, 3] and len(set(passes[-1])) == 9
    assert passes[0] == passes[3] and passes[0] != passes[1] != passes[2] != passes[0]
    for size in (0, 10, 99):
        assert torch.arange(10)[mtt.student_indices(10, size, 5, "a")].tolist() == list(range(10))


def load_experts(data, folder, epochs=1, **settings):
    args = mtt.Args(data_dir=str(folder), max_start=1, expert_epochs=epochs, **settings)
    return mtt.load_experts(data, args, {})


def test_expert_is_sgd(tmp_path, exact, monkeypatch):
    """An expert against a plain loop with the same DSA draws: SGD, lr 0.01, batch 256."""
    data, batches = make_data(100), []

    def note(transformed, images, *_):
        batches.append((find(images, data.train), transformed))

    spy(monkeypatch, common, "transform", note)
    (trajectory,) = load_experts(data, tmp_path, epochs=2, experts=1)
    assert [len(index) for index, _ in batches] == [256, 44] * 2
    net = common.ConvNet(data.shape, 3)
    net.load_state_dict(mtt.unflatten(net, trajectory[0]))
    optimizer, ends = torch.optim.SGD(net.parameters(), lr=0.01), [trajectory[0]]
    for index, images in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(images), data.train_labels[index]).backward()
        optimizer.step()
        ends.append(mtt.flatten(net))
    assert relative(trajectory - trajectory[0], torch.stack(ends[::2]) - trajectory[0]) < 1e-4


def test_expert_continues(data, tmp_path):
    """2 epochs, then 4, are those of an unbroken expert bit for bit; fewer are its first ones."""
    epochs = [("a", 2), ("a", 4), ("b", 4), ("a", 2)]
    loaded = [load_experts(data, tmp_path / name, n, experts=1)[0] for name, n in epochs]
    first, continued, unbroken, again = loaded
    assert len(first) == 3 and len(continued.unique(dim=0)) == 5
    assert torch.equal(continued, unbroken) and torch.equal(first, again)
    assert torch.equal(continued[:3], first)


def test_experts_of_several_runs(data, tmp_path):
    """--iterations 0 trains a seed's own experts; later runs share all, their own first."""
    own = load_experts(data, tmp_path, experts=2, iterations=0)
    union = torch.cat([own, load_experts(data, tmp_path, experts=2, iterations=0, seed=1)])
    assert len(union[:, 0].unique(dim=0)) == 4
    for seed, order in ((0, [0, 1, 2, 3]), (1, [0, 2, 3]), (2, [0, 1, 2, 3])):
        shared = load_experts(data, tmp_path, experts=len(order), seed=seed)
        assert torch.equal(shared, union[order]) and len(list(tmp_path.rglob("*.pt"))) == 4


def test_sample_segment():
    """Start and target are M epochs apart on one expert; every expert and t below T+ comes up."""
    experts = (torch.arange(3)[:, None] * 100 + torch.arange(6))[:, :, None].expand(3, 6, 2)
    args, drawn = mtt.Args(max_start=3, expert_epochs=2), set()
    for it in range(300):
        start, target = mtt.sample_segment(experts, args, 0, it)
        drawn.add((start[0].item(), target[1].item()))
    assert drawn == {(100 * k + t, 100 * k + t + 2) for k in range(3) for t in range(3)}
