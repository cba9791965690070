"""The programs as a user meets them: whole runs, files, kills, mistakes."""
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import common
import evaluate
import haba
import mtt
from conftest import ROOT, make_folder

STEPS = 40  # iterations of an unbroken run: about a second
SHORT = ("--experts", 2, "--max-start", 1, "--expert-epochs", 1, "--student-steps", 2, "--runs", 2, "--epochs", 3,
         "--device", "cpu")
CALM = {mtt: ("--lr-images", 10), haba: ("--lr-bases", 1, "--lr-hallucinators", .01)}  # rates for tiny pictures
METHODS = pytest.mark.parametrize("method", (mtt, haba), ids=("mtt", "haba"))


def flags(method, home, out, *more):
    """A command line for a short run on home/tiny."""
    return "--data-dir", home, "--dataset", "tiny", "--out", out, *SHORT, *CALM[method], *more


def distilled_file(method, out):
    return out / f"{method.METHOD}_tiny_{'bpc' if method is haba else 'ipc'}1.pt"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A data folder with the data set `tiny` in it and, after the first run, experts."""
    return make_folder(tmp_path_factory.mktemp("home") / "tiny").parent


@pytest.fixture(scope="session")
def finished(home, tmp_path_factory):
    """{method: the folder of its unbroken run of STEPS iterations}."""
    folders = {}
    for method in (mtt, haba):
        folders[method] = tmp_path_factory.mktemp(method.METHOD)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{method.METHOD}.py", *map(str, flags(method, home, folders[method], "--iterations", STEPS))])
            common.run(method.main)
    return folders


def same_tensors(one, other):
    """Whether two distilled files hold the same but for the time they took."""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
               for key, value in one.items() if key not in ("seconds", "settings"))


# ------------------------------------------------------------------------------------------ whole runs

@METHODS
def test_distilled_file(method, finished):
    """The file says all that is needed to use it, and counts every stored floating number."""
    path = distilled_file(method, finished[method])
    stored = torch.load(path, weights_only=True)
    fields = {"method": method.METHOD, "dataset": "tiny", "classes": ["ant", "bee", "cat"], "per_class": 1,
              "network": "convnet2", "seed": 0, "shape": [3, 16, 16], "preprocess": "standardise", "iterations": STEPS}
    assert fields.items() <= {k: v for k, v in stored.items() if not torch.is_tensor(v)}.items()
    assert stored["fingerprint"].startswith("standardise-") and "DSA" in stored["augmentation"]
    assert 0.001 <= stored["step_size"] < 1 and stored["settings"]["student_steps"] == 2
    tensors = {name: value for name, value in stored.items() if torch.is_tensor(value)}
    numbers = sum(value.numel() for value in tensors.values() if value.is_floating_point())
    of_hallucinators = 5 * (2 * 3 * 16 * 16 + 2 * (3 * 3 * 9 + 3))  # scale, shift; two convolutions and biases
    assert stored["stored_per_class"] == numbers / 3 == 3 * 16 * 16 + (of_hallucinators / 3 if method is haba else 0)
    assert all(value.isfinite().all() for value in tensors.values())
    assert stored["labels"].tolist() == [0, 1, 2]


@METHODS
def test_results_and_picture(method, finished):
    """results.jsonl has the score and what it takes to repeat it; the picture can be read and is not one colour."""
    line, = map(json.loads, (finished[method] / "results.jsonl").read_text().splitlines())
    assert {"method", "dataset", "per_class", "stored_per_class", "network", "accuracy", "std", "runs", "random_accuracy",
            "random_std", "iterations", "seconds", "device", "torch", "seed", "command"} <= line.keys()
    assert line["method"] == method.METHOD and line["runs"] == 2 and line["epochs"] == 3 and line["iterations"] == STEPS
    assert 0 <= line["accuracy"] <= 100 and 0 <= line["random_accuracy"] <= 100 and "--student-steps 2" in line["command"]
    storage = torch.load(distilled_file(method, finished[method]), weights_only=True)["stored_per_class"]
    assert line["random_images_per_class"] == -(-storage // (3 * 16 * 16))  # the same storage, rounded up
    with Image.open(distilled_file(method, finished[method]).with_suffix(".png")) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) >= 64 and len(picture.convert("RGB").getcolors(10 ** 6)) > 100


@METHODS
def test_distillation_moves(method, finished, home):
    """What is distilled has left the real images that it started from (every hallucinator its start, too)."""
    stored = torch.load(distilled_file(method, finished[method]), weights_only=True)
    data = common.load_dataset("tiny", home)
    start, labels = data.random_real(1, 0, "bases" if method is haba else "images")
    assert labels.tolist() == stored["labels"].tolist()
    now = stored["bases" if method is haba else "images"]
    assert 1e-4 < (now - start).abs().max() < 10 and not torch.equal(now, start)
    if method is haba:
        assert (stored["hallucinators.shift"].flatten(1).norm(dim=1) > 0).all()


@METHODS
def test_evaluate(method, finished, home, tmp_path, call):
    """evaluate.py finds the accuracies that the method printed, to the last digit, and twice the same."""
    path = distilled_file(method, finished[method])
    first = json.loads((finished[method] / "results.jsonl").read_text().splitlines()[0])
    for _ in range(2):
        status, out, err = call(evaluate, path, "--data-dir", home, "--runs", 2, "--epochs", 3, "--device", "cpu", "--out", tmp_path)
        assert status == 0, err
    lines = list(map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()))
    assert len(lines) == 2
    for line in lines:
        for key in ("method", "accuracy", "std", "random_accuracy", "random_std", "stored_per_class", "iterations"):
            assert line[key] == first[key], key


@METHODS
def test_other_settings(method, home, tmp_path, call):
    """The optional parts run and are stored: 2 a class, small grey bases, learned labels, 2 blocks, one hallucinator."""
    more = ("--hallucinators", 1, "--basis-channels", 1, "--basis-size", 8, "--channels", 5, "--depth", 2,
            "--learn-labels", "--bpc", 2) if method is haba else ("--ipc", 2)
    status, _, err = call(method, *flags(method, home, tmp_path, "--iterations", 2, *more))
    assert status == 0, err
    stored = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)
    if method is haba:
        assert stored["bases"].shape == (6, 1, 8, 8) and stored["labels"].shape == (6, 3)
        blocks = sum(9 * inside * outside + outside for inside, outside in ((1, 5), (5, 10), (10, 5), (5, 3)))
        counted = 6 * 64 + 2 * 10 * 64 + blocks  # bases, scale and shift at half the side; labels are not counted
        assert stored["stored_per_class"] == counted / 3
    else:
        assert stored["images"].shape == (6, 3, 16, 16) and stored["labels"].tolist() == [0, 0, 1, 1, 2, 2]


@METHODS
def test_copied_alone(method, home, tmp_path):
    """A method and common.py, copied into an empty folder, are enough."""
    for name in (f"{method.METHOD}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, f"{method.METHOD}.py", *map(str, flags(method, home, "out", "--iterations", 1))]
    ended = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": ""})
    assert ended.returncode == 0, ended.stderr
    assert distilled_file(method, tmp_path / "out").is_file() and "% on the test set" in ended.stdout


@pytest.mark.parametrize("module", (mtt, haba, evaluate), ids=("mtt", "haba", "evaluate"))
def test_help(module, call):
    """--help fits a screen of 40 lines of 120 columns."""
    status, out, _ = call(module, "--help")
    assert status == 0 and "usage:" in out and len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 120


# ------------------------------------------------------------------------------------------ kills and going on

DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
die, method = int(sys.argv[2]), sys.argv[3]
sys.argv[:] = [method + ".py", *sys.argv[4:]]
import common
import torch
torch.set_num_threads(1)
module = __import__(method)
assert common.iterations.__defaults__ == (60,)
common.iterations.__defaults__ = (0,)  # a checkpoint after every iteration
calls, fsync = 0, os.fsync
def dying_fsync(file):  # SIGKILL in the midst of the die-th writing of a file
    global calls
    calls += 1
    if calls == die:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = dying_fsync
common.run(module.main)
"""


