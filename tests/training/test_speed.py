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
