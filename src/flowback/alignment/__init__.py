"""Alignment of the flow's features with a frozen encoder's: encoders, loss, and where gradients flow."""
