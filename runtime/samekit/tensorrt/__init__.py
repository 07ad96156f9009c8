"""TensorRT and TensorRT-RTX: the backend, builds and their fingerprints."""
