"""Pairs of codes: counted where they stand, and how far two sets of them are apart."""

import pytest
import torch

from xdlm_image.evaluation.code_pairs import PairFrequencies


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 5)])
def test_pairs_are_counted_where_they_stand(rows, columns):
    codes = torch.randint(0, 3, (6, rows, columns))
    pairs = PairFrequencies(3)
    pairs.update(codes[:1])
    pairs.update(codes[1:])
    for name, down, right in (("near", 1, 1), ("far", rows // 2, columns // 2)):
        expected = torch.zeros(3, 3, dtype=torch.int64)
        for image in codes.tolist():
            for y in range(rows):
                for x in range(columns):
                    if y + down < rows:
                        expected[image[y][x], image[y + down][x]] += 1
                    if x + right < columns:
                        expected[image[y][x], image[y][x + right]] += 1
        assert torch.equal(pairs.counts[name].view(3, 3), expected)


@pytest.mark.parametrize("num_codes", [64, 16384])  # counted exactly, and hashed
def test_total_variation_sees_pairs_that_do_not_go_together(num_codes, tmp_path):
    used = torch.arange(8) * (num_codes // 8)  # 8 codes, each as frequent in both sets
    a, b = PairFrequencies(num_codes), PairFrequencies(num_codes)
    a.update(used[torch.randint(0, 8, (4000, 1, 1))].expand(-1, 2, 2))  # the four codes of an image are one
    b.update(used[torch.randint(0, 8, (4000, 2, 2))])  # independent
    distance = a.total_variation(b)
    assert distance == pytest.approx({"near": 7 / 8, "far": 7 / 8}, abs=0.02)  # 8 of 64 pairs carry all the mass of a
    assert a.total_variation(a) == {"near": 0.0, "far": 0.0}
    back = PairFrequencies.load(a.save(tmp_path / "pairs.safetensors", {}), num_codes)
    assert back.total_variation(b) == distance
    with pytest.raises(ValueError, match="does not hold pairs of 5"):
        PairFrequencies.load(tmp_path / "pairs.safetensors", 5)
    with pytest.raises(ValueError, match=rf"must lie in \[0, {num_codes}\)"):
        a.update(torch.full((1, 2, 2), num_codes))
