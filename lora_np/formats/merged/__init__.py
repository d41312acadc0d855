"""Base and adapters as one model on the disk; what is in an adapter, and whether a folder is a merge."""
