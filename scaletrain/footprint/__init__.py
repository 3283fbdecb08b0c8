"""The footprint of a run: money, energy and carbon. Needs no jax.

cost      the bill of a run whose speed is known
"""
