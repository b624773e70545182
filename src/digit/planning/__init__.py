"""What a run would need, before anything runs: memory, time, disk and money of every stage (`digit plan`)."""
