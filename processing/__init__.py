"""Audio and text in, captions out."""

from .feature_extraction_lamb import LambFeatureExtractor
from .pipeline_audio_captioning import AudioCaptioningPipeline, read_audio
from .processing_lamb import LambProcessor

__all__ = ["AudioCaptioningPipeline", "LambFeatureExtractor", "LambProcessor", "read_audio"]
