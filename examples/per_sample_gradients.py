"""torch.func on a flow: the score of each image, and each image's own gradient of every weight."""

import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import flowback

torch.manual_seed(0)
flow = flowback.create_flow("digits", num_classes=10)
images, labels = torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8)

score = grad(lambda x: flow(x, labels).log_prob.sum())(images)  # ∇ log p(x | label), (8, 1, 8, 8)


def nll(weights, image, label):
    """Nats of one image under other weights."""
    return -functional_call(flow, weights, (image[None], label[None])).log_prob.sum()


weights = {name: weight.detach() for name, weight in flow.named_parameters()}
with sdpa_kernel(SDPBackend.MATH):  # vmap knows this kernel; the others run image by image
    gradients = vmap(grad(nll), in_dims=(None, 0, 0))(weights, images, labels)
norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()

print("norm of the score of each image:", [round(n, 2) for n in score.flatten(1).norm(dim=1).tolist()])
print("norm of each image's gradient: ", [round(n, 2) for n in norms.tolist()])
