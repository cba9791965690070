"""What would make a GPU wait for the host, found without one.

Tensors on the "meta" device have no values: whatever needs one (.item(), `if` on a tensor, a mask
as an index) raises. In addition, a dispatch mode refuses operations that mix devices. The loop of
each method runs two iterations like that, without common.Run, which reads the loss once a minute.
"""

import importlib
import pathlib

import pytest
import torch
from conftest import make_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import haba
import kfs
import mtt

META = torch.device("meta")
# Linear algebra that looks for errors, and operations that copy an index to the device
WAITING = (torch.ops.aten._linalg_check_errors, torch.ops.aten.index_fill_)


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
    """The dispatch mode, and a common.Run that interrupts a loop in its second iteration."""
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
                raise KeyboardInterrupt

    monkeypatch.setattr(common, "Run", Run)
    with mode:
        yield mode


LOOPS = """
mtt --ipc 3 --batch 4 --student-steps 3 --max-start 1
dm --ipc 2
haba --bpc 2 --student-steps 3 --max-start 1
haba --bpc 3 --batch 4 --class-hallucinators --student-steps 3 --max-start 1
haba --objective dm --depth 2
haba --objective dc --matches 2 --net-epochs 2
kfs --decoders 4
kfs --decoders 4 --sample-decoders 2 --backprop 3 --batch-real 5
frepo --ipc 2 --pool 2 --max-age 1 --batch-real 8
translator_fewshot --mode one-net --iterations 1 --adapt-steps 1 --down-sample
translator_fewshot --mode baseline --batch-real 8
translator_fewshot --mode autoencoder --iterations 1 --ae-steps 2
translator_fewshot --mode scratch --iterations 1 --adapt-steps 2 --batch-real 8
translator_fewshot --mode bilevel --batch-real 8 --outer-steps 2 --inner-steps 2
"""


@pytest.mark.parametrize("loop", LOOPS.strip().splitlines())
def test_loop(loop, mode, monkeypatch):
    """No iteration of a method waits for the device."""
    data = make_data(20, META)
    data.indices_by_class = torch.empty(3, 20, dtype=torch.long, device=META)
    data.smallest_class = 20
    experts = torch.empty(2, 3, mtt.flatten(common.ConvNet(data.shape, 3)).numel(), device=META)
    for module in (mtt, haba):
        monkeypatch.setattr(module, "load_experts", lambda *_: experts)
    mean, std = data.preprocess.mean, data.preprocess.std
    decoders = kfs.Decoders(4, kfs.Args(), data.shape, mean, std).to(META)
    factors = torch.empty(3, 5, 12, 2, 2, device=META), decoders
    monkeypatch.setattr(kfs, "start_factors", lambda *_: factors)

    method, *flags = loop.split()
    module = importlib.import_module(method)
    args = common.parse_args(module.Args, {("glyphs", 1): {}}, ["--iterations", "2", *flags])
    with pytest.raises(KeyboardInterrupt):
        module.distill(data, args, pathlib.Path("nowhere.pt"))


def test_mode(mode):
    """The mode and the meta device notice what they should."""
    x, host = torch.empty(3, 3, device=META), torch.ones(3, 3)
    mode.inside = True
    wrong = [lambda: x + host, lambda: x[torch.arange(2)], lambda: host.to(META)]
    wrong += [lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.linalg.cholesky(x)]
    for operation in wrong:
        pytest.raises(RuntimeError, operation)
