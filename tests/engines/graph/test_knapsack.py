"""The best choice, against all choices there are."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from funcstage.engines.graph.knapsack import STEPS, Item, Knapsack

ITEMS = st.lists(st.builds(Item, st.integers(0, 12), st.integers(1, 9)), max_size=9)


def total(items: list[Item]) -> tuple[float, int]:
    return sum(item.worth for item in items), -sum(item.size for item in items)


@given(items=ITEMS, unit=st.sampled_from([1, 2, 1000, 16 * 2**20]), room=st.integers(-3, 60))
def test_nothing_that_fits_is_worth_more_or_as_much_and_smaller(
    items: list[Item], unit: int, room: int
) -> None:
    items = [Item(item.size * unit, item.worth) for item in items]
    choices = (c for n in range(len(items) + 1) for c in itertools.combinations(items, n))
    fitting = [total([*c]) for c in choices if sum(item.size for item in c) <= room * unit]
    chosen = Knapsack(items).best(room * unit)
    assert chosen == sorted({*chosen})
    assert total([items[i] for i in chosen]) == max(fitting, default=(0, 0))


@given(items=ITEMS, rooms=st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted))
def test_more_room_holds_no_less_and_is_worth_no_less(items: list[Item], rooms: list[int]) -> None:
    fewer, more = ([items[i] for i in Knapsack(items).best(room)] for room in rooms)
    assert total(fewer)[0] <= total(more)[0]
    assert total(fewer)[1] >= total(more)[1]


@given(sizes=st.lists(st.integers(1, 2**40), min_size=2, max_size=9), share=st.floats(0, 1))
def test_sizes_without_a_common_divisor_are_rounded_up(sizes: list[int], share: float) -> None:
    items = [Item(size, 1) for size in sizes]
    room = int(share * sum(sizes))
    chosen = Knapsack(items).best(room)
    assert sum(sizes[i] for i in chosen) <= room
    smallest, lost = sorted(sizes), (len(sizes) + 1) * (sum(sizes) // STEPS + 1)
    most = max(n for n in range(len(sizes) + 1) if sum(smallest[:n]) <= max(room - lost, 0))
    assert len(chosen) >= most


def test_many_like_items_are_quick() -> None:
    items = [Item(size * 4099, worth) for size, worth in ((96, 412), (172, 739), (32, 137), (7, 1))] * 80
    chosen = Knapsack(items).best(sum(item.size for item in items) // 2)
    assert 0 < len(chosen) < len(items)
