"""The rate-distortion plot shows what it is given."""

from __future__ import annotations

from fastcil.engine.plot_style import method_colour
from fastcil.engine.rate_plots import plot_rate_distortion

CURVES = {"ours": [(0.9, 36.0), (0.1, 28.0)], "vtm-22.0": [(0.113, 28.54), (0.331, 32.47)]}


def test_points_ascend_and_codecs_are_told_apart() -> None:
    figure = plot_rate_distortion(CURVES, dashed=("vtm-22.0",))
    (axes,) = figure.axes
    ours, vtm = axes.lines
    assert [*zip(*ours.get_data(), strict=True)] == [(0.1, 28.0), (0.9, 36.0)]
    assert (ours.get_linestyle(), vtm.get_linestyle()) == ("-", "--")
    assert ours.get_color() == method_colour(0) != vtm.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(CURVES)
    assert axes.get_xlim()[0] == 0
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("bits per pixel", "PSNR, dB")


def test_another_quality() -> None:
    figure = plot_rate_distortion({"ours": [(0.1, 0.9)]}, quality="MS-SSIM")
    assert figure.axes[0].get_ylabel() == "MS-SSIM"
