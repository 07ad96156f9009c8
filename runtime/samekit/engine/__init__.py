"""Engine folders: facts about a model, finding and checking the folder, its TensorRT builds, digests."""
