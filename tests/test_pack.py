import doctest

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

import smidgen.quant.pack
from smidgen.quant.pack import pack, unpack

BITS = [2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def codes():
    """(bits, n) -> random codes of 3 rows; the first row is all ones, the second all zeros."""

    def draw(bits, n):
        drawn = np.random.default_rng(0).integers(0, 2**bits, (3, n), dtype=np.uint8)
        drawn[0], drawn[1] = 2**bits - 1, 0
        return drawn

    return draw


def test_examples_in_docstrings_are_right():
    tests = [t for t in doctest.DocTestFinder().find(smidgen.quant.pack) if t.examples]
    assert [t.name for t in tests] == ["smidgen.quant.pack.pack"]
    assert all(doctest.DocTestRunner().run(t).failed == 0 for t in tests)


def test_the_drawn_layout_at_3_bits():
    for i in range(10):
        row = np.zeros((1, 11), dtype=np.uint8)
        row[0, i] = 5
        assert pack(row, 3).tolist() == [[5 << 3 * i, 0]]
    row = np.array([[0] * 10 + [0b101]], dtype=np.uint8)
    assert pack(row, 3).view(np.uint32).tolist() == [[0b01 << 30, 0b1]]


@pytest.mark.parametrize("n", [1, 10, 11, 32, 33, 64, 100])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_is_the_way_back(bits, n, codes):
    words = pack(codes(bits, n), bits)
    assert words.shape == (3, -(-n * bits // 32)) and words.dtype == np.int32
    assert np.array_equal(unpack(words, bits, n), codes(bits, n))


@pytest.mark.parametrize("n", [32, 33, 100])
@pytest.mark.parametrize("bits", BITS)
def test_layout_is_that_of_compressed_tensors(bits, n, codes):
    signed = torch.from_numpy(codes(bits, n).astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert np.array_equal(pack(codes(bits, n), bits), theirs.numpy())
    assert torch.equal(unpack_from_int32(torch.from_numpy(pack(codes(bits, n), bits)), bits, signed.shape), signed)


def test_columns_need_not_be_contiguous(codes):
    transposed = np.ascontiguousarray(codes(3, 40).T).T
    assert np.array_equal(unpack(pack(transposed, 3)[:, :], 3, 40), codes(3, 40))
    assert np.array_equal(unpack(np.asfortranarray(pack(transposed, 3)), 3, 40), codes(3, 40))
