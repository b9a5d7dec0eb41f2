"""Data from TSV files to batches: rows, text, images, boxes, embedded scenes and official data sets."""
