"""Curvature matrices: Kronecker-factored, matrix-free, and cached in files."""
