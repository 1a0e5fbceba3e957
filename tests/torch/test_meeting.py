"""Ranks that meet in a store in which earlier ranks, some of which have died, have left what they wrote."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from lentando.comm.transports.torch_distributed.meeting import RanksMissingError, agree_on_name


def meet(store: Store, size: int, late: int | None = None) -> str:
    """All ranks meet, as threads, one of them later than the others. Returns the name that they agree on."""

    def of_rank(rank: int) -> str:
        if rank == late:
            time.sleep(0.1)
        return agree_on_name(store, rank, size)

    with ThreadPoolExecutor(size) as pool:
        (name,) = set(pool.map(of_rank, range(size)))
    return name


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_ranks_get_one_name_and_every_job_a_new_one(size: int) -> None:
    store = HashStore()
    assert len({meet(store, size) for _ in range(4)}) == 4


@pytest.mark.parametrize("late", [0, 1, 2])
def test_late_rank_and_early_ranks_meet_after_a_job_that_ended(late: int) -> None:
    store = HashStore()
    earlier = meet(store, 3)
    assert meet(store, 3, late) != earlier


@pytest.mark.parametrize("late", [0, 1])
def test_question_of_a_rank_that_died_before_the_answer_delays_no_other(late: int) -> None:
    store = HashStore()
    store.set("question/1", "of a process that has died")
    store.set("answer/1", "earlier name")
    assert meet(store, 2, late) not in ("earlier", "name")


@pytest.mark.parametrize(("rank", "missing"), [(0, [1, 2, 3]), (2, [0])])
def test_ranks_that_do_not_come_in_time_are_named(rank: int, missing: list[int]) -> None:
    with pytest.raises(RanksMissingError) as error:
        agree_on_name(HashStore(), rank, 4, timedelta(seconds=0.1))
    assert error.value.ranks == missing
