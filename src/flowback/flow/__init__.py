"""The flow: affine transform, block, stack, likelihood."""

from flowback.flow.tarflow import Flow, FlowOutput, Location

__all__ = ["Flow", "FlowOutput", "Location"]
