"""The count of the bytes that are alive."""

import gc

import torch
from torch import nn

from trainer.hardware.live import ROUNDED_TO, LiveBytes, fused_attention

MEGABYTE = 1 << 20


def test_the_peak_is_of_what_is_alive_at_once() -> None:
    given = torch.empty(4 * MEGABYTE, dtype=torch.uint8, device="meta")
    with LiveBytes() as counted:
        first = given + 1
        second = first.view(4, -1)  # the same storage
        third = second + 1
        del first, second
        gc.collect()
        fourth = third + 1
    assert counted.live == 8 * MEGABYTE and counted.peak == 8 * MEGABYTE
    del third, fourth
    gc.collect()
    assert counted.live == 0


def test_weights_and_small_tensors() -> None:
    layer = nn.Linear(64, 64, bias=False, device="meta")
    with torch.device("meta"), LiveBytes() as counted:
        layer(torch.empty(1, 64)).sum().backward()
    grad = 64 * 64 * 4
    assert grad <= counted.peak <= grad + 16 * ROUNDED_TO  # the weight was there before


def test_attention_counts_as_a_fused_kernel() -> None:
    query = torch.empty(1, 2, 4096, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with LiveBytes() as counted, fused_attention():
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert counted.peak < 8 * query.nbytes  # a matrix of 4096 x 4096 for each head would be 128 times as large
