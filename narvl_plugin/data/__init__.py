"""Everything between TSV files and batches: rows, text, pictures, boxes, the embedded scenes and raw data sets."""
