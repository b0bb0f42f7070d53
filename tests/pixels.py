"""Videos as the tests compare them."""

from pathlib import Path

import torch
from torch import Tensor

from common.video import read_frames


def read_video(path: Path) -> Tensor:
    """All frames of a video file, float [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(read_frames(path)).permute(3, 0, 1, 2).float() / 127.5 - 1
