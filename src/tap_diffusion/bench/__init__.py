"""Models and measurements for comparing acceleration methods."""
