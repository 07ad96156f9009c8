"""Makes engine folders from SAME checkpoints, and runs checkpoints in PyTorch. Its entry points register both."""
