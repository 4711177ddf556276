"""diffusers' modules as the engine has them: the same tensors by their names, with a config that we read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kinema.engines.wan.configs import TransformerConfig, VaeConfig
from kinema.engines.wan.transformer.network import TransformerWeights
from kinema.engines.wan.vae.autoencoder import Vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel


def own_vae(vae: AutoencoderKLWan) -> Vae:
    """With the module's own tensors, which stay where they are."""
    return Vae(VaeConfig.model_validate(_config(vae)), dict(vae.state_dict()))


def own_transformer(module: WanTransformer3DModel) -> TransformerWeights:
    """The same."""
    return TransformerWeights(TransformerConfig.model_validate(_config(module)), dict(module.state_dict()))


def _config(module: Any) -> dict[str, Any]:
    return dict(module.config)
