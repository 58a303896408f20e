"""Measures of a trained model, on text and on records."""
