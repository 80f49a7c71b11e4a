"""The bench: TAP against its rivals, each at its best, on trained models; and the training of these models."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"  # of models and judges
BASELINE = "tap"  # the method that others are compared to, pair by pair
