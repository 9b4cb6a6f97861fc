"""Ancestral sampling with noise from a codebook, and image compression with it."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import SEEDS, ConfigError, check_number
from diffusion_lab.noise import Draws, Stream, normal
from diffusion_lab.samplers.ancestral import DDPM, Draw
from diffusion_lab.samplers.base import EvaluationContext, Samples, at_first_time, prior
from diffusion_lab.variances import Variance

# choice(i, codebook (K, C, H, W), prediction) → int64 (B,): the codebook index of each image at step i
Choice = Callable[[int, Tensor, Prediction], Tensor]


class Code(NamedTuple):
    """A compressed batch."""

    indices: Int[Tensor, "b n"]  # codebook index in [0, K) of every stochastic step
    image: Float[Tensor, "b c h w"]  # the reconstruction that `decompress` returns
    bits: float  # code length of an image, n log₂ K
    nfe: int  # network evaluations


class DDCM(DDPM):
    """DDPM whose z of step i is one of K normal vectors, the same K for all images (Ohayon et al. 2025, DDCM).

    Generation draws the vector at random by the key of the image. `compress` selects the vector best aligned with the residual,
    argmax_k ⟨z_k, x_0 − x̂_0⟩, for each image; the n = N − 1 indices are the code, from which `decompress` repeats the same steps.
    Both start from the same x_T for all images. Codebooks are keyed by (codebook_seed, step), so decompression needs only the
    network and this configuration. Reconstructions are bit-equal with equal batches and threads, since kernels differ otherwise.

    Args:
        codebook: K in [2, 65536], the number of vectors of a step.
        codebook_seed: seed of the codebooks and of x_T, in [0, 2⁶⁴).
        steps, variance, grid, budget, max_final_noise: as in `DDPM`.

    Raises:
        ConfigError: an argument is out of range, and as `DDPM`.
    """

    def __init__(
        self,
        steps: int | None = None,
        variance: Variance | None = None,
        grid: str = "linspace",
        budget: int | None = None,
        max_final_noise: float | None = None,
        codebook: int = 64,
        codebook_seed: int = 0,
    ) -> None:
        super().__init__(steps, variance, grid, budget, max_final_noise)
        check_number("sampler.codebook", codebook, "[2, 65536]", "vectors of a step", whole=True)
        check_number("sampler.codebook_seed", codebook_seed, SEEDS, whole=True)
        self.codebook, self.codebook_seed = codebook, codebook_seed

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        indices = context.noise.choices(len(times) - 1, self.codebook)
        return self.chain(x, times, context, steps, self._draw(lambda i, codebook, prediction: indices[:, i]))

    def _draw(self, choice: Choice) -> Draw:
        """Return a function for the z of a step: the vectors of its codebook that `choice` selects."""

        def draw(i: int, prediction: Prediction) -> Tensor:
            codebook = self._vectors(prediction.x0, torch.arange(self.codebook), i + 1)
            return codebook[choice(i, codebook, prediction)]

        return draw

    def compress(
        self,
        denoiser: Denoiser,
        x0: Float[Tensor, "b c h w"],
        condition: Mapping[str, Shaped[Tensor, "b ..."]] | None = None,
    ) -> Code:
        """Return the code of images x0 in [−1, 1]; `decompress` needs the same `condition`."""
        selected: list[Tensor] = []

        def best_aligned(i: int, codebook: Tensor, prediction: Prediction) -> Tensor:
            selected.append(((x0 - prediction.x0).flatten(1) @ codebook.flatten(1).T).argmax(1))
            return selected[-1]

        image, nfe, _ = self._run(best_aligned, denoiser, x0, condition)
        indices = torch.stack(selected, 1) if selected else torch.zeros(len(x0), 0, dtype=torch.int64)
        return Code(indices, image, indices.shape[1] * math.log2(self.codebook), nfe)

    def decompress(
        self,
        denoiser: Denoiser,
        indices: Int[Tensor, "rows n"],
        like: Float[Tensor, "b c h w"],
        condition: Mapping[str, Shaped[Tensor, "b ..."]] | None = None,
    ) -> Samples:
        """Reconstruct images from their code.

        Args:
            denoiser: as for `compress`.
            indices: the code, (B, n).
            like: any tensor of the images' shape, dtype and device.
            condition: as for `compress`.

        Raises:
            ConfigError: indices of another number of images or steps, or outside [0, K).
        """
        steps = len(self.time_grid(denoiser)) - 2
        if indices.shape != (len(like), steps) or not bool(((indices >= 0) & (indices < self.codebook)).all()):
            raise ConfigError(
                f"{tuple(indices.shape)} indices, but this sampler decodes {(len(like), steps)} in [0, {self.codebook}): "
                "write the steps, the grid and the codebook with which they were compressed"
            )
        return self._run(lambda i, codebook, prediction: indices[:, i], denoiser, like, condition)

    @torch.no_grad()
    def _run(self, choice: Choice, denoiser: Denoiser, like: Tensor, condition: Mapping[str, Tensor] | None) -> Samples:
        """Integrate from the common x_T with the vectors that `choice` selects."""
        self._check_denoiser(denoiser)
        times = self.time_grid(denoiser)
        start = self._vectors(like, torch.zeros(len(like), dtype=torch.int64), 0)
        unused = Draws(tuple(like.shape[1:]), 0, torch.arange(len(like), device=like.device), like.dtype)
        context = EvaluationContext(denoiser, condition or {}, None, unused)
        x_T = at_first_time(denoiser.schedule, prior(denoiser.schedule, start), times)
        x = self.chain(x_T, times, context, range(len(times) - 1), self._draw(choice))
        context.refuse_nan()
        return Samples(x, context.nfe)

    def _vectors(self, like: Tensor, index: Tensor, draw: int) -> Tensor:
        """Return rows `index` of the codebook of a draw: draw 0 is x_T, draw i + 1 the codebook of step i."""
        return normal(
            tuple(like.shape[1:]),
            seed=self.codebook_seed,
            index=index.to(like.device),
            draw=draw,
            stream=Stream.CODEBOOK,
            dtype=like.dtype,
        )
