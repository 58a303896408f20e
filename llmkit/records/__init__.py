"""Read records of any layout, encode them, and choose the rows that a fine-tuning run reads."""
