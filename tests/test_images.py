"""Images and texts of unusual size and script."""


import pytest
import torch
from PIL import Image

from common.video import read_image
from evaluation.sheets import video_table


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (13_300, 13_300)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 50_000
    with pytest.raises(ValueError, match="a.png .*13300×13300 pixels are more than"):
        read_image(tmp_path / "a.png")


def test_a_heading_over_videos_has_no_boxes_for_characters_missing_in_the_font():
    rows = [("teacher", [(torch.zeros(3, 1, 16, 16), "")])]
    drawn = [video_table([text], rows) for text in ("a 狐狸 runs", "a … runs", "a runs")]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
