"""Checkpoints that are elsewhere: object stores, web servers and the hub, read in ranges and not copied to a disk."""
