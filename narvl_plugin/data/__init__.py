"""Everything between TSV files and batches: rows, text, pictures, boxes and the embedded scenes."""
