"""The paper's linear Markov process: its equation, its fit, its simulators."""
