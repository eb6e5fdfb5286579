from __future__ import annotations

import pytest
import torch

from flowback import Flow, InputError, ModelConfig, RunConfig, TrainConfig, checkpoint
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
