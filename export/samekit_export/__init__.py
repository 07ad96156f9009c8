"""Makes engine folders out of SAME checkpoints; needs torch and onnx, and `samekit` imports it only on use."""
