"""Generation: a student's parallel pass, a teacher's search, rescoring."""
