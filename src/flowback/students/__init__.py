"""Students: Transformers that learn from a flow to draw its images in one or a few evaluations."""
