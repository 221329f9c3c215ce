from __future__ import annotations

from sage.tools.finetune.hub_models import progress_text


def test_a_download_says_how_much_is_here_and_how_long_the_rest_takes() -> None:
    assert progress_text(0, 0, 3_000_000_000, 10) == "Downloaded 0.00 of 3.00 GB"
    assert progress_text(0, 500_000_000, 3_000_000_000, 60) == "Downloaded 0.50 of 3.00 GB, 5 min left"
    assert progress_text(0, 2_500_000_000, 3_000_000_000, 100) == "Downloaded 2.50 of 3.00 GB, 20 s left"


def test_what_an_earlier_download_left_is_no_speed_of_this_one() -> None:
    assert progress_text(2_000_000_000, 2_000_000_000, 3_000_000_000, 10) == "Downloaded 2.00 of 3.00 GB"
    text = progress_text(2_000_000_000, 2_100_000_000, 3_000_000_000, 10)
    assert text == "Downloaded 2.10 of 3.00 GB, 2 min left"
