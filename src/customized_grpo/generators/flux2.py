"""What the adapters of FLUX.2 and FLUX.3 share: their VAE, of whose latents four are a token."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from customized_grpo.generators.pipeline import PipelineGenerator


class Flux2LatentsGenerator(PipelineGenerator):
    """Adapter whose latents are patches ``[B, H W / 256, 4 C]``, normalised as the VAE says."""

    def unpack(self, latents: Tensor) -> Tensor:
        """Packed latents ``[B, S, 4 C]`` as the VAE takes them, ``[B, C, H / 8, W / 8]``."""
        mean, std = self._statistics()
        patches = latents.transpose(1, 2).unflatten(2, (self.grid[0], -1))
        return pixel_shuffle(patches * std + mean, 2)

    def _encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self._statistics()
        latents = vae.encode(images.to(vae.dtype) * 2 - 1).latent_dist.mode()
        return _tokens((pixel_unshuffle(latents, 2) - mean) / std)

    def _pack(self, latents: Tensor) -> Tensor:
        return _tokens(pixel_unshuffle(latents, 2))

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return vae.decode(self.unpack(latents).to(vae.dtype)).sample

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation ``[1, 4 C, 1, 1]`` of the VAE's patches."""
        vae = self.pipeline.vae
        mean, variance = (v.view(1, -1, 1, 1) for v in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()


def _tokens(patches: Tensor) -> Tensor:
    return patches.flatten(2).transpose(1, 2)
