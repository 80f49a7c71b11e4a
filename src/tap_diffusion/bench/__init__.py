"""The bench: TAP against its rivals, each at its best, on trained models; and the training of these models."""

from pathlib import Path

BENCH_DATA = Path(__file__).parent / "models_data"
BASELINE = "tap"  # the method that others are compared to, pair by pair
