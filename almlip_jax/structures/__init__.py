"""Structures: graphs, batches, neighbour lists, species, files."""