@METHODS
def test_killed(method, finished, home, tmp_path):
    """SIGKILL while experts, checkpoints and the distilled file are written and at random moments: the run that goes
    on ends with the unbroken run's tensors bit for bit. The unbroken run wrote one checkpoint; this one, every time."""
    away, out = tmp_path / "home", tmp_path / "out"
    shutil.copytree(home / "tiny", away / "tiny")
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def start(die, **pipes):
        return subprocess.Popen([sys.executable, driver, ROOT, str(die), method.METHOD,
                                 *map(str, flags(method, away, out, "--iterations", STEPS))],
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, **pipes)

    # Writes: the probe 1, experts 2 to 5, then checkpoints, the distilled file, the picture. Each start goes on.
    for die in (3, 4, 4, 3):  # killed at an expert's 2nd epoch, another's, at a checkpoint, at a checkpoint
        assert start(die).wait() == -signal.SIGKILL
    files = {path.name for path in (away / "experts").glob("*/*.pt")}
    assert files == {"seed0_expert000.pt", "seed0_expert001.pt"} and len(list(out.glob("*.ckpt"))) == 1
    dice = random.Random(method.METHOD)
    checkpoint = next(out.glob("*.ckpt"))
    for _ in range(3):
        before = (checkpoint.stat().st_mtime_ns, list(out.glob("*.tmp")))
        run = start(0, stderr=subprocess.DEVNULL)
        while run.poll() is None and (checkpoint.stat().st_mtime_ns, list(out.glob("*.tmp"))) == before:
            time.sleep(.005)
        time.sleep(dice.uniform(0, .1))
        run.kill()
        run.wait()
    assert start(0).wait() == 0
    assert same_tensors(distilled_file(method, out), distilled_file(method, finished[method]))
    for path in home.glob("experts/*/*.pt"):
        broken, whole = (torch.load(p, weights_only=True)["trajectory"] for p in (away / path.relative_to(home), path))
        assert torch.equal(broken, whole)


