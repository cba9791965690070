"""What would make a GPU wait for the host, found without one.

Tensors on the "meta" device have no values: whatever needs one (.item(), `if` on a tensor, a mask
as an index) raises. In addition, a dispatch mode refuses operations that mix devices. The loop of
each method, as it is, runs two iterations like that; common.Run, which looks at the loss once a
minute, is replaced.
"""

import pathlib

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
import translator_fewshot as translator

SHAPE, META = (3, 16, 16), torch.device("meta")
MATCHING = dict(student_steps=3, max_start=1, expert_epochs=2)
# Linear algebra that looks for errors, and operations that copy an index to the device
WAITING = (torch.ops.aten._linalg_check_errors, torch.ops.aten.index_fill_)


class Finished(Exception):
    pass


class OnDevice(TorchDispatchMode):
    """Within a loop, operations have to keep to one device; 0-d tensors may be the host's."""

    inside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {x.device for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.ndim}
        if devices and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        if self.inside and (len(devices) > 1 or function.overloadpacket in WAITING):
            raise RuntimeError(f"{function} on {devices} waits for the device")
        return function(*args, **kwargs)


@pytest.fixture
def mode(monkeypatch):
    """The dispatch mode, and a common.Run that ends a loop of two iterations by Finished."""
    mode = OnDevice()

    class Run:
        start = 0

        def __init__(self, path, data, args, steps=None, inputs=None):
            self.record, self.iterations = {}, args.iterations if steps is None else steps

        def restore(self, *_):
            mode.inside = True

        def step(self, it, loss):
            assert loss.device == META
            mode.inside = it + 1 < self.iterations
            if it == 1:
                raise Finished

    monkeypatch.setattr(common, "Run", Run)
    with mode:
        yield mode


@pytest.fixture
def data(mode, monkeypatch):
    """A Dataset of 60 images without values."""
    images = torch.empty(60, *SHAPE, device=META)
    labels = torch.empty(60, dtype=torch.long, device=META)
    mean = torch.empty(3, 1, 1, device=META)
    preprocess = common.Preprocess("standardize", mean, mean)
    arrays = images, labels, images, labels
    data = common.Dataset("meta", ["a", "b", "c"], *arrays, preprocess, "meta", "meta")
    data.indices_by_class = torch.empty(3, 20, dtype=torch.long, device=META)
    data.smallest_class = 20
    parameters = mtt.flatten(common.ConvNet(SHAPE, 3)).numel()
    experts = torch.empty(2, 3, parameters, device=META)
    for module in (mtt, haba):
        monkeypatch.setattr(module, "load_experts", lambda *_: experts)
    decoders = kfs.Decoders(4, kfs.Args(), SHAPE, mean, mean).to(META)
    factors = torch.empty(3, 5, 12, 2, 2, device=META), decoders
    monkeypatch.setattr(kfs, "start_factors", lambda *_: factors)
    return data


LOOPS = [
    (mtt, dict(ipc=3, batch=4, **MATCHING)),
    (dm, dict(ipc=2)),
    (haba, dict(bpc=2, **MATCHING)),
    (haba, dict(bpc=3, batch=4, class_hallucinators=True, **MATCHING)),
    (haba, dict(objective="dm", depth=2)),
    (haba, dict(objective="dc", matches=2, net_epochs=2)),
    (kfs, dict(decoders=4)),
    (kfs, dict(decoders=4, sample_decoders=2, backprop=3, batch_real=5)),
    (frepo, dict(ipc=2, pool=2, max_age=1, batch_real=8)),
    (translator, dict(mode="one-net", adapt_steps=0, down_sample=True)),
    (translator, dict(mode="baseline", batch_real=8)),
    (translator, dict(mode="autoencoder", iterations=1, ae_steps=2)),
    (translator, dict(mode="scratch", iterations=1, adapt_steps=2, batch_real=8)),
    (translator, dict(mode="bilevel", batch_real=8, outer_steps=2, inner_steps=2)),
]


@pytest.mark.parametrize("method, settings", LOOPS)
def test_loop(method, settings, data):
    """No iteration of a method waits for the device."""
    with pytest.raises(Finished):
        method.distill(
            data, method.Args(**dict(iterations=2) | settings), pathlib.Path("nowhere.pt")
        )


def test_mode(mode):
    """The mode and the meta device notice what they should."""
    x, host = torch.empty(3, 3, device=META), torch.ones(3, 3)
    mode.inside = True
    for wrong in (
        lambda: x + host,
        lambda: x[torch.arange(2)],
        lambda: host.to(META),
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: torch.linalg.cholesky(x),
    ):
        with pytest.raises(RuntimeError):
            wrong()
