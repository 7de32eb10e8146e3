"""Attention of all rows at once, beside the same row by row."""

import pytest
import torch
from helpers.attentions import attention_case, attention_row_by_row

from nanotoolrl.attention import Rows
from nanotoolrl.together import Together

CASES = {  # slots, own lengths, prompts, prompt lengths
    "one row": ([0], [5], [0], [7]),
    "one row without a prompt": ([0], [5], [0], [0]),
    "two groups": ([0, 1, 2, 3, 4], [1, 200, 3, 511, 60], [0, 0, 1, 1, 1], [300, 300, 17, 17, 17]),
    "groups that are mixed up": ([0, 1, 2, 3, 4], [9, 8, 7, 6, 5], [2, 0, 2, 0, 2], [40, 50, 40, 50, 40]),
    "a prompt each": ([0, 1, 2], [1, 2, 3], [2, 1, 0], [512, 1, 100]),
    "slots between them": ([1, 4, 6], [30, 1, 77], [3, 0, 3], [9, 99, 9]),
}


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("name", CASES)
def test_all_rows_together_are_each_by_itself(name, heads, kv_heads):
    rows = Rows(*map(torch.tensor, CASES[name]))
    case = [x.double() for x in attention_case(rows, heads, kv_heads, 8)]
    found = Together(kv_heads, torch.float64, rows)(*case)
    torch.testing.assert_close(found, attention_row_by_row(rows, *case), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_what_lies_behind_a_row_is_not_seen(name):
    rows = Rows(*map(torch.tensor, CASES[name]))
    gather = Together(2, torch.float32, rows)
    assert torch.equal(gather(*attention_case(rows, 4, 2, 8)), gather(*attention_case(rows, 4, 2, 8, 1e6)))
