"""Weight files: what is read, what is refused, and that nothing in them runs."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from ftn_jax.pretrained import WeightsFileError, read_weights

WEIGHTS = {
    "conv1.weight": np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3),
    "bn1.running_mean": np.array([0.5, -0.5], np.float32),
    "half": np.ones(3000, np.float16),
}


class Payload:
    """Leave a trace on disk if it is ever unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def write(path, weights=WEIGHTS):
    if path.suffix == ".npz":
        np.savez(path, **weights)
    elif path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.from_numpy(w.copy()) for name, w in weights.items()}
        # .th stands for the format before zip archives, as in old checkpoints.
        new = path.suffix != ".th"
        torch.save(tensors, path, _use_new_zipfile_serialization=new)
    return path


def assert_same(found, expected=WEIGHTS):
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        np.testing.assert_array_equal(found[name], w)
        assert found[name].dtype == w.dtype


SUFFIXES = [".npz", ".safetensors", ".pth", ".pt", ".th", ".bin"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reads_every_format_alike(suffix, tmp_path):
    assert_same(read_weights(write(tmp_path / f"net{suffix}")))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_strips_the_data_parallel_prefix(suffix, tmp_path):
    wrapped = {f"module.{name}": w for name, w in WEIGHTS.items()}
    assert_same(read_weights(write(tmp_path / f"net{suffix}", wrapped)))
    mixed = {**WEIGHTS, "module.other": np.zeros(1, np.float32)}
    assert_same(read_weights(write(tmp_path / f"mixed{suffix}", mixed)), mixed)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_unwraps_training_checkpoints(key, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(w) for name, w in WEIGHTS.items()}
    torch.save({"epoch": 3, key: tensors}, tmp_path / "net.pth")
    assert_same(read_weights(tmp_path / "net.pth"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bfloat16_becomes_float32(suffix, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensors = {"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    path = tmp_path / f"net{suffix}"
    save_torch(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert_same(read_weights(path), {"w": np.array([1.5, -2.0], np.float32)})


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".th"])
def test_refuses_truncated_files(suffix, share, tmp_path):
    whole = write(tmp_path / f"whole{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsFileError, match=rf"cut{suffix}: .*[Ff]etch it again"):
        read_weights(path)


def test_refuses_a_damaged_npz(tmp_path):
    path = write(tmp_path / "net.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # the checksum notices
    path.write_bytes(content)
    with pytest.raises(WeightsFileError, match="fetch it again"):
        read_weights(path)


@pytest.mark.parametrize(
    ("actual", "claimed"),
    [(".npz", ".safetensors"), (".safetensors", ".npz"), (".safetensors", ".pth")],
)
def test_refuses_a_wrong_suffix(actual, claimed, tmp_path):
    if claimed == ".pth":
        pytest.importorskip("torch")
    path = write(tmp_path / f"net{actual}").rename(tmp_path / f"net{claimed}")
    with pytest.raises(WeightsFileError, match=rf"net{claimed}"):
        read_weights(path)


def test_refuses_a_lone_array(tmp_path):
    np.save(tmp_path / "net.npy", np.zeros(3))
    (tmp_path / "net.npy").rename(tmp_path / "net.npz")
    with pytest.raises(WeightsFileError, match="not an npz of named arrays"):
        read_weights(tmp_path / "net.npz")


@pytest.mark.parametrize("suffix", [".h5", ".pkl", ""])
def test_refuses_unknown_suffixes(suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(b"weights")
    with pytest.raises(
        WeightsFileError, match=r"unknown suffix .*\.safetensors, \.npz"
    ):
        read_weights(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_a_missing_file(suffix, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"absent{suffix}: no such file"):
        read_weights(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_never_runs_code_in_a_pytorch_file(zipped, nested, tmp_path):
    torch = pytest.importorskip("torch")
    trace = tmp_path / "trace"
    content = {"conv1.weight": Payload(trace)} if nested else Payload(trace)
    path = tmp_path / "evil.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        WeightsFileError, match=r"evil\.pth.*Nothing in it was executed"
    ):
        read_weights(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the payload is a live one
    assert trace.exists()


def test_never_runs_code_in_an_npz(tmp_path):
    trace = tmp_path / "trace"
    path = tmp_path / "evil.npz"
    np.savez(path, w=np.array([Payload(trace)], dtype=object))
    with pytest.raises(
        WeightsFileError, match=r"evil\.npz.*Nothing in it was executed"
    ):
        read_weights(path)
    assert not trace.exists()
    np.load(path, allow_pickle=True)["w"]  # the payload is a live one
    assert trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"w": 3.0}, {"w": {"x": 1}}, {5: 1.0}])
def test_refuses_other_content(content, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(WeightsFileError, match=r"net\.pth: .*model\.state_dict\(\)"):
        read_weights(tmp_path / "net.pth")


def test_refuses_a_pytorch_too_old_to_be_safe(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    path = write(tmp_path / "net.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ImportError, match=r"torch >= 2\.6, found 2\.5\.1"):
        read_weights(path)


def test_says_which_extra_brings_pytorch(tmp_path, monkeypatch):
    (tmp_path / "net.pth").write_bytes(b"anything")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'ftn_jax\[torch\]'"):
        read_weights(tmp_path / "net.pth")
