"""llmkit: from raw text to a trained, fine-tuned, evaluated and exported language model."""

__version__ = "0.1.0"
