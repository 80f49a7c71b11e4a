"""The embedded model `emoji`, a small, real FLUX: its pictures and its training.

``tap_diffusion_demo`` has its weights.
"""
