"""Released checkpoints to DiGIT's own state dicts, one file per format; every tensor is accounted for."""
