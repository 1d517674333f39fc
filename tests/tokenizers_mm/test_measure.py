"""Figures of an image tokenizer against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from tokenizers_mm import (
    code_counts,
    digit_counts,
    entropy,
    measure,
    perplexity,
    psnr,
    round_trip,
    ssim,
    to_uint8,
)


class Grey:
    """A tokenizer with four codes: the mean brightness of each patch of 8 x 8."""

    size, downsample, digits = 4, 8, None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // 8, width // 8

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(images.mean(1), 8)
        return ((means + 1) * 2).floor().long().clamp(0, 3)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        values = (codes.float() + 0.5) / 2 - 1
        return values.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)


def test_psnr_of_known_errors():
    images = torch.zeros(3, 3, 4, 4)
    output = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), -2.0)])
    expected = torch.tensor([100.0, 20.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(psnr(images, output), expected, rtol=0, atol=1e-4)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One channel, data range 2, straight from the definition."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            c1, c2 = 0.02**2, 0.06**2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / (mx**2 + my**2 + c1) / (vx + vy + c2))
    return float(np.mean(values))


def test_ssim_is_the_definition():
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (1, 3, 13, 15))
    b = np.clip(a + rng.normal(0, 0.3, a.shape), -1, 1)
    expected = np.mean([slow_ssim(a[0, channel], b[0, channel]) for channel in range(3)])
    assert ssim(torch.from_numpy(a), torch.from_numpy(b)).item() == pytest.approx(expected, abs=1e-9)
    assert 0.3 < expected < 0.99
    assert ssim(torch.from_numpy(a), torch.from_numpy(a)).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_usage_and_perplexity():
    assert code_counts(torch.tensor([[[0, 2], [2, 5]]]), 6).tolist() == [1, 0, 2, 0, 0, 1]
    assert perplexity(torch.tensor([3, 3, 0, 3])) == pytest.approx(3)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1)
    assert perplexity(torch.tensor([1, 3])) == pytest.approx(
        math.exp(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    )
    with pytest.raises(ValueError, match="no codes"):
        perplexity(torch.zeros(4, dtype=torch.long))


def test_entropy_is_in_bits():
    assert entropy(torch.tensor([2, 0, 2, 4])) == pytest.approx(1.5)
    assert math.copysign(1, entropy(torch.tensor([0, 7]))) == 1
    with pytest.raises(ValueError, match="no codes"):
        entropy(torch.zeros(4, dtype=torch.long))


def test_digits_are_counted_with_the_first_the_fastest():
    counts = torch.tensor([1, 2, 4, 8, 16, 32])  # codes d0 + 2 * d1
    assert [each.tolist() for each in digit_counts(counts, (2, 3))] == [[1 + 4 + 16, 2 + 8 + 32], [3, 12, 48]]
    assert [each.tolist() for each in digit_counts(counts, (6,))] == [counts.tolist()]
    with pytest.raises(ValueError, match=r"digits \(2, 2\) make 4 codes, got 6 counts"):
        digit_counts(counts, (2, 2))


def test_a_round_trip_keeps_the_order_of_pictures():
    values = torch.tensor([-0.75, 0.3, -0.7, 0.8, -0.25])
    images = values.view(5, 1, 1, 1).expand(5, 3, 16, 24)
    trip = round_trip(Grey(), images, batch_size=2)
    assert torch.equal(trip.codes, Grey().encode(images))
    assert trip.codes.shape == (5, 2, 3)
    back = Grey().decode(trip.codes)
    assert (trip.images == to_uint8(back)).all()
    assert torch.equal(trip.psnr, psnr(images, back))
    assert torch.equal(trip.ssim, ssim(images, back))
    assert trip.counts.tolist() == [12, 6, 6, 6]


def test_a_report_does_not_depend_on_the_batch_size():
    values = torch.tensor([-0.75, 0.25, -0.75, -0.75, -0.25])
    images = values.view(5, 1, 1, 1).expand(5, 3, 16, 16).clone()
    images[0, :, :8] += 0.1
    report = measure(Grey(), images, batch_size=2)
    assert report == measure(Grey(), images, batch_size=5)
    assert (report.usage, report.num_images, report.num_codes) == (0.75, 5, 20)
    assert report.perplexity == pytest.approx(math.exp(0.6 * math.log(1 / 0.6) + 0.4 * math.log(5)))
    assert 80 < report.psnr < 100
    assert 0.9 < report.ssim < 1
    with pytest.raises(ValueError, match="at least one"):
        measure(Grey(), images[:0])
