"""``tap tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tap_bench.cli.options import (
    BenchDeviceOption,
    BenchDTypeOption,
    BenchModelOption,
    BenchPromptsOption,
    read_budgets,
    setup,
)
from tap_diffusion.apps.cli.options import (
    DType,
    console,
    failed,
    make_writable,
    option,
)
from tap_diffusion.core.errors import ConfigError, UnsupportedModelError, UsageError


def tune(
    model: BenchModelOption = None,
    recipe: Annotated[str | None, option("What", "--recipe", help="As in tap bench.")] = None,
    prompt_file: BenchPromptsOption = None,
    dtype: BenchDTypeOption = DType.auto,
    device: BenchDeviceOption = None,
    budgets: Annotated[
        str, option("What", "--full-steps", help="How many steps run the whole model: a preset for each number.")
    ] = "14,10,8,6",
    steps: Annotated[int | None, option("What", help="Denoising steps.", min=3, default="50")] = None,
    samples: Annotated[int, option("Search", help="Prompts to search on.", min=1)] = 16,
    verified: Annotated[int, option("Search", help="Other prompts to check the result on.", min=1)] = 32,
    evaluations: Annotated[int, option("Search", help="Schedules to try for each number.", min=1)] = 60,
    out: Annotated[Path, option("Output", "--out", "-o", help="Folder for the presets.")] = Path("presets"),
) -> None:
    """Search for the best steps to run in full, for your model and prompts.

    The result is checked on other prompts. Where it isn't better there, the preset holds the default's steps.

    Example: tap tune --model emoji --full-steps 8 --out presets, then tap generate --config presets/8.json
    """
    try:
        chosen, made = setup(model, recipe, prompt_file, dtype, device)
        count = steps or (made.steps if made else 50)
        wanted = read_budgets(budgets)
        for budget in wanted:
            if not 2 <= budget < count:
                raise UsageError(f"{budget} full steps are not between 2 and {count - 1}, one less than the steps")
        make_writable(out)
        from tap_bench.tune import Tuning

        rows = Tuning(chosen, count, wanted, out, samples, verified, evaluations).run()
    except (ConfigError, UnsupportedModelError, UsageError) as error:
        raise failed(error) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. What is done is in {escape(str(out))}; the same call goes on there.")
        raise typer.Exit(130) from None
    table = Table("full steps", "planned", "recommended, dB", "planned, dB", "gain [95 %]", "kept")
    for row in rows:
        low, high = row.get("gain_ci", (0.0, 0.0))
        shown = [f"{row[name]:.2f}" if name in row else "–" for name in ("recommended_db", "planned_db")]
        gain = f"{row['gain_db']:+.2f} [{low:+.2f}, {high:+.2f}]"
        table.add_row(str(row["budget"]), " ".join(map(str, row["planned"])), *shown, gain, row["kept"])
    console.print(table)
    console.print(f"presets {', '.join(f'{budget}.json' for budget in wanted)} in {out}", highlight=False)
