"""Simulation of training as a deviation from the mean path of recorded runs."""
