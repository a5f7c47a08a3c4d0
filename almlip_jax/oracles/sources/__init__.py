"""The label sources, one file each: its settings, and the function they build."""
