"""What the LAMB network computes. Importing this registers LAMB with the Auto classes and `pipeline`."""

from pathlib import Path

from processing_lamb import AudioCaptioningPipeline, LambFeatureExtractor, LambProcessor
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_ced import CedConfig
from .configuration_lamb import LambConfig
from .cross_modal_aligner import CrossModalAligner, cauchy_schwarz_divergence, info_nce
from .modeling_ced import CedModel
from .modeling_lamb import LambForAudioCaptioning
from .token_guide import TokenGuideLogitsProcessor, guide_scores
from .two_stream_adapter import TwoStreamAdapter

AutoConfig.register("lamb", LambConfig, exist_ok=True)
AutoModel.register(CedConfig, CedModel, exist_ok=True)
AutoModel.register(LambConfig, LambForAudioCaptioning, exist_ok=True)
AutoModelForMultimodalLM.register(LambConfig, LambForAudioCaptioning, exist_ok=True)
AutoFeatureExtractor.register(LambConfig, LambFeatureExtractor, exist_ok=True)
AutoProcessor.register(LambConfig, LambProcessor, exist_ok=True)
_MINI = Path(__file__).parent / "mini"
PIPELINE_REGISTRY.register_pipeline(
    "audio-captioning",
    AudioCaptioningPipeline,
    pt_model=AutoModel,
    default={"model": (str(_MINI), None)},
    type="multimodal",
)

# What is saved carries its own code, so that the Hub serves it to those who have not installed this package.
CedConfig.register_for_auto_class()
LambConfig.register_for_auto_class()
CedModel.register_for_auto_class("AutoModel")
LambForAudioCaptioning.register_for_auto_class("AutoModel")
LambFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
LambProcessor.register_for_auto_class("AutoProcessor")
LambConfig.pipeline_is_registered = True


def default_checkpoint() -> str:
    """
    The folder of LAMB-mini, the small model that is shipped with the package (see the card in it).

    Raises:
        FileNotFoundError: when this copy of the package carries none.
    """
    if not (_MINI / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"There is no model in {_MINI}: train it with `make train-mini`, or name another model."
        )
    return str(_MINI)


__all__ = [
    "AudioCaptioningPipeline",
    "CedConfig",
    "CedModel",
    "CrossModalAligner",
    "LambConfig",
    "LambFeatureExtractor",
    "LambForAudioCaptioning",
    "LambProcessor",
    "TokenGuideLogitsProcessor",
    "TwoStreamAdapter",
    "cauchy_schwarz_divergence",
    "default_checkpoint",
    "guide_scores",
    "info_nce",
]