@METHODS
def test_interrupted(method, finished, home, tmp_path, call, monkeypatch):
    """Ctrl-C in the third iteration: a checkpoint, status 130, a message that says how to go on; going on ends with
    the unbroken run's tensors. Ctrl-C while it scores: status 130 too."""
    draw_start, command = common.draw_start, flags(method, home, tmp_path, "--iterations", STEPS)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored

    def interrupt(experts, settings, seed, it):
        if it == 2:
            signal.raise_signal(signal.SIGINT)
        return draw_start(experts, settings, seed, it)

    monkeypatch.setattr(common, "draw_start", interrupt)
    status, out, err = call(method, *command)
    name = distilled_file(method, tmp_path).with_suffix(".ckpt")
    assert status == 130 and str(name) in err and f"iteration 3 of {STEPS}" in err and "same command" in err and "Traceback" not in err
    assert torch.load(name, weights_only=True)["iteration"] == 3 and not distilled_file(method, tmp_path).exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # as it was
    monkeypatch.setattr(common, "draw_start", draw_start)
    with monkeypatch.context() as patch:
        patch.setattr(common, "accuracy", lambda *_: signal.raise_signal(signal.SIGINT))
        status, out, err = call(method, *command)
    assert status == 130 and "Traceback" not in err and "same command" in err
    assert same_tensors(distilled_file(method, tmp_path), distilled_file(method, finished[method]))
    losses, unbroken = (torch.load(file.with_suffix(".ckpt"), weights_only=True)["losses"]
                        for file in (name, distilled_file(method, finished[method])))
    assert torch.equal(losses, unbroken) and len(losses.unique()) == STEPS and losses.isfinite().all()
    assert call(method, *command)[0] == 0


def test_more_iterations(finished, home, tmp_path, call):
    """A finished run of 2 iterations goes on to STEPS and ends as an unbroken run does; back to 2 is refused."""
    assert call(haba, *flags(haba, home, tmp_path, "--iterations", 2))[0] == 0
    assert call(haba, *flags(haba, home, tmp_path, "--iterations", STEPS))[0] == 0
    assert same_tensors(distilled_file(haba, tmp_path), distilled_file(haba, finished[haba]))
    told(*call(haba, *flags(haba, home, tmp_path, "--iterations", 2)), "past --iterations 2")


