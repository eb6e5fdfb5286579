import subprocess
import sys

import pytest
import torch

import runs
from flowback.flow.cost import flops_per_image
from flowback.training.monitoring import peak_flops, peak_memory, step_flops


def test_a_step_is_three_encode_passes_of_its_images():
    config = runs.tiny_config()
    assert step_flops(config) == 3 * 16 * flops_per_image(config.model)


def test_peaks_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA L40S", "fp32") == 91.6e12
    assert peak_flops("NVIDIA L4", "fp32") == 30.3e12
    assert peak_flops("NVIDIA A10G", "bf16") is None  # not an A100
    assert peak_flops("AMD EPYC 9R14", "fp32") is None


def test_peak_memory_of_the_process():
    """Never falls, and grows with what is held."""
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB, touched
    after = peak_memory(torch.device("cpu"))
    assert before > 2**26  # PyTorch alone takes more than 64 MiB
    assert after >= before
    assert after >= held.numel() * 4


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is not taken over from the parent")
def test_peak_memory_does_not_begin_at_that_of_the_parent():
    """The system's own count does: a process that is started by a large one would look as large."""
    held = torch.ones(2**28)  # 1 GiB, touched
    code = "import torch, flowback.training.monitoring as m; print(m.peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.numel() * 4
