"""K-means over features that need not fit in memory, on one rank or many."""
