"""TAP on Spectrum's windows, which grow: is it its schedule by which Spectrum is ahead on sprites?"""

from collections.abc import Iterator

from tap_diffusion.bench.methods import Method, Setting, Variant, on_engine
from tap_diffusion.bench.methods.spectrum import growing
from tap_diffusion.config import TAPConfig


def variants(setting: Setting) -> Iterator[Variant]:
    """The schedule that is Spectrum's best at 10 and 8 of 50."""
    title = "growing windows after 2"
    yield on_engine(title, TAPConfig(full_steps=growing(setting.steps, setting.budget)[title]))


METHODS = [Method("tap-growing", "tap", "TAP, on Spectrum's schedule", variants)]
