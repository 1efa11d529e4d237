"""Helpers that several subpackages share; not part of the public API."""
