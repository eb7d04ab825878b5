"""Computations that have more than one implementation; each lives in a package with one entry point."""
