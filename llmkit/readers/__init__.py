"""Files of any kind to records and documents, as streams."""
