"""Codes of electronic structure, one file each: how settings of a label reach the code through ASE's calculator of it.

A file here that declares a `base.Code` makes the code known (``oracle: {kind: ase, code: NAME}``); a package declares
its own in a module of its entry point.
"""
