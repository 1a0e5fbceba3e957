"""``join()`` without an optimizer: a rank without data contributes zeros to the sums of the others."""

import pytest
import torch

import lentando.torch as lt


@pytest.mark.parametrize("device", [None, 0])
def test_ranks_without_data_contribute_zeros(device: int | None) -> None:
    """Rank r makes r calls, so that call n is made by the ranks above n."""
    for number in range(lt.rank()):
        total = lt.allreduce(torch.tensor([1.0]), op=lt.Sum)
        assert total.item() == lt.size() - 1 - number
    last = lt.join() if device is None else lt.join(device)
    assert lt.allgather_object(last) == [last] * lt.size()
    assert last == lt.size() - 1


def test_an_average_counts_all_ranks() -> None:
    if lt.rank() == 0 and lt.size() > 1:
        lt.join()
        return
    handle = lt.allreduce_async(torch.tensor([float(lt.size())]), name="average")
    assert lt.synchronize(handle).item() == max(lt.size() - 1, 1)
    lt.join()


def test_what_needs_values_of_all_ranks_is_an_error() -> None:
    if lt.size() == 1:
        return
    if lt.rank() > 0:
        with pytest.raises(lt.HorovodInternalError, match="join"):
            lt.allgather(torch.ones(1))
    lt.join()


def test_an_optimizer_asks_for_its_own_block() -> None:
    if lt.size() == 1:
        return
    model = torch.nn.Linear(2, 1)
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    if lt.rank() == 0:
        with pytest.raises(lt.MismatchError, match="join"):
            lt.join()
    else:
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(lt.MismatchError, match="join"):
            optimizer.step()
    with pytest.raises(lt.ConfigurationError, match="join needs a DistributedOptimizer, got str"):
        lt.join("optimizer")  # type: ignore[call-overload]


def test_the_last_rank_is_not_one_that_others_have_found_joined() -> None:
    for attempt in range(10 * lt.size()):
        first = attempt % lt.size()
        if lt.rank() != first and lt.size() > 1:
            with pytest.raises(lt.HorovodInternalError):
                lt.allgather(torch.ones(2))
        last = lt.join()
        assert lt.allgather_object(last) == [last] * lt.size()
        assert last != first or lt.size() == 1
