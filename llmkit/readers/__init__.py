"""Read files of any format as streams of records and documents."""
