"""Export models to other programs' formats, and import them."""
