"""Files for servers that run engines."""
