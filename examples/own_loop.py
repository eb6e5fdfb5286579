"""Reverse alignment in a plain PyTorch loop on scikit-learn's digits: python examples/own_loop.py [STEPS]."""

import sys

import torch
from sklearn.datasets import load_digits

import flowback

STEPS, BATCH = int(sys.argv[1]) if len(sys.argv) > 1 else 600, 64
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (n, 1, 8, 8) on [-1, 1]
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(images)).tensor_split([-360])

flow = flowback.create_flow("digits", num_classes=10)
encoder = flowback.create_encoder("efficientnet_lite0")
settings = flowback.AlignmentConfig("reverse", "exact", hidden=128, locations=[(3, 2), (4, 2)])
align = flowback.Alignment(flow.config, encoder, settings=settings)
parameters = [*flow.parameters(), *align.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)

for step in range(STEPS):
    batch = train[torch.randint(len(train), (BATCH,))]
    noised = flow.add_noise(images[batch], seeds=range(step * BATCH, (step + 1) * BATCH))
    out = align(flow, noised, labels[batch], drop=torch.rand(BATCH) < 0.02, clean=images[batch])
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    if (step + 1) % 100 == 0 or step + 1 == STEPS:
        print(f"step {step + 1}: nll {out.nll:.4f} nats/dim, cosine with the encoder {out.cosine:.3f}")

scores = flowback.classify(flow, images[test])
print(f"training-free accuracy: {(scores.argmax(1) == labels[test]).float().mean():.1%} of 360 test images")
flow.save_pretrained("own_loop")
print("saved: flowback sample own_loop --out samples")
