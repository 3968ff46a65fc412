"""Names that SGLang and transformers import."""

from absent import absent

__getattr__ = absent(__name__)
