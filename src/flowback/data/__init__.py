"""Images as uint8 tensors: named sets and folders, for training and evaluation alike."""
