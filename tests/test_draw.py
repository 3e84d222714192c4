"""The drawing, read back from the image files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from s2_kernels.draw import (
    DROPPED_COLOR,
    FUTURE_COLOR,
    STRIDED_COLOR,
    WINDOW_COLOR,
    cell_colors,
    draw_pattern,
)
from s2_kernels.pattern import S2Pattern


def expected_color(pattern: S2Pattern, head: int, query: int, key: int) -> str:
    if key > query:
        return FUTURE_COLOR
    if not pattern.attends(head, query, key):
        return DROPPED_COLOR
    return WINDOW_COLOR if query - key < pattern.local_blocks else STRIDED_COLOR


def to_hex(rgb: torch.Tensor) -> str:
    return "#" + bytes(rgb.tolist()).hex()


def read_png(path: Path) -> torch.Tensor:
    """uint8 [height, width, RGB]."""
    return (torch.from_numpy(imread(path))[..., :3] * 255).round().to(torch.uint8)


def runs(present: torch.Tensor) -> list[tuple[int, int]]:
    """[start, end) of every run of True."""
    edges = torch.nn.functional.pad(present.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def panels(image: torch.Tensor) -> list[torch.Tensor]:
    """Every patch of the window's colour, cut out with what lies between its edges; the legend is last.

    The window's colour runs along a panel's diagonal, so its extent is the panel's.
    """
    blue = (image == torch.tensor(list(bytes.fromhex(WINDOW_COLOR[1:])))).all(dim=-1)
    return [
        image[top:bottom, left:right]
        for top, bottom in runs(blue.any(dim=1))
        for left, right in runs(blue[top:bottom].any(dim=0))
    ]


def test_cells_show_the_tier_a_block_is_read_from() -> None:
    pattern = S2Pattern.build(4, 2, local_blocks=2, vert_stride=4, pattern_heads="query")
    cells = cell_colors(pattern, 11)
    for head in range(4):
        for query in range(11):
            for key in range(11):
                expected = expected_color(pattern, head, query, key)
                assert to_hex(cells[head, query, key]) == expected


def test_png_shows_the_cells(tmp_path: Path) -> None:
    pattern = S2Pattern.build(2, 2, local_blocks=2, vert_stride=3)
    blocks = 10
    pattern.draw(tmp_path / "pattern.png", blocks)
    *heads, _ = panels(read_png(tmp_path / "pattern.png"))
    assert len(heads) == 2
    for head, panel in enumerate(heads):
        height, width, _ = panel.shape
        assert abs(height - width) <= 2
        for query in range(blocks):
            for key in range(blocks):
                center = panel[int((query + 0.5) * height / blocks), int((key + 0.5) * width / blocks)]
                assert to_hex(center) == expected_color(pattern, head, query, key)


@pytest.mark.parametrize("num_heads", [1, 3, 7, 32])
def test_png_has_a_panel_for_every_head(num_heads: int, tmp_path: Path) -> None:
    draw_pattern(S2Pattern.build(num_heads, 1), tmp_path / "pattern.png", 8)
    *heads, _ = panels(read_png(tmp_path / "pattern.png"))
    assert len(heads) == num_heads


def test_default_shows_every_head_drop_a_block(tmp_path: Path) -> None:
    pattern = S2Pattern.build(8, 8, local_blocks=4)
    pattern.draw(tmp_path / "pattern.png")
    *heads, _ = panels(read_png(tmp_path / "pattern.png"))
    for panel in heads:
        colors = {to_hex(color) for color in panel.flatten(0, 1).unique(dim=0)}
        assert {WINDOW_COLOR, STRIDED_COLOR, DROPPED_COLOR} <= colors


def test_svg_names_every_head_in_order(tmp_path: Path) -> None:
    pattern = S2Pattern.build(8, 2, head_sliding_offset=1, pattern_heads="query")
    path = tmp_path / "pattern.SVG"
    draw_pattern(pattern, str(path))
    svg = path.read_text()
    titles = [f"head {head} \u00b7 residue {residue}" for head, residue in enumerate(pattern.residues)]
    places = [svg.index(title) for title in titles]
    assert all(first < second for first, second in pairwise(places))
    for label in ("key block", "query block", "local window", "strided", "not attended"):
        assert label in svg


def test_draws_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    pattern = S2Pattern.build(2, 2, local_blocks=2, vert_stride=3)
    expected = cell_colors(pattern, 7)
    with torch.device("meta"):
        assert torch.equal(cell_colors(pattern, 7), expected)
        pattern.draw(tmp_path / "pattern.png", 7)
    assert (tmp_path / "pattern.png").stat().st_size


@pytest.mark.parametrize("name", ["pattern.gif", "pattern"])
def test_refuses_other_formats(name: str, tmp_path: Path) -> None:
    suffix = Path(name).suffix
    with pytest.raises(ValueError, match=rf"path: suffix '{suffix}' of '.*{name}', expected .png or .svg"):
        draw_pattern(S2Pattern.build(2, 2), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_refuses_no_blocks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_blocks: 0, expected a positive integer"):
        draw_pattern(S2Pattern.build(2, 2), tmp_path / "pattern.png", 0)
