from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from flowback import Flow, InputError, ModelConfig, RunConfig, TrainConfig, checkpoint, devices
from flowback.devices import pick_device
from flowback.training import start
from reference import TINY

PRESENT = {"cuda": 0, "xpu": 0, "mps": 0}


@pytest.fixture
def machine(monkeypatch):
    """A machine with these devices."""

    def has(**counts):
        for kind, count in {**PRESENT, **counts}.items():
            module = torch.backends.mps if kind == "mps" else getattr(torch, kind)
            monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
            if kind != "mps":
                monkeypatch.setattr(module, "device_count", lambda count=count: count)

    has()
    return has


def sentence(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        pick_device(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_machine_without_accelerator(machine):
    assert (
        pick_device("auto") == pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    )
    assert sentence("cuda") == "Device cuda is not available: this machine has cpu."
    assert sentence("mps") == "Device mps is not available: this machine has cpu."
    assert sentence(torch.device("cuda", 1)) == "Device cuda:1 is not available: this machine has cpu."


def test_one_gpu(machine):
    machine(cuda=1)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    assert sentence("cuda:7") == "Device cuda:7 is not available: this machine has cpu, cuda:0."


def test_others(machine):
    machine(cuda=2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    machine(mps=1)
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    machine(xpu=1)
    assert pick_device("auto") == torch.device("xpu")


@pytest.mark.parametrize("name", ["foo", "", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:0:1", "meta"])
def test_unknown_names(machine, name):
    assert sentence(name, "--device").startswith(f"--device {name} is unknown; ")
    assert sentence("cdua").endswith("did you mean cuda or cpu?")
    assert sentence("abacus").endswith("known: auto, cpu, cuda, mps, xpu")


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:7"])
def test_a_stored_flow_does_not_call_its_file_damaged(machine, tmp_path, device):
    config = RunConfig(model=ModelConfig(**TINY))
    checkpoint.save(tmp_path / "saved", config, Flow(config.model).state_dict())
    for read in (Flow.from_pretrained, checkpoint.load_weights):
        with pytest.raises(InputError, match=f"^Device {device} is "):
            read(tmp_path / "saved", device)
    assert Flow.from_pretrained(tmp_path / "saved", "auto").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:7"])
def test_training_names_its_option(machine, device):
    with pytest.raises(InputError, match=rf"^--train\.device {device} is "):
        start(TrainConfig(device=device))


def test_several_processes_are_refused_where_they_cannot_be_joined(machine, monkeypatch):
    """Accelerate takes each of them for a run of its own on MPS."""
    machine(mps=1)
    alone = SimpleNamespace(device=torch.device("mps"), num_processes=1)
    monkeypatch.setattr("flowback.training.distributed.PartialState", lambda **_: alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^2 processes were launched, but flowback cannot train on mps"):
        start(TrainConfig(device="mps"))


# --- what this machine has ---


def test_description_of_this_machine(machine, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Abacus", "avx512_bf16": True})
    found = devices.describe()
    assert found["devices"] == {"cpu": "Abacus"}
    assert found["auto"] == "cpu"
    assert found["bf16"] == ["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["extras"]["fid"] == importlib.metadata.version("torch-fidelity")
    monkeypatch.setattr(devices, "_EXTRAS", {"odd": "no-such-package"})
    monkeypatch.setattr(devices.shutil, "which", lambda _: None)
    assert devices.describe()["extras"] == {"odd": None}
    assert devices.describe()["compiler"] is None


def test_description_of_others(machine, monkeypatch):
    """Two CUDA devices, of which one multiplies in bf16, an XPU and an MPS device, which says little."""
    properties = SimpleNamespace(name="Card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (9 if name == "cuda:1" else 7, 5))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    machine(cuda=2, mps=1, xpu=1)
    found = devices.describe()
    assert list(found["devices"]) == ["cpu", "cuda:0", "cuda:1", "mps:0", "xpu:0"]
    assert found["devices"]["cuda:1"] == found["devices"]["xpu:0"] == "Card, 24 GiB"
    assert found["auto"] == "cuda"
    assert found["bf16"] == ["cuda:1", "xpu:0"]


# --- copies to a device ---


def test_only_cuda_copies_from_pinned_memory_without_waiting(monkeypatch):
    """MPS would read what is there when it comes to it."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **options: calls.append(options) or self)
    for kind in ("cuda", "mps", "xpu", "cpu"):
        devices.send(torch.zeros(2), torch.device(kind))
    assert calls == ["pin", {"non_blocking": True}, {}, {}, {}]
