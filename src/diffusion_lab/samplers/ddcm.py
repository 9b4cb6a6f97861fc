"""Ancestral sampling with the noise of a codebook, and the compression that follows from it."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.noise import Draws, Stream, normal
from diffusion_lab.samplers.ancestral import DDPM, Draw
from diffusion_lab.samplers.base import EvaluationContext, Samples, prior
from diffusion_lab.variances import Variance

# (step, codebook (K, C, H, W), prediction) → int64 (B,), the index of each image's vector
Choice = Callable[[int, Tensor, Prediction], Tensor]


class Code(NamedTuple):
    """A compressed batch."""

    indices: Tensor  # int64 (B, n), in [0, K): the codebook's vector of every noisy step
    image: Tensor  # (B, C, H, W), which `decompress` reconstructs from the indices
    bits: float  # n log₂ K, the size of an image's indices
    nfe: int  # network evaluations


class DDCM(DDPM):
    """DDPM whose z of step i is one of K normal vectors, the same K for all images (Ohayon et al. 2025, DDCM).

    As a generator it picks the vector at random by the image's key. `compress` picks, for each image, the vector that points
    most from x̂_0 to the image, argmax_k ⟨z_k, x_0 − x̂_0⟩; the n = N − 1 choices are the code, since `decompress`
    walks the same way by them. There x_T is one vector for all images. Codebooks are keyed by (codebook_seed, step), so that
    both sides need the network, this configuration and nothing else; reconstructions are equal bit for bit where the kernels
    are, that is with equal batches and threads.

    Args:
        codebook: K ≥ 2, the vectors of a step.
        codebook_seed: of the codebooks and x_T, in [0, 2⁶⁴).
        steps, variance, grid, budget, max_final_noise: as `DDPM`.

    Raises:
        ConfigError: K < 2, and as `DDPM`.
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
        if codebook < 2:
            raise ConfigError(f"sampler=ddcm needs codebook >= 2 vectors to choose from, not codebook={codebook}")
        self.codebook, self.codebook_seed = codebook, codebook_seed

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        chosen = context.noise.choices(len(times) - 1, self.codebook)
        return self.chain(x, times, context, steps, self._draw(lambda i, book, prediction: chosen[:, i]))

    def _draw(self, choice: Choice) -> Draw:
        """The z of a step: the vectors of its codebook that `choice` picks."""

        def draw(i: int, prediction: Prediction) -> Tensor:
            book = self._vectors(prediction.x0, torch.arange(self.codebook), i + 1)
            return book[choice(i, book, prediction)]

        return draw

    def compress(self, denoiser: Denoiser, x0: Tensor, condition: Mapping[str, Tensor] | None = None) -> Code:
        """Return the code of images x0, float (B, C, H, W) in [−1, 1]; `decompress` needs the same `condition`."""
        chosen: list[Tensor] = []

        def nearest(i: int, book: Tensor, prediction: Prediction) -> Tensor:
            chosen.append(((x0 - prediction.x0).flatten(1) @ book.flatten(1).T).argmax(1))
            return chosen[-1]

        image, nfe, _ = self._chosen(nearest, denoiser, x0, condition)
        indices = torch.stack(chosen, 1) if chosen else torch.zeros(len(x0), 0, dtype=torch.int64)
        return Code(indices, image, indices.shape[1] * math.log2(self.codebook), nfe)

    def decompress(
        self, denoiser: Denoiser, indices: Tensor, like: Tensor, condition: Mapping[str, Tensor] | None = None
    ) -> Samples:
        """Reconstruct the images (B, C, H, W) of a code.

        Args:
            denoiser: that of `compress`.
            indices: int64 (B, n).
            like: any tensor (B, C, H, W) of the shape, dtype and device that the images had.
            condition: that of `compress`.

        Raises:
            ConfigError: indices for another number of steps, or outside [0, K).
        """
        steps = len(self.time_grid(denoiser)) - 2
        if indices.shape != (len(like), steps) or not bool(((indices >= 0) & (indices < self.codebook)).all()):
            raise ConfigError(
                f"{tuple(indices.shape)} indices, but this sampler decodes {(len(like), steps)} in [0, {self.codebook}): "
                "take the steps, the grid and the codebook that compressed them"
            )
        return self._chosen(lambda i, book, prediction: indices[:, i], denoiser, like, condition)

    @torch.no_grad()
    def _chosen(
        self, choice: Choice, denoiser: Denoiser, like: Tensor, condition: Mapping[str, Tensor] | None
    ) -> Samples:
        """A run from the common x_T with the vectors that `choice` picks."""
        self._check_denoiser(denoiser)
        times = self.time_grid(denoiser)
        start = self._vectors(like, torch.zeros(len(like), dtype=torch.int64), 0)
        unused = Draws(tuple(like.shape[1:]), 0, torch.arange(len(like), device=like.device), like.dtype)
        context = EvaluationContext(denoiser, condition or {}, None, unused)
        x = self.chain(prior(denoiser.schedule, start), times, context, range(len(times) - 1), self._draw(choice))
        context.refuse_nan()
        return Samples(x, context.nfe)

    def _vectors(self, like: Tensor, index: Tensor, draw: int) -> Tensor:
        """Rows `index` of the codebook of a draw: 0 holds x_T, i + 1 the vectors of step i."""
        return normal(
            tuple(like.shape[1:]),
            seed=self.codebook_seed,
            index=index.to(like.device),
            draw=draw,
            stream=Stream.CODEBOOK,
            dtype=like.dtype,
        )
