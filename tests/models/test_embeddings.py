import math

import pytest
import torch

from diffusion_lab.models.embeddings import Embedding, Fourier, Sinusoidal


def test_sinusoidal_matches_the_closed_form():
    n, c = 10, [0.0, 1.0, 2.5, 999.0]
    expected = [[f(x * 10_000 ** (-i / (n // 2 - 1))) for f in (math.sin, math.cos) for i in range(n // 2)] for x in c]
    got = Sinusoidal(n)(torch.tensor(c, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-11)


def test_fourier_frequencies_are_fixed_and_saved():
    first, second = Fourier(64), Fourier(64)
    assert torch.equal(first.frequencies, second.frequencies)
    assert "frequencies" in first.state_dict()
    c = torch.linspace(-1.5, 1.1, 5, dtype=torch.float64)
    got = first(c)
    angle = 2 * math.pi * c[:, None] * first.frequencies.double()
    torch.testing.assert_close(got[:, :32] ** 2 + got[:, 32:] ** 2, torch.ones(5, 32, dtype=torch.float64))
    torch.testing.assert_close(torch.atan2(got[:, :32], got[:, 32:]), torch.atan2(angle.sin(), angle.cos()))


@pytest.mark.parametrize("features", ["sinusoidal", "fourier"])
def test_all_times_stay_distinct_under_bfloat16_autocast(features):
    torch.manual_seed(0)
    embedding = Embedding(16, features, torch.nn.SiLU, None)
    c = torch.arange(1000.0) if features == "sinusoidal" else torch.linspace(-1.5, 1.1, 1000)
    plain = embedding(c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = embedding(c)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    assert len(torch.unique(cast, dim=0)) == 1000


def test_half_precision_is_converted_and_the_weights_set_the_dtype():
    embedding = Embedding(16, "sinusoidal", torch.nn.SiLU, None)
    assert torch.equal(embedding(torch.tensor([3.0]).half()), embedding(torch.tensor([3.0])))
    assert embedding.double()(torch.tensor([3.0])).dtype == torch.float64


def test_labels_and_attributes_have_the_same_null_embedding():
    embedding = Embedding(16, "sinusoidal", torch.nn.SiLU, 3)
    c = torch.tensor([5.0, 7.0])
    none = embedding(c)
    torch.testing.assert_close(embedding(c, torch.tensor([3, 3])), none)
    torch.testing.assert_close(embedding(c, torch.zeros(2, 3)), none)
    torch.testing.assert_close(embedding(c, torch.eye(3)[:2]), embedding(c, torch.tensor([0, 1])))
    assert not torch.allclose(embedding(c, torch.tensor([0, 1])), none)


@pytest.mark.parametrize(
    ("build", "remedy"),
    [
        (lambda: Embedding(16, "learned", torch.nn.SiLU, None), "sinusoidal, fourier"),
        (lambda: Embedding(15, "sinusoidal", torch.nn.SiLU, None), "even"),
        (lambda: Embedding(2, "sinusoidal", torch.nn.SiLU, None), "width=2: write an integer in \\[4, 65536\\]"),
        (lambda: Embedding(3, "fourier", torch.nn.SiLU, None), "even"),
        (lambda: Embedding(16, "sinusoidal", torch.nn.SiLU, 0), "null"),
        (lambda: Embedding(16, "sinusoidal", torch.nn.SiLU, None)(torch.ones(2), torch.ones(2).long()), "num_classes"),
        (lambda: Embedding(16, "sinusoidal", torch.nn.SiLU, 3)(torch.ones(2), torch.ones(1).long()), "one for each"),
        (lambda: Embedding(16, "sinusoidal", torch.nn.SiLU, 3)(torch.ones(2), torch.ones(2, 4)), "num_classes=3"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_refusals_name_the_remedy(build, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        build()
    assert "\n" not in str(error.value)
