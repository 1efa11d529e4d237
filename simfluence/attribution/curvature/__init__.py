"""Curvature matrices: Kronecker-factored, matrix-free, and kept in files."""
