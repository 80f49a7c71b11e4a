"""The binding to diffusers."""
