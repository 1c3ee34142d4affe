"""The images that a report shows, and how: thumbnails, maps, neighbours, confusions and clusters."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.data.sources import ArraySource
from mimref.data.transforms import EvalTransform
from mimref.errors import OutputError
from mimref.evaluation.cluster.kmeans import distances, fit_kmeans, inertia
from mimref.evaluation.exhibits import maps, thumbnails
from mimref.evaluation.exhibits.contents import Exhibits
from mimref.evaluation.exhibits.galleries import choose_queries, confusions, describe_clusters, nearest
from mimref.evaluation.exhibits.maps import arrange, map_rows, principal_components
from mimref.evaluation.exhibits.thumbnails import encode, encode_within, read_crops
from mimref.evaluation.knn.protocol import find_neighbours, knn, predict_labels
from mimref.features.encode import PassSettings


def decoded(jpeg):
    return Image.open(io.BytesIO(jpeg))


# --- thumbnails


def test_large_crops_become_48_pixels_and_small_ones_are_enlarged():
    rng = np.random.default_rng(0)
    for size, side in ((8, 48), (16, 48), (20, 40), (28, 28), (48, 48), (224, 48)):
        assert decoded(encode(rng.integers(0, 256, (size, size, 3), np.uint8), 48, 80)).size == (side, side)
    assert decoded(encode(np.zeros((100, 50, 3), np.uint8), 48, 80)).size == (24, 48)


def test_an_image_of_eight_pixels_stays_what_it_is():
    pixels = (np.indices((8, 8)).sum(axis=0) % 2 * 255).astype(np.uint8)
    shown = decoded(encode(np.repeat(pixels[..., None], 3, axis=2), 48, 80))
    assert shown.mode == "L"
    assert np.abs(np.asarray(shown)[3::6, 3::6].astype(int) - pixels).max() < 40
    assert decoded(encode(np.stack([pixels, pixels, 255 - pixels], axis=2), 48, 80)).mode == "RGB"


def test_crops_are_those_of_the_evaluation():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (5, 30, 40), np.uint8)
    source = ArraySource("some", images, None, None, "val", np.arange(5))
    settings = PassSettings(EvalTransform(24, 1.0), torch.device("cpu"), batch_size=2)
    rows = np.array([4, 0, 3])
    for row, crop in zip(rows, read_crops(source, rows, settings), strict=True):
        expected = settings.transform.crop(source.read(int(row))).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("room", [10**9, 200_000, 60_000, 10])
def test_jpegs_take_the_best_grade_that_fits(room):
    crops = [*np.random.default_rng(2).integers(0, 256, (150, 48, 48, 3), np.uint8), None]
    sizes = [
        sum(len(encode(np.full((8, 8, 3), 128, np.uint8) if c is None else c, *grade)) for c in crops)
        for grade in thumbnails.GRADES
    ]
    found = sum(map(len, encode_within(crops, room)))
    assert found == next((size for size in sizes if size <= room), sizes[-1])


# --- maps


def test_few_images_are_arranged_by_principal_components():
    x = np.random.default_rng(3).normal(size=(20, 6)).astype(np.float32)
    points = principal_components(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    covariance = np.cov(unit.astype(np.float64).T)
    vectors = np.linalg.eigh(covariance)[1]
    scores = (unit - unit.mean(axis=0)) @ vectors[:, [-1, -2]]
    scores *= np.sign(scores[np.abs(scores).argmax(axis=0), [0, 1]])
    np.testing.assert_allclose(points, scores * 10 / np.abs(scores).max(), atol=1e-4)
    assert arrange(x, seed=0).tolist() == np.round(points.astype(np.float64), 3).astype(np.float32).tolist()


def test_degenerate_features_have_a_map():
    assert principal_components(np.ones((5, 3), np.float32)).tolist() == [[0, 0]] * 5
    assert np.isfinite(principal_components(np.arange(5, dtype=np.float32)[:, None])).all()


def test_maps_show_equal_shares_of_the_classes(monkeypatch):
    y = np.repeat([0, 1, 2], [100, 10, 3])
    assert map_rows(2, y[:2]).tolist() == []
    assert map_rows(113, y).tolist() == list(range(113))
    monkeypatch.setattr(maps, "MOST_IMAGES", 12)
    assert Counter(y[map_rows(113, y)].tolist()) == {0: 5, 1: 4, 2: 3}
    assert map_rows(100, None).tolist() == list(range(0, 100, 9))


def test_more_images_are_arranged_by_umap(monkeypatch):
    seen = []
    monkeypatch.setattr(maps, "umap_embedding", lambda x, seed: (seen.append((len(x), seed)), np.zeros((len(x), 2)))[1])
    arrange(np.ones((99, 3), np.float32), seed=4)
    arrange(np.ones((100, 3), np.float32), seed=4)
    assert seen == [(100, 4)]


# --- queries


def test_queries_come_from_different_classes():
    y = np.repeat([7, 3, 5], [50, 50, 2])
    rows = choose_queries(102, y, seed=1)
    assert len(set(rows.tolist())) == 12
    assert Counter(y[rows].tolist()) == {7: 5, 3: 5, 5: 2}
    assert choose_queries(102, y, seed=1).tolist() == rows.tolist() != choose_queries(102, y, seed=2).tolist()
    many = np.arange(100) % 40
    assert len(set(many[choose_queries(100, many, seed=0)].tolist())) == 12
    assert sorted(choose_queries(3, None, seed=0).tolist()) == [0, 1, 2]
    assert len(choose_queries(0, None, seed=0)) == 0


def test_neighbours_are_those_of_a_plain_loop():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    x[7] = x[3]  # the same image twice: each is a neighbour of the other, but not of itself
    queries = np.array([3, 7, 20])
    for query, found in zip(queries, nearest(x, queries), strict=True):
        cosine = {}
        for row in range(60):
            if row != query:
                a, b = x[query].astype(np.float64), x[row].astype(np.float64)
                cosine[row] = a @ b / np.sqrt((a @ a) * (b @ b))
        assert found == sorted(cosine, key=lambda row: -cosine[row])[:12]


def test_fewer_images_have_fewer_neighbours():
    x = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
    assert nearest(x, np.array([0, 1])) == [[2, 1], [2, 0]]
    assert nearest(x[:1], np.array([0])) == [[]]
    assert nearest(x, np.empty(0, np.int64)) == []


# --- confusions


def test_predictions_are_the_votes_of_a_plain_loop():
    rng = np.random.default_rng(5)
    train_x, test_x = rng.normal(size=(80, 4)).astype(np.float32), rng.normal(size=(50, 4)).astype(np.float32)
    train_y, test_y = rng.integers(0, 6, 80) * 10 - 20, rng.integers(0, 6, 50) * 10 - 20
    neighbours = find_neighbours(train_x, test_x, k=9)
    found = predict_labels(neighbours, train_y, tau=0.2)
    for row in range(50):
        votes = Counter()
        for similarity, index in zip(
            neighbours.similarity[row].tolist(), neighbours.train_index[row].tolist(), strict=True
        ):
            votes[train_y[index]] += np.exp(similarity / 0.2)
        assert found[row] == max(votes, key=votes.get)
    accuracy = knn(train_x, train_y, test_x, test_y, k=[9], tau=[0.2])[0]["value"]
    assert accuracy == pytest.approx(100 * np.mean(found == test_y))


def test_equal_votes_are_for_the_lowest_label():
    x = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    neighbours = find_neighbours(x, x[:1], k=2, standardize=False)
    assert predict_labels(neighbours, np.array([5, 2, 0]), tau=0.07).tolist() == [2]


def test_confusions_are_those_of_a_plain_loop():
    rng = np.random.default_rng(6)
    y, predicted = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    rows = np.arange(200) * 3
    found = confusions(y, predicted, rows, lambda label: f"class {label}")
    counts = Counter(zip(y.tolist(), predicted.tolist(), strict=True))
    assert len(found) == 8 and [each.share for each in found] == sorted((each.share for each in found), reverse=True)
    for each in found:
        label, other = int(each.label[-1]), int(each.predicted[-1])
        assert label != other and each.count == counts[label, other]
        assert each.share == each.count / sum(y == label)
        assert each.images == [3 * i for i in range(200) if (y[i], predicted[i]) == (label, other)][:6]
    for label in range(4):
        shown = [each.count for each in found if each.label == f"class {label}"]
        assert shown == sorted((counts[label, other] for other in range(5) if other != label), reverse=True)[:2]


def test_right_predictions_are_no_confusions():
    assert confusions(np.array([0, 1]), np.array([0, 1]), np.array([0, 1]), str) == []


# --- clusters


def test_clusters_are_those_of_a_plain_loop():
    rng = np.random.default_rng(7)
    x = rng.normal(size=(90, 3)).astype(np.float32)
    y = rng.integers(0, 3, 90)
    assigned, centres = fit_kmeans(x, 4, 0, seed=1)
    found = describe_clusters(assigned, distances(x, assigned, centres), y, lambda label: "abc"[label])
    assert sum(each.size for each in found) == 90
    assert [each.size for each in found] == sorted((each.size for each in found), reverse=True)
    for each in found:
        members = [row for row in range(90) if assigned[row] == each.number]
        distance = {
            row: sum((float(a) - b) ** 2 for a, b in zip(x[row], centres[each.number], strict=True)) for row in members
        }
        order = sorted(members, key=distance.get)
        assert each.size == len(members)
        assert each.central == order[:6]
        assert each.outlying == order[6:][::-1][:6]
        most = Counter(y[members].tolist()).most_common(1)[0][1]
        assert each.purity == most / len(members)
        assert Counter(y[members].tolist())["abc".index(each.label)] == most
    total = sum(np.square(x[row].astype(np.float64) - centres[assigned[row]]).sum() for row in range(90))
    assert inertia(x, assigned, centres) == pytest.approx(total)


def test_clusters_without_labels_have_no_purity():
    x = np.array([[0.0], [0.1], [5.0]], dtype=np.float32)
    assigned = np.array([2, 2, 0])
    away = distances(x, assigned, np.array([[5.0], [9.0], [0.05]]))
    found = describe_clusters(assigned, away, None, str)
    assert [(each.number, each.size, each.label, each.purity) for each in found] == [
        (2, 2, None, None),
        (0, 1, None, None),
    ]
    assert found[0].central == [0, 1] and found[0].outlying == []


def test_exhibits_that_are_no_table_are_one_plain_line(tmp_path: Path) -> None:
    (tmp_path / "exhibits.json").write_text("[1]")
    with pytest.raises(OutputError, match=r"exhibits\.json: damaged \([^:]"):
        Exhibits.read(tmp_path)
