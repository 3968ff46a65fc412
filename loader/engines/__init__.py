"""Doors into the engines people have: each engine is imported in its own module, and only there."""
