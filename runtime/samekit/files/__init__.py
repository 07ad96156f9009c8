"""Files on disk: atomic writes, locks, paths, latents."""
