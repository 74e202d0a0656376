"""Work in threads of one core each."""

import threading

import pytest
import torch

from generative_recommenders.ops.threads import in_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_parts(two_threads):
    weight = torch.ones(3, requires_grad=True)
    results = in_threads(lambda part: (part * weight).sum(), [1.0, 2.0, 3.0])
    assert [float(each) for each in results] == [3.0, 6.0, 9.0]
    assert not any(each.requires_grad for each in results)


def test_operations_of_a_part_take_one_core_and_those_of_the_program_as_many_as_before(two_threads):
    assert in_threads(lambda part: torch.get_num_threads(), [0, 1]) == [1, 1]
    assert torch.get_num_threads() == 2
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


def test_one_part_alone_has_all_threads(two_threads):
    assert in_threads(lambda part: torch.get_num_threads(), [0]) == [2]


def test_an_error_of_a_part_is_raised(two_threads):
    def fails(part):
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part 0"):
        in_threads(fails, [0, 1])
