"""What the LAMB network computes. Importing this registers LAMB with the Auto classes and `pipeline`."""

from .configuration_ced import CedConfig
from .configuration_lamb import LambConfig
from .cross_modal_aligner import CrossModalAligner, cauchy_schwarz_divergence, info_nce
from .modeling_ced import CedModel
from .modeling_lamb import LambForAudioCaptioning
from .token_guide import TokenGuideLogitsProcessor, guide_scores
from .two_stream_adapter import TwoStreamAdapter

__all__ = [
    "CedConfig",
    "CedModel",
    "CrossModalAligner",
    "LambConfig",
    "LambForAudioCaptioning",
    "TokenGuideLogitsProcessor",
    "TwoStreamAdapter",
    "cauchy_schwarz_divergence",
    "guide_scores",
    "info_nce",
]
