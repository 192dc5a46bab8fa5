"""Whose file is that? Reading and writing weights, names, checkpoints."""
