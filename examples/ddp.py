"""Alignment under plain DistributedDataParallel: torchrun --nproc-per-node 2 examples/ddp.py [STEPS]."""

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import flowback


class Objective(nn.Module):
    """DDP joins the gradients of one module's call, so flow and projector go into one."""

    def __init__(self, flow, align):
        super().__init__()
        self.flow, self.align = flow, align

    def forward(self, noised, labels, clean):
        return self.align(self.flow, noised, labels, clean=clean)


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"

torch.manual_seed(0)  # the same weights in all processes
flow = flowback.create_flow("digits", num_classes=10)
align = flowback.Alignment(
    flow.config, flowback.create_encoder(), order=2, hidden=128, locations=[(3, 2), (4, 2)]
)
model = DistributedDataParallel(Objective(flow, align).to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for step in range(steps):
    seeds = [(step * world + rank) * 16 + i for i in range(16)]  # other images in each process
    fake = torch.Generator().manual_seed(seeds[0])
    clean, labels = torch.rand(16, 1, 8, 8, generator=fake) * 2 - 1, torch.randint(10, (16,), generator=fake)
    clean, labels = clean.to(device), labels.to(device)
    out = model(flow.add_noise(clean, seeds), labels, clean)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()

total = sum(weight.double().sum() for weight in model.parameters())
parts = [torch.zeros_like(total) for _ in range(world)]
distributed.all_gather(parts, total.detach())
if rank == 0:
    same = all(torch.equal(part, parts[0]) for part in parts)
    print(f"{steps} steps of {world} processes; all have the same weights: {same}")
distributed.barrier()  # no process leaves while another still talks to it
distributed.destroy_process_group()
