"""Makes engine folders out of SAME checkpoints; needs torch and onnx, and is never imported by `samekit` itself."""
