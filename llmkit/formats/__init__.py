"""Other formats that models are written to and read from."""
