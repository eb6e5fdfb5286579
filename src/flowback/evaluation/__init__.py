"""Figures that can be quoted: distances, likelihoods, accuracies and probes, each with its record."""
