"""Export SAME checkpoints to engine folders, and run checkpoints in PyTorch.

The entry points of the distribution register the commands and the PyTorch backend.
"""
