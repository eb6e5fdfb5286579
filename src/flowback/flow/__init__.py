"""The flow: affine transform, block, stack, likelihood."""

from flowback.flow.tarflow import FlowOutput, Location, TARFlow

__all__ = ["FlowOutput", "Location", "TARFlow"]
