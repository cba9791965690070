"""The trajectory match against autograd through all steps, and expert trajectories."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import Args, make_data, relative
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


def scene(kind, steps, side=16, device="cpu"):
    """Arguments of a small match in float64, and the leaves behind its batches of a kind."""
    torch.manual_seed(11)
    net = common.ConvNet((3, side, side), 3, width=8).double().to(device)
    start = mtt.flatten(net) + 0.05 * torch.randn_like(mtt.flatten(net))
    target = start + 0.02 * torch.randn_like(start)
    step_size = torch.tensor(0.05, dtype=torch.double, device=device, requires_grad=True)
    images = torch.randn(10, 3, side, side, dtype=torch.double).to(device).requires_grad_()
    module = nn.Conv2d(3, 3, 3, padding=1).double().to(device)
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


def check_match(kind, kept=0, **place):
    """Loss and gradients of images, module and step size against one graph of all steps."""
    arguments, leaves = scene(kind, 5, **place)
    loss = naive_match(*arguments)
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)  # the gradients are added, as by backward()
    start = arguments[1].clone()
    our_loss, step_size_grad = mtt.match_trajectory(*arguments, kept)
    found = [step_size_grad] + [leaf.grad - 1 for leaf in leaves[1:]]
    assert max(map(relative, [our_loss, *found], [loss, *expected])) < 1e-8
    assert torch.equal(arguments[1], start) and leaves[0].grad == 1
    assert all(p.grad is None for p in arguments[0].parameters())


KINDS = pytest.mark.parametrize("kind", ["all", "minibatches", "module"])


@pytest.mark.parametrize("kept", [0, 2, 5, 9])
@KINDS
def test_match(kind, kept):
    """However many graphs are kept."""
    check_match(kind, kept)


def graphed_stand_in(function, static):
    """torch.cuda.make_graphed_callables on a CPU: one memory for each input and result.

    A call overwrites what the last one returned, by NaN first, as a reader between them may see
    either; the backward pass is that of the last call.
    """
    memory, last = {}, []

    def fill(name, values):
        """Overwrite the memory of `name` -> tensors that share it."""
        for old in memory.get(name, ()):
            old.fill_(torch.nan)
        memory.setdefault(name, [value.detach().clone() for value in values])
        for old, value in zip(memory[name], values, strict=True):
            old.copy_(value.detach())
        return [old.detach() for old in memory[name]]

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            for tensor, value in zip(static, values, strict=True):
                tensor.copy_(value)
            with torch.enable_grad():
                last[:] = [function(*static)]
            return fill("output", last)[0]

        @staticmethod
        def backward(ctx, gradient):
            leaves = [tensor for tensor in static if tensor.requires_grad]
            gradients = torch.autograd.grad(last[0], leaves, gradient, retain_graph=True)
            return *fill("gradients", gradients), None

    return Graphed.apply


@KINDS
def test_graphed_match(kind, monkeypatch):
    """With the order of calls and the memory of CUDA graphs; twice, and with another shape."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed_stand_in)
    for side in (16, 16, 20):
        check_match(kind, kept=9, side=side)


def test_bfloat16_gradient(monkeypatch):
    """Computed in bfloat16, a student step's gradient stays near the one in float64."""
    torch.manual_seed(0)
    net = common.ConvNet((3, 16, 16), 3, width=16)
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 3
    found = []
    for dtype, low in ((torch.double, False), (torch.float, False), (torch.float, True)):
        monkeypatch.setattr(common, "is_bfloat16", lambda device, low=low: low)
        params = mtt.flatten(net).to(dtype).requires_grad_()
        x = images.to(dtype).requires_grad_()
        gradient = mtt.student_gradient(net.to(dtype), params, x, labels)
        assert gradient.dtype == params.dtype
        found.append(
            [gradient.detach(), *torch.autograd.grad(gradient.square().sum(), (params, x))]
        )
    for exact, single, half in zip(*found, strict=True):
        assert relative(single.double(), exact) < 1e-4 < relative(half.double(), exact) < 0.15


