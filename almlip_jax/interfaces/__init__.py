"""Potentials inside other programs: a module for each, which imports that program only when it is asked to."""
