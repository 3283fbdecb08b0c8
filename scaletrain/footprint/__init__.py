"""What a run takes from the world: money, energy and carbon. Needs no jax.

cost      of a run whose speed is known
"""
