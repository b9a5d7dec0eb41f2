"""What models generate: a student's one pass, a teacher's search, rescoring."""
