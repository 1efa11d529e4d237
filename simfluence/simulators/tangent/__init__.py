"""Simulation of training in function space, under the tangent kernels of recorded runs."""
