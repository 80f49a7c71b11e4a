"""Full steps that searches on real models found, by the model's name."""

from __future__ import annotations

STEPS = 50  # of the trajectories that were searched
SOURCE = "arXiv 2609.39343, by the final picture, with plain reuse between full steps"

# By hill climbing on PSNR of pictures at 1024x1024 and 1328x1328; of videos, by BudCache's search (arXiv 2606.13496) as
# that study ran it, at 832x480 and 640x480, 65 frames. All that was found is in docs/schedules/found.json.
PRESETS: dict[str, dict[int, tuple[int, ...]]] = {
    "flux.1-dev": {
        9: (0, 1, 2, 3, 5, 8, 13, 27, 49),
        13: (0, 1, 2, 3, 4, 6, 8, 10, 14, 19, 30, 43, 49),
        21: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 24, 30, 38, 46, 49),
    },
    "qwen-image": {
        9: (0, 1, 2, 3, 5, 9, 17, 31, 49),
        13: (0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 23, 37, 49),
        21: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 16, 19, 24, 28, 35, 43, 49),
    },
    "wan2.1-1.3b": {
        9: (0, 1, 2, 3, 5, 7, 20, 41, 49),
        13: (0, 1, 2, 3, 4, 6, 7, 10, 13, 24, 36, 45, 49),
        21: (0, 1, 2, 3, 4, 6, 7, 9, 12, 17, 21, 24, 25, 30, 34, 37, 41, 43, 45, 47, 49),
    },
    "hunyuan-video": {
        9: (0, 1, 2, 3, 5, 8, 13, 40, 49),
        13: (0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 22, 41, 49),
        21: (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 19, 26, 31, 38, 44, 47, 49),
    },
}
