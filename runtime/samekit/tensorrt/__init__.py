"""The TensorRT backend, for TensorRT and TensorRT-RTX; `samekit.engine.builds` stores the engines."""