@pytest.mark.parametrize("kept", [0, 2, 8])
def test_match_memory(kept):
    """At most one graph beyond the kept ones is alive: a graph holds its step's images."""
    (*arguments, batch, steps), _ = scene("minibatches", 8)
    made, alive = [], []

    def watched(n):
        alive.append(sum(ref() is not None for ref in made))
        images, labels = batch(n)
        made.append(weakref.ref(images))
        return images, labels

    loss, _ = mtt.match_trajectory(*arguments, watched, steps, kept)
    assert kept - 1 <= max(alive) <= kept + 1
    assert not any(ref() is not None for ref in made) and not loss.requires_grad


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


def test_expert_is_sgd(tmp_path, exact, monkeypatch):
    """An expert against a plain loop with the same DSA draws: SGD, lr 0.01, batch 256."""
    data, batches, transform = make_data(100), [], common.transform

    def record(images, *args):
        index = (images[:, None, 0, 0] == data.train[:, 0, 0]).all(2).nonzero()[:, 1]
        batches.append((index, transform(images, *args)))
        return batches[-1][1]

    monkeypatch.setattr(common, "transform", record)
    (trajectory,) = mtt.load_experts(data, Args(data_dir=str(tmp_path), max_start=2), {})
    assert [len(index) for index, _ in batches] == [256, 44] * 2
    orders = torch.cat([index for index, _ in batches]).view(2, 300)
    assert (orders.sort(1).values == torch.arange(300)).all() and (orders[0] != orders[1]).any()

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

    def load(folder, max_start):
        args = Args(data_dir=str(tmp_path / folder), max_start=max_start, expert_epochs=2)
        return mtt.load_experts(data, args, {})

    first, continued = load("a", 1), load("a", 3)
    assert first.shape[:2] == (1, 3) and len(continued[0].unique(dim=0)) == 5
    assert torch.equal(continued, load("b", 3))
    assert torch.equal(continued[:, :3], first) and torch.equal(load("a", 1), first)


def test_experts_of_several_runs(data, tmp_path):
    """--iterations 0 trains a seed's own experts; later runs share all, their own first."""

    def load(**settings):
        experts = mtt.load_experts(data, Args(data_dir=str(tmp_path), **settings), {})
        return experts, len(list(tmp_path.rglob("*.pt")))

    own, _ = load(experts=2, iterations=0)
    other, files = load(experts=2, iterations=0, seed=1)
    union = torch.cat([own, other])
    assert files == 4 and len(union[:, 0].unique(dim=0)) == 4
    for seed, order in ((0, [0, 1, 2, 3]), (1, [0, 2, 3]), (2, [0, 1, 2, 3])):
        shared, files = load(experts=len(order), seed=seed)
        assert torch.equal(shared, union[order]) and files == 4
    third, files = load(iterations=0, seed=2)
    assert files == 5 and not (third == union).flatten(1).all(1).any()


def test_sample_segment():
    """Start and target are M epochs apart on one expert; every expert and t below T+ comes up."""
    experts = (torch.arange(3)[:, None] * 100 + torch.arange(6))[:, :, None].expand(3, 6, 2)
    args, drawn = Args(max_start=3, expert_epochs=2), set()
    for it in range(300):
        start, target = mtt.sample_segment(experts, args, 0, it)
        drawn.add((start[0].item(), target[1].item()))
    assert drawn == {(100 * k + t, 100 * k + t + 2) for k in range(3) for t in range(3)}


def test_experts_that_come_later(data, tmp_path):
    """A run that is continued or scored again keeps its experts, whatever comes later."""
    settings = dict(data_dir=str(tmp_path), experts=2, student_steps=1, lr_images=1.0, epochs=1)
    args = mtt.Args(max_start=1, expert_epochs=1, runs=1, lr_step=0.0, iterations=2, **settings)
    mtt.distill(data, args, tmp_path / "a.pt")
    experts = [path.name for path in tmp_path.rglob("*expert*.pt")]
    args.iterations = 4
    unbroken = mtt.distill(data, args, tmp_path / "whole.pt")
    mtt.load_experts(data, Args(data_dir=str(tmp_path), iterations=0, seed=7), {})
    (later,) = {path.name for path in tmp_path.rglob("*expert*.pt")} - set(experts)
    later = next(tmp_path.rglob(later))
    later.rename(later.with_name("seed0_aaa.pt"))  # the first by name
    for _ in range(2):
        continued = mtt.distill(data, args, tmp_path / "a.pt")
        assert torch.equal(continued["images"], unbroken["images"])