def test_left_behind(tmp_path):
    """A file is written: what a killed process left beside it an hour ago goes away, what was written now stays, and so
    does what lies beside other files."""
    old, other, young = (tmp_path / name for name in ("kept.pt.11.tmp", "other.pt.11.tmp", "kept.pt.12.tmp"))
    for path in (old, other, young):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 3600,) * 2)
    common.write(b"whole", tmp_path / "kept.pt")
    assert not old.exists() and other.exists() and young.exists() and (tmp_path / "kept.pt").read_bytes() == b"whole"


# ------------------------------------------------------------------------------------------ mistakes

def told(status, out, err, *words):
    """A mistake is told well: status 2, one line from the program, the last one, with `words` in it, no traceback."""
    lines = [line for line in err.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(("haba.py:", "mtt.py:", "evaluate.py:"))]
    assert status == 2, (status, err)
    assert len(own) == 1 and own[0] == lines[-1] and "Traceback" not in err, err
    for word in words:
        assert str(word) in own[0], err


@pytest.fixture
def folder(tmp_path):
    """A data set that a test may spoil: tmp_path/tiny."""
    return make_folder(tmp_path / "tiny", train=2, test=1)


def spoil_nothing_there(folder):
    shutil.rmtree(folder)
    return "unknown data set", "tiny", "glyphs"


def spoil_no_train(folder):
    (folder / "train").rename(folder / "training")
    return "no train/",


def spoil_no_test(folder):
    shutil.rmtree(folder / "test")
    return "no test/", "val/"


def spoil_one_class(folder):
    for name in ("bee", "cat"):
        shutil.rmtree(folder / "train" / name)
    return "1 class",


def spoil_empty_class(folder):
    for file in (folder / "train" / "bee").iterdir():
        file.unlink()
    return folder / "train" / "bee", "no pictures"


def spoil_class_without_test(folder):
    shutil.rmtree(folder / "test" / "bee")
    return "'bee'", folder / "test"


def spoil_class_without_train(folder):
    shutil.rmtree(folder / "train" / "bee")
    return "'bee'", folder / "train"


def spoil_text_as_picture(folder):
    (folder / "test" / "cat" / "x.png").write_text("not a picture")
    return folder / "test" / "cat" / "x.png",


def spoil_half_a_picture(folder):
    path = folder / "train" / "ant" / "00.png"
    path.write_bytes(path.read_bytes()[:300])
    return path,


def spoil_sizes(folder):
    Image.new("RGB", (20, 16)).save(folder / "train" / "ant" / "wide.png")
    return "2 sizes", "--size"


def spoil_tiny_pictures(folder):
    for path in folder.glob("*/*/*.png"):
        Image.new("RGB", (8, 8)).save(path)
    return "8x8", "--size"


