"""Bindings of the engine to real models; only these know diffusers."""
