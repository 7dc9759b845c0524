"""Measurements: the GPU check, its peers and floors, and experiments."""
