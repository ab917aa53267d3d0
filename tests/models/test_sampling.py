import pytest
import torch

from models.writing.sampling import gumbel_noise, noise_key, sampled_tokens


def keys(seed: int, positions: int) -> torch.Tensor:
    return torch.tensor([[noise_key(seed, position)] for position in range(positions)])


def draw(logits: torch.Tensor, count: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 5) -> torch.Tensor:
    column = torch.ones(count, 1)
    drawn: torch.Tensor = sampled_tokens(
        logits.expand(count, -1), column * temperature, column * top_p, keys(seed, count)
    )
    return drawn


def test_words_are_drawn_in_proportion_to_their_probability() -> None:
    shares = torch.bincount(draw(torch.log(torch.tensor([0.6, 0.3, 0.1])), 8000), minlength=3) / 8000
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.02)


def test_temperature_makes_the_likely_likelier() -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    shares = torch.bincount(draw(logits, 8000, temperature=0.5), minlength=3) / 8000
    assert torch.allclose(shares, torch.tensor([0.36, 0.09, 0.01]) / 0.46, atol=0.02)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, {0}), (0.61, {0, 1}), (0.89, {0, 1}), (0.95, {0, 1, 2}), (1.0, {0, 1, 2})]
)
def test_a_nucleus_keeps_the_likeliest_that_make_up_its_mass(top_p: float, kept: set[int]) -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    assert set(draw(logits, 2000, top_p=top_p).tolist()) == kept


@pytest.mark.parametrize("flat", [True, False])
def test_the_nucleus_is_that_of_transformers(flat: bool) -> None:
    """Also where it is larger than the candidates that are looked at first."""
    from transformers.generation import TopPLogitsWarper

    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * (0.1 if flat else 6.0)
    allowed = torch.isfinite(TopPLogitsWarper(0.9)(None, logits.clone())[0])
    assert (int(allowed.sum()) > 1024) is flat
    drawn = draw(logits[0], 3000, top_p=0.9)
    assert bool(allowed[drawn].all())


def test_the_noise_is_that_of_the_row_alone() -> None:
    logits = torch.randn(3, 300)
    column = torch.ones(3, 1)
    rows = keys(9, 3)
    together = sampled_tokens(logits, column, column * 0.9, rows)
    apart = [sampled_tokens(logits[n : n + 1], column[:1], column[:1] * 0.9, rows[n : n + 1]) for n in range(3)]
    assert together.tolist() == [int(token) for token in apart]


def test_the_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(keys(3, 50), torch.arange(4000).expand(50, -1))
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - 1.6449) < 0.05
    assert len(noise.unique()) > 150_000


def test_seeds_and_positions_have_keys_of_their_own() -> None:
    found = {noise_key(seed, position) for seed in range(50) for position in range(50)}
    assert len(found) == 2500
    assert noise_key(2**63 - 1, 7) == noise_key(2**63 - 1, 7)
