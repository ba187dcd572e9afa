"""How tensors are put together to be sent: layers whole, in buckets of a size."""

from __future__ import annotations

import itertools

import numpy as np

from learner.weights import in_buckets, layer_groups


def test_layer_groups_hold_every_name_once_and_a_layer_together() -> None:
    names = ["a.w", "m.layers.0.q", "m.layers.0.mlp.1.k", "m.layers.10.q", "v.blocks.0.q", "b"]
    groups = layer_groups(names)
    assert sorted(n for group in groups for n in group) == sorted(names)
    assert ["m.layers.0.q", "m.layers.0.mlp.1.k"] in groups
    assert ["m.layers.10.q"] in groups


def test_buckets_join_neighbours_within_their_size_and_lose_none() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        sizes = rng.integers(1, 40, rng.integers(0, 30)).tolist()
        groups = [[f"{place}.a", f"{place}.b"] for place in range(len(sizes))]
        limit = int(rng.integers(0, 80))

        def size(names: list[str], sizes: list[int] = sizes) -> int:
            return sum(sizes[int(place)] for place in {name.split(".")[0] for name in names})

        buckets = in_buckets(groups, size, limit)
        assert [name for bucket in buckets for name in bucket] == [n for g in groups for n in g]
        for bucket, following in itertools.zip_longest(buckets, buckets[1:]):
            assert size(bucket) <= limit or len(bucket) == 2
            # Full: what comes next had no room. A layer is never split.
            if following:
                assert size(bucket) + size(following[:2]) > limit
                assert following[0].split(".")[0] != bucket[-1].split(".")[0]
