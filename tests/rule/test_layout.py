"""Chunks hold every parameter once, and give back what was put in."""

import pytest
import torch

from gmn_optim.rule import Chunk, Segment, build_chunks, layout
from gmn_optim.weight_order import WeightOrder

SEGMENTS = [
    Segment("0.weight", (3, 4), "0", "weight"),
    Segment("0.bias", (3,), "0", "bias"),
    Segment("1.weight", (2, 3), "1", "weight"),
    Segment("scale", ()),
    Segment("1.bias", (2,), "1", "bias"),
    Segment("empty", (0, 5)),
    Segment("cube", (2, 2, 2)),
    Segment("2.weight", (3, 4), "2", "scale"),
    Segment("3.weight", (4, 2), "3", "weight", WeightOrder((4, 2), (1, 0))),
    Segment("4.weight", (3, 5), "4", "table"),
]


def tensors() -> dict[str, torch.Tensor]:
    """Return random tensors with the segments' shapes."""
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in SEGMENTS}


@pytest.mark.parametrize("limit", [1, 5, 12, 15, 20, 10**6])
def test_every_segment_stands_in_one_chunk_whatever_their_size(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(layout, "CHUNK_SIZE", limit)
    chunks = build_chunks(SEGMENTS, True)
    assert sorted(s.name for chunk in chunks for s in chunk.segments) == sorted(s.name for s in SEGMENTS)
    assert all(chunk.size <= limit or len(chunk.segments) == 1 for chunk in chunks if chunk.size)
    assert all(chunk.learned for chunk in chunks)


@pytest.mark.parametrize("limit", [1, 15, 10**6])
def test_weights_come_before_tables_before_scales_before_biases_before_others(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(layout, "CHUNK_SIZE", limit)
    for chunk in build_chunks(SEGMENTS, True):
        roles = [segment.role for segment in chunk.segments]
        assert roles == sorted(roles, key=["weight", "table", "scale", "bias", "other"].index)


def test_small_segments_share_a_chunk_and_large_ones_have_their_own() -> None:
    segments = [Segment("small", (10,)), Segment("huge", (200, 200)), Segment("tail", (3,))]
    assert [chunk.sizes for chunk in build_chunks(segments, False)] == [(10,), (40_000,), (3,)]


def test_no_segments_make_no_chunk() -> None:
    assert build_chunks([], True) == []


@pytest.mark.parametrize("limit", [1, 15, 10**6])
def test_unflatten_undoes_flatten(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(layout, "CHUNK_SIZE", limit)
    given, restored = tensors(), {}
    for chunk in build_chunks(SEGMENTS, True):
        flat = chunk.flatten(given)
        assert flat.shape == (chunk.size,)
        restored |= chunk.unflatten(flat)
    assert restored.keys() == given.keys()
    assert all(torch.equal(restored[name], given[name]) for name in given)


def test_unflatten_gives_views() -> None:
    chunk = build_chunks(SEGMENTS[:2], True)[0]
    flat = chunk.flatten(tensors())
    chunk.unflatten(flat)["0.bias"].zero_()
    assert not flat[12:].any() and flat[:12].all()


@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "0.bias"], ["0.weight", "scale", "cube"]])
def test_means_are_those_of_each_segment_and_go_back_to_its_elements(names: list[str]) -> None:
    chunk = Chunk(tuple(s for s in SEGMENTS if s.name in names), True)
    values = torch.randn(chunk.size, 3, dtype=torch.float64)
    means = chunk.mean_per_segment(values)
    expected = torch.stack([piece.mean(0) for piece in values.split(chunk.sizes)])
    torch.testing.assert_close(means, expected, rtol=1e-12, atol=1e-14)
    spread = chunk.per_element(means).expand(chunk.size, 3)
    repeated = torch.cat([mean.expand(size, 3) for mean, size in zip(expected, chunk.sizes, strict=True)])
    torch.testing.assert_close(spread, repeated, rtol=1e-12, atol=1e-14)


def test_an_empty_segment_has_mean_zero_beside_others() -> None:
    chunk = Chunk((SEGMENTS[1], SEGMENTS[5]), True)
    means = chunk.mean_per_segment(torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(means, torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64))


def test_layers_in_role_follow_the_order_of_the_chunk() -> None:
    (chunk,) = build_chunks(SEGMENTS, True)
    assert chunk.layers_in_role("weight") == ("0", "1", "3")
    assert chunk.layers_in_role("table") == ("4",) and chunk.layers_in_role("scale") == ("2",)
    assert chunk.layers_in_role("bias") == ("0", "1")
    assert chunk.layers_in_role("other") == ()


def test_dtypes_do_not_share_a_cache_entry() -> None:
    chunk = Chunk(tuple(SEGMENTS[:2]), True)
    for dtype in (torch.float32, torch.float64, torch.float32):
        assert chunk.mean_per_segment(torch.ones(15, 1, dtype=dtype)).dtype == dtype


def test_a_weight_that_lies_otherwise_in_memory_is_flat_in_the_order_of_the_matrix() -> None:
    segment = Segment("w", (4, 3, 2), order=WeightOrder((2, 2, 3, 2), (0, 2, 3, 1)))
    weight = torch.arange(24).view(4, 3, 2)
    expected = [
        weight[2 * group + i, o, tap].item() for group in (0, 1) for o in (0, 1, 2) for tap in (0, 1) for i in (0, 1)
    ]
    assert segment.flatten(weight).tolist() == expected
    flat = segment.flatten(weight)
    assert torch.equal(segment.unflatten(flat).reshape(4, 3, 2), weight)
    assert segment.unflatten(flat.unsqueeze(-1).expand(24, 6)).shape == (2, 2, 3, 2, 6)


# ---------------------------------------------------------------------- tiles

LARGE = {
    "weight": (Segment("w", (7, 5), "0", "weight"), 7),
    "kernel": (Segment("w", (7, 5, 3), "0", "weight"), 7),
    "table": (Segment("w", (9, 4), "0", "table"), 9),
    "bias": (Segment("w", (33,), "0", "bias"), 33),
    "inputs first": (Segment("w", (5, 7), "0", "weight", WeightOrder((5, 7), (1, 0))), 7),
    "transposed and grouped": (Segment("w", (4, 3, 2), "0", "weight", WeightOrder((2, 2, 3, 2), (0, 2, 3, 1))), 12),
    "loose": (Segment("w", (6, 5)), 6),
}


@pytest.mark.parametrize("limit", [1, 4, 10, 23])
@pytest.mark.parametrize("kind", LARGE)
def test_tiles_are_whole_rows_one_behind_the_other(monkeypatch: pytest.MonkeyPatch, kind: str, limit: int) -> None:
    monkeypatch.setattr(layout, "TILE_SIZE", limit)
    segment, rows = LARGE[kind]
    chunk, columns = Chunk((segment,), True), segment.size // rows
    tiles = chunk.tiles()
    places = [number for tile in tiles for number in range(segment.size)[tile.place]]
    assert len(tiles) > 1 and places == list(range(segment.size))
    for tile in tiles:
        assert (tile.place.start, tile.place.stop) == (tile.rows.start * columns, tile.rows.stop * columns)
        assert tile.place.stop - tile.place.start <= max(limit, columns)


@pytest.mark.parametrize("names", [["0.weight", "0.bias"], ["scale"], ["empty"], ["cube"]])
def test_small_or_several_tensors_are_one_tile(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    monkeypatch.setattr(layout, "TILE_SIZE", 8)
    chunk = Chunk(tuple(s for s in SEGMENTS if s.name in names), True)
    assert chunk.tiles() == [layout.Tile(slice(0, chunk.size), None)]
