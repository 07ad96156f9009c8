"""Backends behind one contract (`base.Backend`), opened by name (`selection.open_backend`)."""