SPOILS = [value for name, value in list(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__[6:])
def test_bad_folder(spoil, folder, tmp_path, call):
    """A spoilt data folder is told in one line that names what is wrong and where."""
    words = spoil(folder)
    told(*call(haba, *flags(haba, tmp_path, tmp_path / "out", "--iterations", 1)), *words)


def test_sizes_with_size(folder, tmp_path, call):
    """--size, which the message about several sizes advises, helps."""
    spoil_sizes(folder)
    status, _, err = call(mtt, *flags(mtt, tmp_path, tmp_path / "out", "--iterations", 1, "--size", 16))
    assert status == 0, err


@pytest.mark.parametrize("more, words", (
    (("--bpc", 0), ("--bpc", "0")), (("--bpc", -1), ("--bpc",)), (("--bpc", "many"), ("--bpc", "many")),
    (("--bpc", 9), ("9 images", "has 8")), (("--lr-bases", "nan"), ("--lr-bases",)), (("--lr-bases", "1e40"), ("--lr-bases",)), (("--no-such-flag",), ("--no-such-flag",)),
    (("--device", "toaster"), ("--device toaster",)), (("--depth", 0, "--channels", 8), ("--depth 0",)),
    (("--size", 8), ("8x8", "--size"))), ids=str)
def test_bad_flag(more, words, home, tmp_path, call):
    """A flag's value that cannot be is told in one line that names the flag."""
    told(*call(haba, *flags(haba, home, tmp_path, "--iterations", 1, *more)), *words)


def test_compile_without_a_compiler(home, tmp_path, call, monkeypatch):
    """--compile is refused before any expert is trained where nothing can be compiled."""
    def fails(*_, **__):
        raise RuntimeError("no compiler")
    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(common, "load_experts", None)
    told(*call(haba, *flags(haba, home, tmp_path, "--iterations", 1, "--compile")), "--compile", "C++ compiler")


@pytest.mark.parametrize("method", (mtt, haba))
def test_compile(method, home, tmp_path, call, monkeypatch):
    """--compile reaches the student's steps, and a checkpoint knows it."""
    given = []
    monkeypatch.setattr(torch, "compile", lambda f, **more: [given.append(f.__name__), f][1])
    assert call(method, *flags(method, home, tmp_path, "--iterations", 1, "--compile"))[0] == 0
    assert given == ["<lambda>", "pure_gradient", "pure_pull_back"]
    told(*call(method, *flags(method, home, tmp_path, "--iterations", 2)), "compile", "checkpoint of other settings")


def test_depth_beyond_size(tmp_path, call):
    """Images that cannot be halved depth - 1 times and come back to their size: told, not a traceback."""
    make_folder(tmp_path / "tiny", train=2, test=1, size=18)
    told(*call(haba, *flags(haba, tmp_path, tmp_path / "out", "--iterations", 1, "--depth", 3)), "--depth")


def test_out_not_writable(home, tmp_path, call):
    """An --out below a regular file is refused before any work; the message names the path."""
    (tmp_path / "file").write_text("")
    told(*call(haba, *flags(haba, home, tmp_path / "file" / "out", "--iterations", 1)), tmp_path / "file", "cannot be written")


@METHODS
def test_full_disk(method, finished, home, tmp_path, call):
    """No room for a checkpoint: one line, the checkpoint before is whole, no half file stays; with room it goes on."""
    assert call(method, *flags(method, home, tmp_path, "--iterations", 2))[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        ended = call(method, *flags(method, home, tmp_path, "--iterations", STEPS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told(*ended, "cannot be written", "space")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert call(method, *flags(method, home, tmp_path, "--iterations", STEPS))[0] == 0
    assert same_tensors(distilled_file(method, tmp_path), distilled_file(method, finished[method]))


@METHODS
def test_loss_not_finite(method, home, tmp_path, call):
    """A learning rate that blows the loss up is told, with what to change; no distilled file is written."""
    rates = ("--lr-bases", "1e30", "--lr-hallucinators", "1e30") if method is haba else ("--lr-images", "1e30")
    told(*call(method, *flags(method, home, tmp_path, "--iterations", STEPS, *rates)), "not finite", "smaller learning rates")
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("part", ("tensor", "module"))
def test_checkpoint_is_finite(part, tmp_path):
    """A state that is not finite after a finite loss (it overflowed in the last step) is refused, not written."""
    state = {"tensor": torch.zeros(3), "module": torch.nn.Linear(2, 2)}
    with pytest.raises(common.UserError, match="not finite"):
        for _ in common.iterations(1, tmp_path / "x.ckpt", {}, state, {"loss": torch.zeros(())}):
            (state["tensor"] if part == "tensor" else state["module"].weight.detach())[0] = torch.nan
    assert not (tmp_path / "x.ckpt").exists()


def test_other_checkpoint(finished, home, tmp_path, call):
    """A checkpoint of other settings, or a broken one, is told by name and is left alone."""
    name = distilled_file(haba, tmp_path).with_suffix(".ckpt")
    shutil.copy(finished[haba] / name.name, name)
    told(*call(haba, *flags(haba, home, tmp_path, "--iterations", STEPS, "--depth", 2)), name, "depth")
    assert name.read_bytes() == (finished[haba] / name.name).read_bytes()
    name.write_bytes(name.read_bytes()[:5000])
    told(*call(haba, *flags(haba, home, tmp_path, "--iterations", STEPS)), name, "cannot be read")


@pytest.mark.parametrize("content", (b"junk", {"setting": {"network": "convnet9"}, "trajectory": torch.zeros(3, 4)}, {}),
                         ids=("broken", "other", "empty"))
def test_other_expert(content, finished, home, tmp_path, call):
    """An expert that is broken or of another setting is told by name."""
    away = tmp_path / "home"
    shutil.copytree(home, away)
    expert = next(away.glob("experts/*/seed0_expert001.pt"))
    expert.write_bytes(content) if isinstance(content, bytes) else torch.save(content, expert)
    told(*call(haba, *flags(haba, away, tmp_path / "out", "--iterations", 1)), expert)


def broken(path):
    path.write_bytes(path.read_bytes()[:3000])
    return "cannot be read"


def foreign(path):
    torch.save({"weights": torch.zeros(3)}, path)
    return "not a distilled file"


def pickled(path):
    torch.save([pathlib.Path("x")], path)  # code, which weights_only refuses
    return "cannot be read"


def incomplete(path):
    torch.save({"format": "distilled 1"}, path)
    return path.name


def missing(path):
    path.unlink()
    return "does not exist"


def other_program(path):
    torch.save(torch.load(path, weights_only=True) | {"method": "os"}, path)
    return "'os'"


@pytest.mark.parametrize("spoil", (broken, foreign, pickled, incomplete, missing, other_program), ids=lambda spoil: spoil.__name__)
def test_bad_distilled_file(spoil, finished, home, tmp_path, call):
    """evaluate.py tells a file that it cannot use by name."""
    path = shutil.copy(distilled_file(haba, finished[haba]), tmp_path / "file.pt")
    word = spoil(path)
    told(*call(evaluate, path, "--data-dir", home, "--runs", 1, "--epochs", 1), path, word)


@pytest.mark.parametrize("change, word", ((dict(grey=True), "image shape"), (dict(classes=("ant", "bee", "dog")), "classes"),
                                          (dict(train=9), "preprocessing")), ids=lambda value: str(value))
def test_other_data(change, word, finished, tmp_path, call):
    """A distilled file is not scored on other data: grey for colour, other classes, other training images."""
    make_folder(tmp_path / "tiny", **change)
    path = distilled_file(mtt, finished[mtt])
    told(*call(evaluate, path, "--data-dir", tmp_path, "--runs", 1, "--epochs", 1, "--out", tmp_path), path, word)


def test_svhn_without_scipy(tmp_path, call, monkeypatch):
    """SVHN where scipy is missing: the line says to install it."""
    import torchvision
    monkeypatch.setattr(torchvision.datasets.SVHN, "download", lambda self: None)
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    told(*call(mtt, *SHORT, "--dataset", "svhn", "--data-dir", tmp_path, "--out", tmp_path), "pip install scipy")


def test_download_fails(tmp_path, call, monkeypatch):
    """A download that fails is told with the data set's name and folder."""
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    told(*call(mtt, *SHORT, "--dataset", "cifar10", "--data-dir", tmp_path, "--out", tmp_path), "cifar10", tmp_path, "no route")


# ------------------------------------------------------------------------------------------ folders

def test_folder(tmp_path):
    """Classes in alphabetical order, each picture with its class; the cache gives the same; a new picture is seen."""
    make_folder(tmp_path / "tiny", classes=("bee", "ant"), train=2, test=1)
    for split in ("train", "test"):  # a plain colour tells the class
        for path in (tmp_path / "tiny" / split).glob("*/*.png"):
            Image.new("RGB", (16, 16), (255, 0, 0) if path.parent.name == "bee" else (0, 0, 255)).save(path)
    first = common.load_dataset("tiny", tmp_path)
    assert first.classes == ["ant", "bee"] and first.train_labels.tolist() == [0, 0, 1, 1]
    pixels = first.preprocess.undo(first.train)
    assert torch.allclose(pixels[:2, 2], torch.ones(2, 16, 16), atol=1e-5) and pixels[:2, 0].abs().max() < 1e-5
    assert list((tmp_path / "tiny").glob(".cache*"))
    again = common.load_dataset("tiny", tmp_path)
    assert torch.equal(again.train, first.train) and torch.equal(again.test_labels, first.test_labels)
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "tiny" / "train" / "ant" / "new.png")
    assert len(common.load_dataset(str(tmp_path / "tiny")).train) == 5


def test_grey_folder(tmp_path):
    """Grey pictures have one channel, and a val/ folder does for test/."""
    make_folder(tmp_path / "tiny", grey=True, train=2, test=1)
    (tmp_path / "tiny" / "test").rename(tmp_path / "tiny" / "val")
    data = common.load_dataset("tiny", tmp_path)
    assert data.shape == (1, 16, 16) and len(data.test) == 3
