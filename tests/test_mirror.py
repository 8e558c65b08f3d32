"""Mirror-symmetric kernel ridge regression: exact leave-one-out, exact symmetry, four bits a feature."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spinelib.models import mirror
from spinelib.models.mirror import UNSEEN_BYTE, MirrorRidge, packed, unpacked

ALL = {"even": 9, "odd": 9}


def random_features(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(0, 15, (count, 12), generator=generator, dtype=torch.uint8) * 10 + 20
    columns = torch.arange(12)  # lowest and highest occur in each, so that the levels that are kept are these
    features[columns % count, columns], features[(columns + 2) % count, columns] = 20, 160
    features[0, 3] = UNSEEN_BYTE
    flipped = torch.arange(12).flip(0)
    even, odd = (torch.randn(count, p, generator=generator) for p in (3, 2))
    return features, flipped, torch.ones(12), even, odd


def systems(machine, features):
    """The kernels of subjects with themselves, penalty included, in double precision and exactly symmetric."""
    lower = {name: k.double().tril() for name, k in machine._kernels(features).items()}
    return {name: k + k.tril(-1).T + mirror._PENALTY * torch.eye(len(k)) for name, k in lower.items()}


def test_left_out_outputs_are_those_of_refitting_without_the_subject():
    features, flipped, weights, even, odd = random_features(12)
    machine, left_out = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)
    for name, targets in (("even", even), ("odd", odd)):
        system, mean = systems(machine, features)[name], machine.tensors[f"{name}_mean"]
        codes = ((targets - mean) @ machine.tensors[f"{name}_basis"]).double()
        for one in range(12):
            rest = [i for i in range(12) if i != one]
            coefficients = torch.linalg.solve(system[rest][:, rest], codes[rest])
            code = system[one, rest] @ coefficients
            expected = code.float() @ machine.tensors[f"{name}_basis"].T + mean
            # All components are kept here, so that nothing of the subject's own target is in its basis.
            assert left_out[name][one] == pytest.approx(expected, abs=1e-5)


def test_two_systems_of_n_are_one_of_2n_with_mirrored_twins():
    features, flipped, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)
    asked = random_features(4, seed=1)[0]
    found = machine(asked)
    twins = machine._scaled(torch.cat([features, features[:, flipped]])).double()
    gaussian = mirror._gaussian(twins, twins) + mirror._PENALTY * torch.eye(18)
    between = mirror._gaussian(machine._scaled(asked).double(), twins)
    for name, targets, sign in (("even", even, 1), ("odd", odd, -1)):
        mean = machine.tensors[f"{name}_mean"]
        both = torch.cat([targets - mean, sign * (targets - mean)]).double()
        expected = between @ torch.linalg.solve(gaussian, both) + mean
        assert found[name] == pytest.approx(expected, abs=1e-4)


def test_a_small_penalty_reproduces_the_training_targets(monkeypatch):
    monkeypatch.setattr(mirror, "_PENALTY", 1e-9)
    features, flipped, weights, even, odd = random_features(9)
    found = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)[0](features)
    assert found["even"] == pytest.approx(even, abs=1e-3)
    assert found["odd"] == pytest.approx(odd, abs=1e-3)


def test_unseen_bytes_count_as_the_mean():
    features, flipped, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)
    assert machine._scaled(features)[0, 3] == 0
    both = torch.cat([features, features[:, flipped]])[:, 3].float()
    seen = both[both != UNSEEN_BYTE]
    assert machine.tensors["mean"][3] == pytest.approx(float(seen.mean()), rel=1e-5)
    middle = machine.tensors["mean"].round().byte()[None]
    nothing = torch.full_like(middle, UNSEEN_BYTE)
    assert machine(nothing)["even"] == pytest.approx(machine(middle)["even"], abs=0.05)  # a byte is rounded
    assert machine(nothing)["odd"] == pytest.approx(torch.zeros(1, 2), abs=1e-6)  # as symmetric as can be


def test_spread_is_positive_and_its_mean_that_of_logarithms():
    features, flipped, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)
    machine.fit_spread(torch.full((9, 4), 2.5))
    assert machine(random_features(5, seed=2)[0])["spread"] == pytest.approx(torch.full((5, 4), 2.5), rel=1e-5)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_packed_numbers_come_back(count, half, seed):
    codes = torch.randint(0, 16, (count, 2 * half), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert packed(codes).shape == (count, half)
    assert torch.equal(unpacked(packed(codes)), codes)


def test_centres_are_features_to_half_a_step():
    features, flipped, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)
    assert machine.centres == pytest.approx(features.float(), abs=1e-3)  # fifteen levels are kept as they are
    generator = torch.Generator().manual_seed(1)
    features = torch.randint(0, 200, (40, 12), generator=generator, dtype=torch.uint8)
    even, odd = torch.randn(40, 3, generator=generator), torch.randn(40, 2, generator=generator)
    machine, _ = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)
    assert ((machine.centres - features).abs() <= machine.tensors["step"] / 2 + 1e-3).all()


def test_a_mirrored_subject_gives_the_mirrored_outputs():
    features, flipped, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, flipped, weights, even, odd, ALL)
    asked = random_features(5, seed=3)[0]
    one, other = machine(asked), machine(asked[:, flipped])
    assert other["even"] == pytest.approx(one["even"], abs=1e-5)
    assert other["odd"] == pytest.approx(-one["odd"], abs=1e-5)
